#!/usr/bin/env bash
# Make or complete .venv, then run every check: style, types, tests. Arguments go to pytest.
#   --all         also tests that are more of the same, and slow systems
#   --only-more   these alone
#   --setup-only  nothing
# Two tests run at a time: most are one process, or wait.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"

prepare_environment test
pytest=("$VENV/bin/python" -m pytest -n 2 --dist loadgroup)
export OMP_NUM_THREADS=1
case "${1:-}" in
--setup-only)
    echo "ready: $VENV"
    exit 0
    ;;
--only-more)
    shift
    exec "${pytest[@]}" --all -m more "$@"
    ;;
esac
"$VENV/bin/python" -m ruff check .
found="$(mktemp)" # by mypy, which runs beside the tests
trap 'rm -f "$found"' EXIT
"$VENV/bin/python" -m mypy >"$found" 2>&1 &
types=$!
status=0
"${pytest[@]}" "$@" || status=$?
wait "$types" || {
    status=1
    echo "types are wrong:"
    cat "$found"
}
exit "$status"
