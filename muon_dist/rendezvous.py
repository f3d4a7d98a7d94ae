"""Waiting for other ranks with an end to it, and a message that names those who did not come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)  # how long a rank waits for the others at binding, before it says who is missing
PATIENCE = 5.0  # seconds in which ranks that gave up waiting tell each other that they are alive

BIND = "bind the optimizer"


def meet(ranks: Sequence[int], what: str = BIND) -> None:
    """Wait until all ranks are here, through the store by which they found each other: before collectives that take no time limit.

    Raises:
        RuntimeError: some did not come in time.
    """
    store = _store()
    if store is None or len(ranks) == 1:
        return
    key = f"muon_dist/meet/{what}/{'-'.join(map(str, ranks))}"
    arrived = store.add(key, 1)
    done = f"{key}/{(arrived - 1) // len(ranks)}"
    if arrived % len(ranks) == 0:
        store.set(done, "")
    try:
        store.wait([done], TIMEOUT)
    except RuntimeError as error:
        store.add(key, -1)  # whoever comes later must not be taken for complete
        raise RuntimeError(_not_all(ranks, what, TIMEOUT)) from error


def wait_in_time(work: dist.Work | None, ranks: Sequence[int], what: str = BIND) -> None:
    """Wait for a collective, and say who is missing where it doesn't end."""
    assert work is not None  # this rank is in the group
    try:
        work.wait(TIMEOUT)
    except RuntimeError as error:
        raise RuntimeError(_not_all(ranks, what, TIMEOUT)) from error


@contextmanager
def naming_the_missing(ranks: Sequence[int], what: str) -> Iterator[None]:
    """Around collectives that end by their process group's own time limit."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(_not_all(ranks, what, None)) from error


def told(ranks: Sequence[int], topic: str, value: str) -> dict[int, str]:
    """What other ranks tell of a topic while this one waits a little: rank -> value, those that tell nothing left out."""
    store = _store()
    if store is None:
        return {dist.get_rank(): value}
    store.set(f"muon_dist/{topic}/{dist.get_rank()}", value)
    end, found = time.monotonic() + PATIENCE, dict[int, str]()
    while len(found) < len(ranks):
        for rank in ranks:
            if rank not in found and store.check([key := f"muon_dist/{topic}/{rank}"]):
                found[rank] = store.get(key).decode()
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return found


def _not_all(ranks: Sequence[int], what: str, limit: timedelta | None) -> str:
    waiting = told(ranks, f"waiting/{what}", "")
    missing = [rank for rank in ranks if rank not in waiting]
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}" if missing else "one of the ranks"
    within = "in time" if limit is None else f"within {limit.seconds} s"
    return (
        f"{who} did not come to {what} {within}; the ranks {list(ranks)} were expected. Check that all of them are alive, build the "
        "optimizer with the same parameters and take the same steps, and that process_group names them if others don't take part"
    )


def _store() -> Any:
    try:
        return dist.distributed_c10d._get_default_store()
    except (ValueError, RuntimeError, AttributeError):  # a backend without one, such as MPI
        return None


def gather_objects(value: Any, group: dist.ProcessGroup | None, what: str = BIND) -> list[Any]:
    """What every rank of a group gives, in its order. Collective.

    Raises:
        RuntimeError: some did not come in time.
    """
    group = group if group is not None else dist.group.WORLD
    meet(dist.get_process_group_ranks(group), what)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
