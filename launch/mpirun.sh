#!/usr/bin/env bash
# launch/train_gpt.py under mpirun: MPI starts the processes and tells them their ranks, tensors travel over torch.distributed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

usage() {
    cat <<USAGE
usage: [NAME=value …] bash launch/mpirun.sh [flags of train_gpt.py]

  NPROC          processes on all hosts together (default: this host's GPUs, or 1)
  MPIEXEC        the command that starts them (default: mpiexec beside PYTHON, or in PATH)
  MPI_FLAGS      its flags, such as "--hostfile hosts" or "-ppn 8"
  PYTHON         the interpreter; mpi4py in it must be built for the MPI of MPIEXEC
USAGE
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
choose_python mpi4py
choose_processes
mpiexec="${MPIEXEC:-$(dirname "$PYTHON")/mpiexec}"
[ -x "$mpiexec" ] || mpiexec="$(command -v mpiexec || true)"
[ -n "$mpiexec" ] || fail "there is no mpiexec: install an MPI (pip install mpich brings one), or name it with MPIEXEC"
[ -n "${MPI_FLAGS:-}" ] || choose_threads "$NPROC"
read -ra flags <<<"${MPI_FLAGS:-}"
exec "$mpiexec" -n "$NPROC" "${flags[@]}" "$PYTHON" "$ROOT/launch/train_gpt.py" "$@"
