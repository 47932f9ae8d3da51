# Shared by quickstart.sh, multinode.sh and tests/run.sh: the project's virtual environment with the pinned dependencies.
# shellcheck shell=bash

# install_into_venv EXTRA ...: makes .venv if needed and installs the project with these extras. Does nothing when already done for
# the same pins. PYTHON chooses the interpreter; PIP_INDEX_URL and its kin choose where packages come from, as for any pip.
install_into_venv() {
    local python="${PYTHON:-python3}" extras
    extras="$(IFS=,; echo "$*")"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "protoshard needs Python 3.10 or newer, but $python is $("$python" --version 2>&1): set PYTHON" >&2
        exit 2
    }
    local stamp=".venv/.installed-$extras" want
    want="$(cat pyproject.toml constraints.txt | cksum) $PWD"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$want" ]]; then return; fi
    echo "installing the pinned dependencies into .venv (a few minutes the first time)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    # torch first: packages that only ask for "torch" must find this version instead of fetching the newest.
    .venv/bin/python -m pip install -q -c constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
    .venv/bin/python -m pip install -q -c constraints.txt -e ".[$extras]"
    echo "$want" > "$stamp"
}
