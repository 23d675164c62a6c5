# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh after they have set `root`, the checkout: finds a Python and makes the
# environment `venv` with what is asked for. PYTHON=... and VENV=... override its choices.
venv="${VENV:-$root/.venv}"

supported() { # INTERPRETER: it runs, is Python 3.10 to 3.14, and can make environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" && { echo "$PYTHON"; return; }
        echo "PYTHON=$PYTHON is not a Python 3.10 to 3.14 with venv" >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3.10 python3 python python3.14; do
        supported "$candidate" && { echo "$candidate"; return; }
    done
    echo "no Python 3.10 to 3.14 with venv found; install one, or name it with PYTHON=..." >&2
    return 1
}

make_environment() { # EXTRA...: install this checkout, editable, with these extras
    local python extras stamp IFS=,
    extras="$*"
    # What is to be installed, as text: an equal stamp means there is nothing to do.
    stamp="$(cat "$root/constraints.txt" "$root/setup.cfg" "$root/pyproject.toml") $root $extras"
    if [ -f "$venv/installed-$extras" ] && [ "$(cat "$venv/installed-$extras")" = "$stamp" ]; then
        return
    fi
    if [ ! -x "$venv/bin/python" ]; then
        python="$(find_python)"
        echo "making $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    echo "installing into $venv"
    # PyTorch first: packages that need it could pull in a newer version than the tested one.
    "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" torch
    "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "${root}[$extras]"
    echo "$stamp" >"$venv/installed-$extras"
}
