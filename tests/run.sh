#!/usr/bin/env bash
# Make or complete .venv, then run every check: style, types, tests. Arguments go to pytest; --setup-only runs nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"

prepare_environment test
for argument in "$@"; do
    if [ "$argument" = "--setup-only" ]; then
        echo "ready: $VENV"
        exit 0
    fi
done
export OMP_NUM_THREADS=1
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m mypy
exec "$VENV/bin/python" -m pytest "$@"
