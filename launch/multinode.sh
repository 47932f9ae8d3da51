#!/usr/bin/env bash
# Runs a recipe on one or many machines through Ray Train: launch/multinode.sh --help.
# Finds this checkout's Python and hands over to launch/multinode.py; exec, so that signals reach it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    (cd "$root" && bash -euc "source launch/environment.sh; install_into_venv train")
fi

export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$root
export PYTHONSAFEPATH=1 # else `python -m` takes packages of the current folder, such as another checkout, before those of this one
export RAY_USAGE_STATS_ENABLED=0
exec "$python" -m launch.multinode "$@"
