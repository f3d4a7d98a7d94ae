"""`muon-dist doctor --launcher NAME`, run by every rank: do all meet, are they alike, how fast are their links, is a step right."""

from __future__ import annotations

import os
import platform
import socket
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from ..run import Watchdog, end_process_group, find_ranks, start_process_group
from ..show.table import table
from ..version import __version__, installed_versions
from .doctor import largest_error, verdict

EXAMPLES = {
    "torchrun": "torchrun --standalone --nproc_per_node 2 --no-python muon-dist doctor --launcher torchrun",
    "deepspeed": "deepspeed --num_gpus 2 --no_python muon-dist doctor --launcher deepspeed",
    "slurm": "srun --nodes 2 --ntasks-per-node 8 muon-dist doctor --launcher slurm",
    "mpi": "mpiexec -n 2 muon-dist doctor --launcher mpi",
}
TIMEOUT = 60.0  # seconds in which ranks must meet, and until one that stands still is named
MEGABYTES = 8  # of a rank, in the timed collectives
REPEATS = 5
CLOCK_DIFFERENCE = 5.0  # seconds that clocks may differ, before logs are hard to read


def run(launcher: str) -> int:
    """Check the job that this process is a rank of. Rank 0 prints.

    Raises:
        ValueError: the environment is another launcher's, or set in part.
    """
    ranks = find_ranks()
    if ranks.launcher != launcher:
        raise ValueError(f"{launcher} did not start this process ({ranks.source}). Start it as the job will be: {EXAMPLES[launcher]}")
    try:
        device = start_process_group(ranks, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    with Watchdog(ranks, timeout=TIMEOUT):
        facts: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(facts, _facts(ranks.local_rank, device))
        seconds = {name: _time(collective, device) for name, collective in (("all-reduce", _all_reduce), ("all-to-all", _all_to_all))}
        worst = largest_error(device.type)
        failed = 0
        if ranks.rank == 0:
            print(f"{ranks.world_size} ranks, from {ranks.source}; they met at {ranks.master_addr}:{ranks.master_port}")
            print(_table(facts), flush=True)
            for problem in _unlike(facts):
                print(f"WRONG: {problem}")
                failed = 1
            for name, each in seconds.items():
                print(f"{name} of {MEGABYTES} MB a rank: {each * 1e3:.1f} ms, {MEGABYTES / 1e3 / each:.2f} GB/s a rank")
            failed = max(failed, verdict(worst, device.type))
        told = [failed]
        dist.broadcast_object_list(told)
    end_process_group()
    sys.stdout.flush()
    return int(told[0])


def _facts(local_rank: int, device: torch.device) -> dict[str, Any]:
    packages = ("torch", "numpy", "deepspeed", "megatron-core")
    versions = {"muon_dist": __version__, "Python": platform.python_version()}
    versions |= {**dict.fromkeys(packages, "not installed"), **installed_versions(packages)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": socket.gethostname(),
        "local_rank": local_rank,
        "device": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "time": time.time(),
        "versions": versions,
    }


def _table(facts: list[dict[str, Any]]) -> str:
    """A line per host."""
    rows = []
    for host in dict.fromkeys(fact["host"] for fact in facts):
        own = [(rank, fact) for rank, fact in enumerate(facts) if fact["host"] == host]
        devices = sorted({fact["device"] for _, fact in own})
        places = ", ".join(str(rank) for rank, _ in own[:8]) + (f", … {own[-1][0]}" if len(own) > 8 else "")
        first = own[0][1]
        rows.append((host, places, ", ".join(devices), first["cores"], first["threads"]))
    versions = ", ".join(f"{name} {version}" for name, version in facts[0]["versions"].items())
    return f"{table(('host', 'ranks', 'device', 'cores', 'threads a rank'), rows, right=(3, 4))}\n{versions}"


def _unlike(facts: list[dict[str, Any]]) -> list[str]:
    """What ranks differ in, and should not."""
    problems, first = [], facts[0]
    for rank, fact in enumerate(facts):
        for name, version in fact["versions"].items():
            if version != first["versions"][name]:
                problems.append(f"rank {rank} on {fact['host']} has {name} {version}, rank 0 has {first['versions'][name]}")
        if fact["device"] != first["device"]:
            problems.append(f"rank {rank} on {fact['host']} computes on {fact['device']}, rank 0 on {first['device']}")
        if abs(fact["time"] - first["time"]) > CLOCK_DIFFERENCE:
            problems.append(f"the clock of {fact['host']} differs by {fact['time'] - first['time']:.0f} s from that of {first['host']}")
    for host in dict.fromkeys(fact["host"] for fact in facts):
        own = [fact for fact in facts if fact["host"] == host]
        if sum(fact["threads"] for fact in own) > 2 * own[0]["cores"] and len(own) > 1:
            problems.append(
                f"{len(own)} ranks on {host} take {own[0]['threads']} threads each, and it has {own[0]['cores']} cores: set OMP_NUM_THREADS"
            )
    return problems[:20]


def _all_reduce(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


def _all_to_all(tensor: torch.Tensor) -> None:
    share = tensor[: tensor.numel() // dist.get_world_size() * dist.get_world_size()]
    dist.all_to_all_single(torch.empty_like(share), share)


def _time(collective: Any, device: torch.device) -> float:
    """The median over repeats of the slowest rank's time."""
    tensor = torch.ones(MEGABYTES * 1_000_000 // 4, device=device)
    spans = []
    for _ in range(REPEATS + 1):  # the first connects
        dist.barrier()
        began = time.perf_counter()
        collective(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - began)
    slowest = torch.tensor(spans[1:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())
