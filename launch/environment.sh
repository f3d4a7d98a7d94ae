# Sourced by launch/quickstart.sh and the scripts of tests/: makes or completes an environment in the repository root.
#
#   prepare_environment EXTRA    install this package with its extra ("plot" or "test") as launch/constraints.txt pins it
#
# Sets VENV. Says what is wrong and exits 2 where it can't. PYTHON chooses the interpreter, VENV_NAME another place than .venv, CONSTRAINTS
# another file of pinned versions.

source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
VENV="$ROOT/${VENV_NAME:-.venv}"
CONSTRAINTS="${CONSTRAINTS:-$ROOT/launch/constraints.txt}"

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.10 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer found. Install one, or name it: PYTHON=/path/to/python3 bash $0"
}

has_nvidia_driver() {
    [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" "$@"
}

install_torch() {
    "$VENV/bin/python" -c 'import torch' 2>/dev/null && return
    local version
    version="$(sed -n 's/^torch==//p' "$CONSTRAINTS")"
    # Without a driver the CUDA libraries (several GB) are of no use; a CPU build is taken where the package index has one.
    if ! has_nvidia_driver && pip_install "torch==$version+cpu" 2>/dev/null; then
        return
    fi
    pip_install "torch==$version"
}

prepare_environment() {
    local extra="$1" python stamp
    stamp="$(cat "$CONSTRAINTS" "$ROOT/pyproject.toml" | cksum | cut -d' ' -f1)"
    if [ -x "$VENV/bin/muon-dist" ] && { [ -e "$VENV/.ready-$extra-$stamp" ] || [ -e "$VENV/.ready-test-$stamp" ]; }; then
        return
    fi
    if [ -x "$VENV/bin/python" ] && ! is_new_enough "$VENV/bin/python"; then
        fail "$VENV was made with $("$VENV/bin/python" --version 2>&1); Python 3.10 or newer is needed. Remove it and call again"
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one whose making broke off
        python="$(find_python)" || exit 1
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV" || fail "$python can't make a virtual environment. On Debian or Ubuntu: apt install python3-venv"
    fi
    echo "installing what ${CONSTRAINTS#"$ROOT/"} pins (minutes the first time, a network is needed)"
    install_torch || fail "torch could not be installed. Is there a network? Without an NVIDIA driver, PIP_EXTRA_INDEX_URL can point pip to an index of CPU builds"
    pip_install --editable "$ROOT[$extra]" || fail "the package could not be installed. Is there a network? The lines above say what pip was missing"
    touch "$VENV/.ready-$extra-$stamp"
}
