# Sourced by the launch scripts: which Python, how many processes, how many threads each.
#
#   choose_python      sets PYTHON: as given, or .venv's where launch/quickstart.sh or tests/run.sh made one, or python3
#   choose_processes   sets NPROC: as given, or a process for each GPU of this host, or one
#   choose_threads N   sets OMP_NUM_THREADS for N processes on this host, unless it is set

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

choose_python() {
    [ -n "${PYTHON:-}" ] || { [ -x "$ROOT/.venv/bin/python" ] && PYTHON="$ROOT/.venv/bin/python"; } || PYTHON=python3
    "$PYTHON" -c "import ${1:-muon_dist}" || fail "$PYTHON can't import ${1:-muon_dist}; the lines above say why. PYTHON=… chooses another interpreter"
}

choose_processes() {
    local gpus
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
    else
        gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
    fi
    NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
    [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC must be a positive number, got '$NPROC'"
}

choose_threads() {
    local threads=$(($(nproc) / $1)) # more would fight for the cores
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}
