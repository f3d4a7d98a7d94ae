"""Real process groups for tests: a function runs on n gloo ranks, which serve one test after the other.

Ranks are forked from a server that has imported torch and the hosts, the first time that a test asks for n of them, and kept: what a rank
does for the first time (a trial of Newton–Schulz, DTensor's first placement, an engine) takes longer than what most tests ask of it.
Every test gets a new process group, and the state in which the ranks were forked (tests/pristine.py). Where a rank raises, dies, doesn't
end in time or is left with threads or processes of a test's, all n are replaced. There are n for every n, so that ranks that meet have
done the same before: hosts count by rank what must be equal on all (DeepSpeed's modules, for one).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class Rank:
    """A process that runs functions as one rank of a process group."""

    def __init__(self) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,))  # not a daemon: writers of checkpoints start processes
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """The process, and those that it has started."""
        own = [int(pid) for path in Path(f"/proc/{self.process.pid}/task").glob("*/children") for pid in path.read_text().split()]
        self.pipe.close()
        self.process.kill()
        self.process.join(10)
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


_worlds: dict[int, list[Rank]] = {}


def run_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 120, fresh: bool = False) -> list[Any]:
    """`function(*args)` on n ranks of one process group; what each returned, by rank. `function` lives in a module.

    `fresh`: in new processes. For runs that are compared bit by bit: where a tensor lies in memory decides how some of the kernels of hosts
    and of torch round on a CPU, and that depends on what the process has done before.

    Raises:
        RuntimeError: with the traceback of every rank that raised, or the ranks that died or didn't end in time.
    """
    if fresh:
        end_ranks(n)
    world = _worlds.setdefault(n, [])
    while len(world) < n:
        world.append(Rank())
    deadline, errors, spent = time.monotonic() + timeout, [], False
    results: list[Any] = [None] * n
    with tempfile.TemporaryDirectory() as folder:
        for rank, each in enumerate(world):
            each.pipe.send_bytes(pickle.dumps((rank, n, folder, pickle.dumps((function, args)))))
        waiting = {rank: each.pipe for rank, each in enumerate(world)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if not errors:
                    errors.append(f"ranks {sorted(waiting)} did not end within {timeout} s")
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, found, leftovers = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, found, leftovers = False, "it died", []
                if ok:
                    results[rank] = pickle.loads(found)
                else:
                    errors.append(f"rank {rank}:\n{found}")
                    deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for it
                spent = spent or bool(leftovers)
    if errors or spent:
        end_ranks(n)
    if errors:
        raise RuntimeError("\n".join(errors))
    return results


def end_ranks(n: int | None = None) -> None:
    """All of them, or those of worlds of n."""
    for size in list(_worlds) if n is None else [n]:
        for rank in _worlds.pop(size, []):
            rank.end()


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from . import pristine

    torch.set_num_threads(1)
    gc.collect()
    hosts = pristine.Globals()
    gc.freeze()  # what was imported is not looked through again
    while True:
        try:
            rank, n, folder, job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # the tests have ended
        try:
            function, args = pickle.loads(job)  # imports the test's module
            hosts.add_what_was_imported()
            interpreter, running = pristine.Interpreter(), pristine.Leftovers()
            pristine.seed()
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
            result = pickle.dumps(function(*args))
            dist.barrier()
            dist.destroy_process_group()
            interpreter.put_back()
            hosts.put_back()
            del function, args
            gc.collect()
            pipe.send_bytes(pickle.dumps((True, result, running.found())))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc(), [])))
            os._exit(1)
