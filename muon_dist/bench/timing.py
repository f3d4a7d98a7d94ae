"""How the benches take times: until the device has ended, and, where several ranks run, until all of them have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def now(device: torch.device) -> float:
    """Seconds of a clock, read when a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = now(device)
    work()
    return now(device) - started


def host_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Until the host is done with what a device, idle at first, may still be doing."""
    started = now(device)
    work()
    result = time.perf_counter() - started
    now(device)
    return result


def times_in_turns(sides: dict[str, Callable[[], Any]], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every side's work, in turns, from when all ranks (or this process) begin until all have ended; the first of each is a
    warm-up.
    """
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    result: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs + 1):
        for name, step in sides.items():
            barrier()
            started = now(device)
            step()
            now(device)
            barrier()
            result[name].append(now(device) - started)
    return {name: times[1:] for name, times in result.items()}


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios, and the least and the most of them, for a table."""
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} … {max(ratios):.2f})"


def device_of(name: str, ranks: int = 1) -> torch.device:
    """The device that a command was asked to measure on.

    Raises:
        ValueError: there aren't as many.
    """
    if name == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(f"--device cuda with {ranks} rank(s): this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Of the graphics card, for what is printed; else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
