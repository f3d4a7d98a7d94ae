"""Layouts: which piece of a parameter a rank stores, as boxes of the whole parameter.

A **box** is a half-open range in every dimension. A rank's **fragment** is an ordered tuple of boxes whose flattened
concatenation is the tensor that the rank stores. Everything a host does to a parameter (rows, columns, fused gate/up,
flat partitions cut at arbitrary elements, FSDP2 on top of tensor parallelism) is a fragment:

    row shards (FSDP2)        column shards (TP)        a flat span of a partition (ZeRO)
    +-------------+           +------+------+           +-------------+
    |   rank 0    |           |      |      |           |  0 +--------+
    +-------------+           |  0   |  1   |           +----+   1    |   rank 1: the end of one row,
    |   rank 1    |           |      |      |           |        +----+   whole rows, the start of another:
    +-------------+           +------+------+           +--------+ 2  |   three boxes

Nothing here allocates, computes on values or communicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

try:  # FSDP2 over tensor parallelism on the same dimension; private in torch, and all that tells the order of the cuts
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:  # pragma: no cover
    _StridedShard = None  # type: ignore[assignment,misc]

Box = tuple[tuple[int, int], ...]
Fragment = tuple[Box, ...]


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def intersect(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None where they share nothing."""
    shared = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def fragment_numel(fragment: Fragment) -> int:
    return sum(map(box_numel, fragment))


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Where a plain tensor lies in its parameter, for placements that the tensor itself doesn't tell.

    Attributes:
        global_shape: the parameter's whole, unpadded shape.
        blocks: the ordered boxes of the parameter whose flattened concatenation is this rank's tensor-parallel tensor,
            each ((start, stop), ...) with one range per dimension. None: the whole parameter. Two for a gate/up
            projection ([gate_i; up_i]), one for plain row or column splits.
        span: the half-open range of that flattened tensor which this rank stores, (start, stop). None: all of it.
        group: the process group of all ranks that hold a piece of the parameter. None: the optimizer's.
        replicas: a process group of ranks outside `group` that hold the same pieces, such as data-parallel replicas of a
            tensor-parallel parameter. Replicas inside `group` need no mention; equal pieces are found when ranks bind.
        device: where its matrices travel and are orthogonalised, if not where the tensor is stored (CPU offload).

    Raises:
        ValueError: a block outside the parameter, or a span outside the blocks.
    """

    global_shape: tuple[int, ...]
    blocks: tuple[Box, ...] | None = None
    span: tuple[int, int] | None = None
    group: ProcessGroup | None = field(default=None, compare=False)
    replicas: ProcessGroup | None = field(default=None, compare=False)
    device: torch.device | None = None

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.global_shape)
        object.__setattr__(self, "global_shape", shape)
        blocks = (whole(shape),) if self.blocks is None else self.blocks
        blocks = tuple(tuple((int(start), int(stop)) for start, stop in block) for block in blocks)
        for block in blocks:
            if len(block) != len(shape) or any(not 0 <= start <= stop <= size for (start, stop), size in zip(block, shape, strict=True)):
                raise ValueError(
                    f"block {block} does not lie in a parameter of shape {shape}: give one (start, stop) with "
                    "0 <= start <= stop <= size per dimension"
                )
        object.__setattr__(self, "blocks", blocks)
        total = fragment_numel(blocks)
        span = (0, total) if self.span is None else (int(self.span[0]), int(self.span[1]))
        if not 0 <= span[0] <= span[1] <= total:
            raise ValueError(f"span {span} does not lie in the {total} elements of the blocks: give 0 <= start <= stop <= {total}")
        object.__setattr__(self, "span", span)

    def fragment(self) -> Fragment:
        """The boxes that this rank stores, in storage order."""
        assert self.blocks is not None and self.span is not None  # set in __post_init__
        boxes: list[Box] = []
        before = 0
        for block in self.blocks:
            numel = box_numel(block)
            start, stop = max(self.span[0] - before, 0), min(self.span[1] - before, numel)
            if start < stop:
                for part in _flat_range(box_shape(block), start, stop):
                    boxes.append(tuple((o + a, o + b) for (o, _), (a, b) in zip(block, part, strict=True)))
            before += numel
        return tuple(boxes)


def _flat_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes of a row-major tensor that the flat range [start, stop) covers, in order: at most 2·ndim − 1."""
    if start == 0 and stop == math.prod(shape):
        return [whole(shape)]
    if len(shape) == 1:
        return [((start, stop),)]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)

    def part_of_row(row: int, a: int, b: int) -> list[Box]:
        return [((row, row + 1), *box) for box in _flat_range(shape[1:], a, b)]

    if first == last:
        return part_of_row(first, head, tail)
    boxes = part_of_row(first, head, inner) if head else []
    first += bool(head)
    if first < last:
        boxes.append(((first, last), *whole(shape[1:])))
    return boxes + (part_of_row(last, 0, tail) if tail else [])


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What every rank of a domain holds of one parameter: one fragment per rank, in the domain's order of ranks.

    `replicated` says that each rank holds the whole parameter as a plain tensor, so its owner may keep the momentum alone.
    """

    name: str
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    replicated: bool = False

    def pieces(self, box: Box) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        """The parts of `box` as they lie on the ranks: (part, positions of the ranks that hold it), without overlaps.

        Raises:
            ValueError: the fragments leave a hole in `box`, or overlap without being equal.
        """
        if self.replicated:
            return ((box, tuple(range(len(self.fragments)))),)
        holders: dict[Box, list[int]] = {}
        for rank, fragment in enumerate(self.fragments):
            for stored in fragment:
                part = intersect(stored, box)
                if part is not None:
                    holders.setdefault(part, []).append(rank)
        held = sum(map(box_numel, holders))
        if held != box_numel(box) or _overlap(list(holders)):
            raise ValueError(
                f"the fragments of {self.name} (shape {self.shape}) don't tile {box}: {held} of {box_numel(box)} elements are "
                "held, counting equal pieces once. Check the blocks and spans of its ShardLayouts on all ranks"
            )
        return tuple((part, tuple(ranks)) for part, ranks in holders.items())


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two boxes share an element. Compares each with its first neighbour, its second, …, by order of rows."""
    starts, stops = np.array(boxes).transpose(2, 0, 1)  # (boxes, dims) each
    order = np.argsort(starts[:, 0], kind="stable")
    starts, stops = starts[order], stops[order]
    for k in range(1, len(boxes)):
        near = starts[k:, 0] < stops[:-k, 0]
        if not near.any() and not (starts[k:, 0] < np.maximum.accumulate(stops[:, 0])[:-k]).any():
            return False
        if bool(((starts[k:] < stops[:-k]) & (starts[:-k] < stops[k:])).all(axis=1).any()):
            return True
    return False


def dtensor_fragments(tensor: DTensor, name: str) -> tuple[tuple[int, ...], tuple[Fragment, ...]]:
    """The ranks of a DTensor's mesh, ascending, and what each of them stores.

    Follows torch.chunk, as `Shard` does: the last ranks of a short dimension hold less or nothing. Replicas hold equal
    fragments.

    Raises:
        ValueError: a partial placement, or an order of strided shards that can't be resolved.
    """
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    sizes = tuple(mesh.mesh.shape)
    orders = _cut_orders(tensor.placements, sizes, name)
    fragments: dict[int, Fragment] = {}
    for coordinate in np.ndindex(*sizes):
        box = list(whole(shape))
        for dim, order in orders.items():
            for mesh_dim in order:
                start, stop = box[dim]
                chunk = -(-(stop - start) // sizes[mesh_dim])
                low = min(start + coordinate[mesh_dim] * chunk, stop)
                box[dim] = (low, min(low + chunk, stop))
        fragments[int(mesh.mesh[coordinate])] = (tuple(box),) if box_numel(tuple(box)) else ()
    ranks = tuple(sorted(fragments))
    here = fragments.get(torch.distributed.get_rank(), ())
    local_shape = tuple(tensor.to_local().shape)
    if fragment_numel(here) != math.prod(local_shape) or (here and box_shape(here[0]) != local_shape):
        raise ValueError(
            f"{name}: this rank holds a shard of shape {local_shape}, but its placements {tensor.placements} over a mesh of "
            f"{sizes} say {[box_shape(b) for b in here]}. Pass layouts={{{name!r}: ShardLayout(...)}} to say where it lies"
        )
    return ranks, tuple(fragments[rank] for rank in ranks)


def _cut_orders(placements: Sequence[Any], sizes: tuple[int, ...], name: str) -> dict[int, list[int]]:
    """For each sharded tensor dimension, the mesh dimensions that cut it, first cut first.

    Plain shards cut from left to right. `_StridedShard(split_factor=k)` cuts what k earlier pieces to its right have
    left: FSDP2 shards a tensor-parallel shard, although its mesh dimension comes first.
    """
    orders: dict[int, list[int]] = {}
    for mesh_dim in reversed(range(len(sizes))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, Partial):
            raise ValueError(
                f"{name} has a partial placement {placement}: its values are sums over ranks that nobody holds. Redistribute it "
                "to Shard or Replicate before it reaches the optimizer"
            )
        if _StridedShard is not None and isinstance(placement, _StridedShard):  # in older torch it is a Shard, too
            order = orders.setdefault(placement.dim, [])
            counts = np.cumprod([1] + [sizes[d] for d in order]).tolist()
            if placement.split_factor not in counts:
                raise ValueError(
                    f"{name}: {placement} asks for {placement.split_factor} earlier pieces, but the shards to its right make "
                    f"{counts}: the order of the cuts can't be resolved. Pass layouts={{{name!r}: ShardLayout(...)}}"
                )
            order.insert(len(counts) - 1 - counts[::-1].index(placement.split_factor), mesh_dim)
        elif isinstance(placement, Shard):
            orders.setdefault(placement.dim, []).insert(0, mesh_dim)
        else:
            raise ValueError(
                f"{name} has placement {placement!r}, which MuonDist does not know. Pass layouts={{{name!r}: ShardLayout(...)}}"
            )
    return orders


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank stores, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
