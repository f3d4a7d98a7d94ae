#!/usr/bin/env bash
# Start a Megatron training script, unchanged, with MuonDist known to it, under torchrun.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<USAGE
usage: bash launch/pretrain_megatron.sh SCRIPT [--args FILE] [Megatron's flags]

  SCRIPT        such as pretrain_gpt.py from Megatron-LM
  --args FILE   flags from a file, before the others; lines that begin with # are left out. configs/megatron/ has examples

NPROC (processes on this node; default: its GPUs), NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are torchrun's. PYTHON chooses the
interpreter, which must have megatron-core and muon_dist.
USAGE
}

case "${1:-}" in
    "") usage >&2; exit 2 ;;
    -h | --help) usage; exit 0 ;;
esac
script="$1"
shift
[ -f "$script" ] || fail "there is no script $script"
flags=()
if [ "${1:-}" = "--args" ]; then
    [ -f "${2:-}" ] || fail "--args names a file of flags, got '${2:-}'"
    # words, as a shell would read them from the command line, without its expansions
    while IFS= read -r line; do
        read -ra words <<<"$line"
        flags+=("${words[@]}")
    done < <(grep -v '^[[:space:]]*\(#\|$\)' "$2")
    shift 2
fi

folder="$(cd "$(dirname "$script")" && pwd)"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" # the script's own megatron, not an installed one
choose_python muon_dist.integrations.megatron
choose_processes
if [ "${NNODES:-1}" -gt 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $NNODES, but MASTER_ADDR is not set: name the host of node 0"
    [ -n "${NODE_RANK:-}" ] || fail "NNODES is $NNODES, but NODE_RANK is not set: number the nodes from 0"
    where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
else
    where=(--standalone)
fi
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron asks for it with tensor parallelism
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc_per_node "$NPROC" \
    --module muon_dist.integrations.megatron "$script" "${flags[@]}" "$@"
