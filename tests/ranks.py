"""Real process groups for tests: a function runs on n gloo ranks, forked from a server that has imported torch.

A rank that raises fails the test with its traceback; one that doesn't end in time is stopped and fails it too.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run_ranks(
    n: int, function: Callable[..., Any], *args: Any, timeout: float = 120, backend: str = "gloo", children: bool = False
) -> list[Any]:
    """`function(*args)` on n ranks of one process group; what each returned, by rank. `function` lives in a module.

    `children`: ranks start processes of their own, as checkpoint writers do.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(n):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_rank, args=(theirs, rank, n, folder, backend, function, args), daemon=not children)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * n
        errors: list[str] = []
        waiting = dict(enumerate(pipes))
        while waiting and not (errors and time.monotonic() > deadline):
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.insert(0, f"ranks {sorted(waiting)} did not end within {timeout} s")
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, results[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, results[rank] = False, f"rank {rank} died"
                if not ok:
                    errors.append(f"rank {rank}:\n{results[rank]}")
                    deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for it
        for process in processes:
            process.join(0.1 if errors else 5)
            if process.is_alive():
                process.kill()
                process.join(5)
    if errors:
        raise RuntimeError("\n".join(errors))
    return results


def _rank(pipe: Any, rank: int, n: int, folder: str, backend: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=n)
        result = function(*args)
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)
    finally:
        pipe.close()
