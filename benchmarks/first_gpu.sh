#!/usr/bin/env bash
# Everything that only a GPU can tell, in order of worth, within MINUTES: bash benchmarks/first_gpu.sh OUT [MINUTES] [--small]
# Needs torch, numpy and triton; what else is missing is named in the results. Installs nothing.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m benchmarks.first_gpu "$@"
