#!/usr/bin/env bash
# launch/train_gpt.py in DeepSpeed, under its launcher, on one host or several.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<USAGE
usage: [NAME=value …] bash launch/deepspeed.sh [flags of train_gpt.py]

  CONFIG         the DeepSpeed config (default configs/deepspeed/zero2.json)
  NPROC          processes on each host (default: this host's GPUs, or 1)
  HOSTFILE       for several hosts: lines of "host slots=8", as DeepSpeed reads them; ssh must reach them without a password
  MASTER_PORT    where the ranks meet (default 29500)
  PYTHON         the interpreter
USAGE
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
choose_python muon_dist.integrations.deepspeed
choose_processes
choose_threads "$NPROC"
config="${CONFIG:-$ROOT/configs/deepspeed/zero2.json}"
[ -f "$config" ] || fail "CONFIG names no file: $config"
where=(--num_gpus "$NPROC")
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || where=(--include "localhost:$CUDA_VISIBLE_DEVICES") # with --num_gpus it would take others
if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE names no file: $HOSTFILE"
    where=(--hostfile "$HOSTFILE" --num_gpus "$NPROC")
fi
nvidia-smi --list-gpus >/dev/null 2>&1 || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export PATH="$(dirname "$PYTHON"):$PATH" # the launcher starts what it finds there
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/launch/train_gpt.py" --engine deepspeed --deepspeed-config "$config" "$@"
