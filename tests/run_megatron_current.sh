#!/usr/bin/env bash
# Make or complete .venv-megatron, Python 3.12 with megatron-core 0.19 and emerging-optimizers, and run the Megatron tests there.
# Arguments go to pytest. --if-possible, first: say what is missing and succeed where there is no Python 3.12 or too little disk, and leave
# out what does not depend on Megatron's version: products of sizes and dtypes, and resuming bit for bit.
# PYTHON chooses the interpreter. The environment takes about 6 GB: torch has no CPU build for 3.12 in every package index.
set -euo pipefail
export VENV_NAME=.venv-megatron
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"

give_up() {
    if [ "$optional" = yes ]; then
        echo "the tests of the current Megatron did not run: $1"
        exit 0
    fi
    fail "$1"
}

optional=no
if [ "${1:-}" = "--if-possible" ]; then
    optional=yes
    shift
    update=tests/test_megatron.py::test_every_update_equals_the_reference
    set -- --deselect "$update[" --deselect "${update}_where_all_ranks_work_on_slices" \
        --deselect tests/test_megatron.py::test_fused_projections_as_one_matrix --deselect tests/test_megatron.py::test_the_update_is_the_same \
        --deselect tests/test_megatron_checkpoints.py::test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit "$@"
fi
if [ -z "${PYTHON:-}" ]; then
    for candidate in python3.12 "$(pyenv root 2>/dev/null || true)"/versions/3.12*/bin/python3.12; do
        if "$candidate" -c '' 2>/dev/null; then
            PYTHON="$candidate"
            break
        fi
    done
fi
[ -n "${PYTHON:-}" ] || give_up "no Python 3.12 was found, which megatron-core 0.19 needs. Name it: PYTHON=/path/to/python3.12 bash $0"
export PYTHON
if [ ! -x "$VENV/bin/muon-dist" ] && [ "$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')" -lt 12000000 ]; then
    give_up "less than 12 GB of disk are free, which the environment of Python 3.12 needs while it is made"
fi
prepare_environment megatron-test
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -n 2 --dist loadgroup tests/test_megatron*.py tests/incidents/test_megatron_*.py "$@"
