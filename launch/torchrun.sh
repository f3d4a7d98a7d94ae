#!/usr/bin/env bash
# launch/train_gpt.py under torchrun, on one host or several.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<USAGE
usage: [NAME=value …] bash launch/torchrun.sh [flags of train_gpt.py]

  NPROC          processes on this host (default: its GPUs, or 1)
  NNODES         hosts (default 1), or MIN:MAX for a job that goes on with fewer; run this on each of them
  MASTER_ADDR    with several hosts: one of them, at which they meet, by the same name on all
  MASTER_PORT    its port (default 29500)
  RUN_ID         tells jobs that meet at one port apart (default train_gpt)
  NODE_RANK      0 on the host of MASTER_ADDR, another number elsewhere; only where that host doesn't know itself by this name
  LOCAL_ADDR     this host's address, where its name can't be resolved by the others
  MAX_RESTARTS   how often all ranks start again from the newest checkpoint after one failed (default 3)
  GRACE          seconds that ranks have for saving after torchrun got SIGTERM or SIGUSR1 (default 300)
  PYTHON         the interpreter
USAGE
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
choose_python
choose_processes
choose_threads "$NPROC"
if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone)
else
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $NNODES, but MASTER_ADDR is not set: name one host, at which all meet"
    where=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id "${RUN_ID:-train_gpt}")
    [ -z "${NODE_RANK:-}" ] || where+=(--rdzv_conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
    [ -z "${LOCAL_ADDR:-}" ] || where+=(--local_addr "$LOCAL_ADDR")
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for every restart: the old one holds addresses of dead processes
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${GRACE:-300}" "$ROOT/launch/train_gpt.py" "$@"
