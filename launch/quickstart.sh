#!/usr/bin/env bash
# From nothing to a verified model in a few minutes: installs into .venv, draws a set of procedural faces, trains on it with two
# processes, and evaluates on identities that were not trained on. Running it again reuses what is there.
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    echo "usage: bash launch/quickstart.sh"
    echo "Installs into .venv, trains on procedural faces (data/faces) into runs/faces_small, and evaluates."
    echo "example: PYTHON=python3.11 bash launch/quickstart.sh"
    exit 0
fi
cd "$(dirname "$0")/.."
source launch/environment.sh
install_into_venv train

make_faces() { # NAME FIRST_IDENTITY IDENTITIES
    [[ -f "data/faces/$1.tar" ]] || .venv/bin/protoshard data faces "data/faces/$1.tar" --first-identity "$2" --identities "$3" --images 20
}
make_faces train 0 400
make_faces test 1000000 100

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if [[ $gpus == 0 ]] && nvidia-smi -L > /dev/null 2>&1; then
    echo "torch cannot use this machine's GPU, so the quick start runs on CPU: docs/dependencies.md says which driver and build it takes" >&2
fi
.venv/bin/protoshard train faces_small --ranks "$((gpus == 1 ? 1 : 2))"
