"""Bytes that collectives bring to a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Received(TorchDispatchMode):
    """Bytes that this rank receives in collectives, by what an algorithm without waste would move among the ranks of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, world = func._opname, _group_size(args)
            sizes = [sum(t.numel() * t.element_size() for t in tensors_in(arg)) for arg in args]
            if name.startswith("allreduce"):
                self.bytes += 2 * sizes[0] * (world - 1) / world
            elif name.startswith(("allgather", "_allgather_base", "broadcast", "alltoall")):
                self.bytes += sizes[0] * (1 if name.startswith(("alltoall", "broadcast")) else (world - 1) / world)
            elif name.startswith(("reduce_scatter", "_reduce_scatter")):
                self.bytes += sizes[0] * (world - 1)
        return func(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    """The ranks of the process group among a collective's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return dist.get_world_size()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
