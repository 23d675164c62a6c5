#!/usr/bin/env bash
# Makes the environment (.venv, or VENV=...) if there is none and runs the tests; arguments go to pytest.
#   bash tests/run.sh                          the default tests
#   bash tests/run.sh -m "slow and not gpu"    those that take minutes
#   bash tests/run.sh -m gpu                   those for a machine with a GPU
# PYTHON=... names the interpreter that makes the environment.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launchers/environment.sh"
make_environment train data metrics test

cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Some hundred processes import the same files, which are compiled once.
unset PYTHONDONTWRITEBYTECODE
if [ "$#" -eq 0 ]; then
    set -- -n 2 --dist worksteal
fi
"$venv/bin/python" -m pytest "$@"
