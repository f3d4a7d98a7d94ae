"""What DeepSpeed's tensor parallelism says of a parameter: its whole shape and the blocks of it that this rank holds."""

from __future__ import annotations

import itertools
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from muon_dist.sharding.layout import Box, whole

METADATA = "ds_autotp_universal_checkpoint_meta"  # on parameters that AutoTP has cut, or replicated knowingly


def tensor_parallel_group(mpu: Any) -> ProcessGroup | None:
    """The ranks among which tensors are cut; None without tensor parallelism. `mpu`: the engine's, from AutoTP, a pipeline or the user."""
    for name in ("get_slice_parallel_group", "get_tensor_model_parallel_group", "get_model_parallel_group"):
        if hasattr(mpu, name):
            group = getattr(mpu, name)()
            return group if group is not None and dist.get_world_size(group) > 1 else None
    return None


def local_shape(p: Any) -> tuple[int, ...]:
    """The shape that a parameter has on this tensor-parallel rank, also while ZeRO-3 has partitioned it."""
    return tuple(getattr(p, "ds_shape", p.shape))


def _cut(p: Any, name: str) -> tuple[int, list[list[int]]] | None:
    """The dimension along which a parameter is cut, and for each of its sub-parameters the width on every rank; None if it isn't."""
    metadata = getattr(p, METADATA, None)
    if metadata is None or metadata.get("replicated"):
        return None
    reason = metadata.get("conversion", {}).get("unsupported_reason")
    dim, widths = metadata.get("partition_dim"), metadata.get("sub_param_shard_widths")
    if widths is None and metadata.get("partition_sizes") is not None:
        widths = [metadata["partition_sizes"]]
    if reason or dim is None or widths is None:
        raise ValueError(f"AutoTP does not say how it cut {name} ({reason or 'no sizes'}), so its matrix can't be put together")
    return int(dim), [[int(width) for width in row] for row in widths]


def whole_shape(p: Tensor, name: str) -> tuple[int, ...]:
    """The shape of the parameter that tensor-parallel ranks hold together."""
    shape, cut = local_shape(p), _cut(p, name)
    if cut is None:
        return shape
    dim, widths = cut
    return (*shape[:dim], sum(map(sum, widths)), *shape[dim + 1 :])


def blocks(p: Tensor, name: str, group: ProcessGroup | None) -> tuple[Box, ...]:
    """The ordered boxes of the whole parameter whose flattened concatenation is this rank's tensor.

    Raises:
        ValueError: several sub-parameters side by side along the input dimension, or sizes that contradict the tensor.
    """
    shape, cut = whole_shape(p, name), _cut(p, name)
    if cut is None:
        return (whole(shape),)
    dim, widths = cut
    if dim > 0 and len(widths) > 1:
        raise ValueError(f"{name} has {len(widths)} sub-parameters side by side along dimension {dim}, which MuonDist does not support")
    rank = 0 if group is None else dist.get_rank(group)
    starts = [0, *itertools.accumulate(map(sum, widths))]
    boxes = []
    for start, row in zip(starts, widths, strict=False):
        before = start + sum(row[:rank])
        boxes.append((*whole(shape[:dim]), (before, before + row[rank]), *whole(shape[dim + 1 :])))
    held = sum(row[rank] for row in widths)
    if held != local_shape(p)[dim]:
        raise ValueError(f"AutoTP says this rank has {held} of dimension {dim} of {name}, but its tensor is {local_shape(p)}")
    return tuple(boxes)
