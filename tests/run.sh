#!/usr/bin/env bash
# Installs what the tests need into .venv, then lint, types, tests, of which two files run at a time. Arguments go to pytest:
# tests/run.sh -k checkpoint, or -n 0 for one test at a time. With --long the long forms of tests run too, thousands of fuzzed inputs, every
# kill point; one at a time, because some take times.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_into_venv train parquet test mxnet export search examples

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if command -v shellcheck >/dev/null; then shellcheck -x launch/*.sh launch/*.sbatch benchmarks/*.sh tests/run.sh; else echo "shellcheck is not installed: scripts not checked"; fi
at_a_time=(-n 2 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do if [ "$argument" = --long ]; then at_a_time=(); fi; done
.venv/bin/pytest "${at_a_time[@]}" "$@"
