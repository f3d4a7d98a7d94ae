#!/usr/bin/env bash
# The core's tests, those that need no host framework, with another torch: bash tests/run_torch.sh VERSION [pytest's arguments]
# Makes or completes .venv-torch-VERSION. PYTHON chooses the interpreter. Most versions of torch have no CPU build in every package index:
# then it takes about 7 GB of disk.
set -euo pipefail
version="${1:-}"
if ! [[ "$version" =~ ^[0-9]+\.[0-9]+ ]]; then
    echo "which torch? bash $0 2.9.0" >&2
    exit 2
fi
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export VENV_NAME=".venv-torch-$version" CONSTRAINTS="$root/.venv-torch-$version.txt"
# Triton comes with its torch; the interpreter of older ones, in which the kernel is tested, needs numpy below 2.4
sed "s/^torch==.*/torch==$version/; /^triton==/d; s/^numpy==.*/numpy<2.4/" "$root/launch/constraints.txt" >"$CONSTRAINTS"
source "$root/launch/environment.sh"
cd "$ROOT"
prepare_environment core-test
export OMP_NUM_THREADS=1
core=(adaptive checkpoints gram_space kernels layouts no_waiting optimizer parity plan polar random_configurations reference routing slices
    spectrum step_counts whole_checkpoints edited_state precision unlike_ranks)
core=("${core[@]/#/tests/test_}")
exec "$VENV/bin/python" -m pytest "${core[@]/%/.py}" tests/gpu/test_right.py "$@"
