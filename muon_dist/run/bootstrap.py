"""Which rank this process is, of how many, and where rank 0 is: from torchrun, DeepSpeed's launcher, Slurm, MPI, or nobody.

MPI finds ranks and carries rank 0's address, nothing else: tensors stay on torch.distributed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
# launchers of MPI -> the variables that tell a process its rank and the number of ranks
MPI_VARIABLES = {
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_RANK": "PMI_SIZE",  # MPICH, Intel MPI
    "PMIX_RANK": "",  # PMIx doesn't tell the size
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",  # MVAPICH
    "PALS_RANKID": "",  # HPE Cray
}
LAUNCHERS = ("torchrun", "deepspeed", "slurm", "mpi")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands in its job.

    Attributes:
        launcher: "torchrun", "deepspeed", "slurm", "mpi", "environment" (the variables of torch.distributed, set by someone else) or
            "none" (one process).
        rank, world_size: among all processes.
        local_rank, local_world_size: among those of this host. 0 as size: the launcher doesn't tell.
        master_addr, master_port: where rank 0 is met.
        source: the variables that said so, for people.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: str

    def __str__(self) -> str:
        met = "" if self.world_size == 1 else f", which meet at {self.master_addr}:{self.master_port}"
        return f"rank {self.rank} of {self.world_size}{met}, from {self.source}"


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read the environment, and ask MPI where that is what started this process (then all ranks must call this).

    The first of these that is there decides: torch.distributed's variables (torchrun, DeepSpeed's launcher), MPI, Slurm.

    Raises:
        ValueError: an environment that is set in part, or contradicts itself; the message names the variables.
    """
    if environment is not None:
        return _find(environment)
    try:
        return _find(os.environ)
    except ValueError as error:
        _end_mpi(error)
        raise


def _end_mpi(error: ValueError) -> None:
    """Where MPI started this process the others wait for it in MPI's own initialisation, so they must be ended, too."""
    if any(name in os.environ for name in MPI_VARIABLES) and "SLURM_STEP_ID" not in os.environ:
        with contextlib.suppress(ImportError, RuntimeError):
            from mpi4py import MPI

            if MPI.COMM_WORLD.Get_size() > 1:
                print(f"error: {error}", file=sys.stderr, flush=True)
                MPI.COMM_WORLD.Abort(2)


def _find(env: Mapping[str, str]) -> Ranks:
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torch(env)
    marks = [name for name in MPI_VARIABLES if name in env]
    in_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    if marks and not (in_step and _same_in_slurm(env, marks[0])):
        return _from_mpi(env, marks[0])
    if in_step:
        return _from_slurm(env)
    if int(env.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} but SLURM_STEP_ID is not set: this one process was started inside a Slurm allocation "
            "without srun. Start it with srun, so that every task gets a process; for one process on purpose, unset SLURM_NTASKS"
        )
    return Ranks(
        launcher="none",
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        source="no launcher: a single process",
    )


def _number(env: Mapping[str, str], name: str, least: int, below: int | None = None) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = least - 1
    if value < least or (below is not None and value >= below):
        limit = f"a number from {least}" + (f" to {below - 1}" if below is not None else " up")
        raise ValueError(f"{name}={env[name]!r} must be {limit}")
    return value


def _require(env: Mapping[str, str], names: tuple[str, ...], who: str) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        there = [f"{name}={env[name]}" for name in names if env.get(name)]
        raise ValueError(
            f"the environment is set in part: {', '.join(there)}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not. "
            f"{who} sets all of {', '.join(names)}; start with it, set the rest too, or unset them all for a single process"
        )


def _from_torch(env: Mapping[str, str]) -> Ranks:
    _require(env, TORCH_VARIABLES, "torchrun or DeepSpeed's launcher")
    world_size = _number(env, "WORLD_SIZE", 1)
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(name)), None)
    launcher = "torchrun" if env.get("TORCHELASTIC_RUN_ID") else "deepspeed" if local == "LOCAL_SIZE" else "environment"
    local_world_size = _number(env, local, 1, world_size + 1) if local else (1 if world_size == 1 else 0)
    return Ranks(
        launcher=launcher,
        rank=_number(env, "RANK", 0, world_size),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", 0, local_world_size or None),
        local_world_size=local_world_size,
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT", 1, 65536),
        source=f"{launcher} (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)",
    )


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    _require(env, SLURM_VARIABLES, "srun")
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    node = _number({"SLURM_NODEID": env.get("SLURM_NODEID", "0")}, "SLURM_NODEID", 0)
    tasks = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]) if env.get("SLURM_STEP_TASKS_PER_NODE") else []
    local_world_size = tasks[node] if node < len(tasks) else 0
    # steps of one job may run beside each other, as may jobs that share a node
    port = 20_000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 20_000
    return Ranks(
        launcher="slurm",
        rank=_number(env, "SLURM_PROCID", 0, world_size),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID", 0, local_world_size or None),
        local_world_size=local_world_size,
        master_addr=env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        master_port=_number(env, "MASTER_PORT", 1, 65536) if env.get("MASTER_PORT") else port,
        source="Slurm (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST)",
    )


def first_host(nodelist: str) -> str:
    """The first name in Slurm's short form of a list of hosts: "gpu[007-010,12],login" gives "gpu007"."""
    name = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    assert name is not None  # the pattern matches anything
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name[0])


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's short form of tasks per node: "8(x2),4" gives [8, 8, 4].

    Raises:
        ValueError: something else.
    """
    result: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} is not of the form 8(x2),4")
        result += [int(found[1])] * int(found[2] or 1)
    return result


def _same_in_slurm(env: Mapping[str, str], mark: str) -> bool:
    """Whether srun itself speaks MPI's process management; mpirun inside a step numbers its ranks by itself."""
    size = MPI_VARIABLES[mark]
    return env[mark] == env["SLURM_PROCID"] and (not size or env.get(size) == env.get("SLURM_STEP_NUM_TASKS"))


def _from_mpi(env: Mapping[str, str], mark: str) -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise ValueError(
            f"{mark}={env[mark]}: MPI started this process, but mpi4py can't be used ({error}). Install it (pip install mpi4py), "
            f"or set {', '.join(TORCH_VARIABLES)}"
        ) from error
    world = MPI.COMM_WORLD
    size = MPI_VARIABLES[mark]
    if size and env.get(size) and int(env[size]) != world.Get_size():
        raise ValueError(
            f"{size}={env[size]}, but mpi4py sees {world.Get_size()} rank(s): mpi4py was built for another MPI ({MPI.get_vendor()[0]}) "
            "than the one whose mpirun started this. Use the mpirun of that MPI, or build mpi4py against this one"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = len(set(world.allgather(socket.gethostname()))) == 1
    given = (env.get("MASTER_ADDR"), env.get("MASTER_PORT"))
    address = given[0] or ("127.0.0.1" if one_host else socket.gethostname())
    met = world.bcast((address, int(given[1]) if given[1] else free_port()), root=0)
    return Ranks(
        launcher="mpi",
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=local.Get_rank(),
        local_world_size=local.Get_size(),
        master_addr=met[0],
        master_port=met[1],
        source=f"MPI ({MPI.get_vendor()[0]} through mpi4py)",
    )


def free_port() -> int:
    """A TCP port that nobody listens on here, at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def start_process_group(ranks: Ranks, *, timeout: float = 1800) -> torch.device:
    """Start torch.distributed for these ranks, and give each its device. Sets torch.distributed's variables for hosts that read them.

    Args:
        timeout: seconds until a collective that not all ranks join raises. `Watchdog` names the rank that is missing; give it less.

    Returns:
        A CUDA device of this process's own, or the CPU where it sees none.

    Raises:
        ValueError: there are GPUs, but not one for each process, or two processes would share one.
        RuntimeError: not all ranks came in time, or rank 0 can't be reached.
    """
    port = ranks.master_port or free_port()
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size or ranks.world_size),
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=str(port),
    )
    _raise_file_limit()
    index = device_index(torch.cuda.device_count() if torch.cuda.is_available() else 0, ranks.local_rank, ranks.local_world_size)
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world_size = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timedelta(seconds=timeout)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Ranks that torchrun starts again find the store of those before them, and would connect to addresses of dead processes.
            # On several hosts the counts of restarts differ; launch/torchrun.sh asks for a new store there.
            store = PrefixStore(f"muon_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError) as error:
        raise RuntimeError(
            f"the {ranks.world_size} ranks did not meet at {ranks.master_addr}:{port} ({error}). Check that all of them were started, that "
            "this address is rank 0's host as the others see it, and that no firewall closes its ports"
        ) from error
    places: list[Any] = [None] * ranks.world_size
    identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    dist.all_gather_object(places, (socket.gethostname(), device.type, identity))
    first: dict[Any, int] = {}
    for rank, place in enumerate(places):
        host, kind, _ = place
        if kind == "cuda" and first.setdefault(place, rank) != rank:
            raise ValueError(
                f"ranks {first[place]} and {rank} would share a GPU of {host}: give every process a local rank, or a GPU, of its own"
            )
        if kind != places[0][1]:
            raise ValueError(
                f"rank {rank} on {host} would train on {kind}, rank 0 on {places[0][0]} on {places[0][1]}: give every host a GPU for each "
                "of its processes, or none (CUDA_VISIBLE_DEVICES=)"
            )
    return device


def device_index(visible: int, local_rank: int, local_world_size: int) -> int | None:
    """Which of the GPUs that this process sees is its own; None: there are none, so it computes on the CPU.

    Raises:
        ValueError: there are GPUs, but not one for each process of this host.
    """
    if visible == 0:
        return None
    if visible == 1 and local_world_size > 1:
        return 0  # the launcher has given every process its own; that they differ is checked when ranks have met
    if local_rank < visible and local_world_size <= visible:
        return local_rank
    processes = f"{local_world_size} processes" if local_world_size else f"a process of local rank {local_rank}"
    raise ValueError(
        f"this host has {processes}, which see {visible} GPU(s): start as many processes as there are GPUs, or set CUDA_VISIBLE_DEVICES= "
        "to compute on the CPU"
    )


def _raise_file_limit() -> None:
    """Gloo and rank 0's stores keep a connection for each rank, and 1,024 open files are a common limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_process_group() -> None:
    """End torch.distributed. Collective.

    What still refers to process groups is collected first: a gloo thread that is left when Python ends may abort the process.
    """
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
