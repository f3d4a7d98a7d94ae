"""Optimizer state that loads at another world size: what stands where state is not, and how replicas' state is completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layout import Fragment, box_shape

# A state entry has its keys on every rank from the start. Until layouts are known a value is UNSET, which means zeros; where
# another rank keeps it, it is ELSEWHERE. Both are empty tensors that tell themselves apart by shape, so they survive pickling.
_UNSET = (0, 0, 0, 0, 0, 0, 0)
_ELSEWHERE = (0, 0, 0, 0, 0, 0, 0, 0)


def unset() -> Tensor:
    """Stands for zeros that have not been allocated."""
    return torch.empty(_UNSET, device="cpu")


def elsewhere() -> Tensor:
    """Stands for state that another rank keeps."""
    return torch.empty(_ELSEWHERE, device="cpu")


def is_unset(value: object) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == _UNSET


def is_elsewhere(value: object) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == _ELSEWHERE


def is_absent(value: object) -> bool:
    """Whether a state entry holds no values on this rank."""
    return is_unset(value) or is_elsewhere(value)


def fit_state(value: Tensor, parameter: Tensor, fragment: Fragment, name: str) -> Tensor:
    """State as a parameter needs it: as it is where the shapes agree, or this rank's fragment of a whole, plain tensor.

    Raises:
        ValueError: state of another shape or sharding.
    """
    alike = isinstance(value, DTensor) == isinstance(parameter, DTensor) and value.shape == parameter.shape
    if alike and getattr(value, "placements", None) == getattr(parameter, "placements", None):
        if isinstance(value, DTensor) or value.stride() == parameter.stride():
            return value
        return torch.empty_like(parameter).copy_(value)  # in the parameter's memory layout, as elementwise kernels expect
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
        result = torch.zeros_like(parameter)
        assert isinstance(result, DTensor)  # as its parameter is
        for box in fragment:  # a DTensor's fragment is one box
            result.to_local().copy_(value[tuple(slice(a, b) for a, b in box)].reshape(box_shape(box)))
        return result
    placed = f" placed {value.placements}" if isinstance(value, DTensor) else ""
    raise ValueError(
        f"the state loaded for {name or 'a parameter'} has shape {tuple(value.shape)}{placed}, its parameter has {tuple(parameter.shape)}. "
        "Load through torch.distributed.checkpoint, which reshards, or from a state dict saved with this sharding"
    )


def complete_replicas(
    values: Sequence[Tensor],
    like: Sequence[Tensor],
    needs: Callable[[int, Tensor], bool],
    *,
    group: dist.ProcessGroup | None,
    ranks: Sequence[int],
    has: Tensor,
    lost: Tensor,
) -> list[Tensor]:
    """Bring replicated state to ranks that need it, by broadcasts from the first rank that has it.

    Args:
        values: this rank's state per parameter, some of it unset or elsewhere.
        like: tensors of the shape, dtype and device that each value has where it is.
        needs: (i, ranks that have value i) -> whether any rank must still receive it; equal on all ranks.
        has: (ranks, len(values)), which rank has which value.
        lost: (ranks, len(values)), where a rank believes a value with another.

    Returns:
        The values, complete where they were broadcast.
    """
    result = list(values)
    for i, value in enumerate(values):
        holders = has[:, i]
        if not holders.any():
            if bool(lost[:, i].any()):
                raise ValueError(
                    "the momentum of a replicated parameter lives with no rank: this optimizer was pickled or copied away from the rank "
                    "that owned it. Call consolidate() on all ranks before, or load a state dict"
                )
            continue
        if not needs(i, holders):
            continue
        absent = is_absent(value)
        # contiguous on the way: memory layouts may differ between ranks, and a broadcast moves raw memory
        moved = torch.empty(like[i].shape, dtype=like[i].dtype, device=like[i].device) if absent else value.contiguous()
        dist.broadcast(moved, src=ranks[int(holders.to(torch.int64).argmax())], group=group)
        if absent:
            result[i] = torch.empty_like(like[i]).copy_(moved)
    return result
