"""The exchange: pieces travel to the owners, updates travel back. One all_to_all_single each way per bucket.

`BucketRoute` is the plan as one rank sees it, worked out once. `Exchange` owns every buffer and every Work handle: what was
started must be waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from .layout import Box, Fragment, box_numel, box_shape
from .plan import Plan
from .slicing import Slicing
from .tasks import SLICED

DTYPE_OF_WIRE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class LocalView:
    """A piece as a view of the tensor in which a rank stores its fragment.

    A fragment of one box is stored in that box's shape, whatever its strides; several boxes are stored flat, one after the
    other, and `flat` names the (offset, shape) of the one that the piece lies in.
    """

    flat: tuple[int, tuple[int, ...]] | None
    slices: tuple[slice, ...] | None  # None: all of it

    @property
    def whole(self) -> bool:
        """Whether it is all of that tensor, as it is."""
        return self.flat is None and self.slices is None

    def of(self, local: Tensor) -> Tensor:
        if self.flat is not None:
            offset, shape = self.flat
            local = local.view(-1)[offset : offset + math.prod(shape)].view(shape)
        return local if self.slices is None else local[self.slices]


def local_view(fragment: Fragment, piece: Box, stored_as_box: bool) -> LocalView:
    """Where `piece` lies in the tensor of a rank that stores `fragment`."""
    offset = 0
    for box in fragment:
        if all(a <= c and d <= b for (a, b), (c, d) in zip(box, piece, strict=True)):
            return LocalView(None if stored_as_box else (offset, box_shape(box)), _inside(box, piece))
        offset += box_numel(box)
    raise ValueError(f"piece {piece} does not lie in one box of the fragment {fragment}")


def _inside(box: Box, piece: Box) -> tuple[slice, ...] | None:
    """A piece's place in a box; None where it is all of it."""
    return None if box == piece else tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(box, piece, strict=True))


@dataclass(frozen=True)
class Slot:
    """A piece's place in an owner's batches: which batch, which matrix in it, and the part of that matrix."""

    batch: int
    index: int
    shape: tuple[int, ...] | None  # of its box in the parameter, such as (1, m, n) for an expert; None: as it is, (m, n)
    slices: tuple[slice, ...] | None  # None: all of it

    def of(self, batches: Sequence[Sequence[Tensor]]) -> Tensor:
        """Its part of batches that were unbound into matrices."""
        matrix = batches[self.batch][self.index]
        if self.shape is not None:
            matrix = matrix.reshape(self.shape)
        return matrix if self.slices is None else matrix[self.slices]


@dataclass(frozen=True)
class Leg:
    """One piece on its way: the matrix and parameter it belongs to, and where it lies on this rank.

    `counts`: this rank stands for all that hold the piece, where each is to be counted once.
    """

    matrix: int
    parameter: int
    numel: int
    shape: tuple[int, ...]
    view: LocalView | None = None  # at a holder
    slot: Slot | None = None  # at the owner
    counts: bool = False


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One all-to-all as one rank takes part in it: what leaves and what arrives, and the elements for and from every peer."""

    leaving: tuple[Leg, ...]
    arriving: tuple[Leg, ...]
    out_splits: list[int]
    in_splits: list[int]

    @classmethod
    def of(cls, out: Sequence[Sequence[Leg]], into: Sequence[Sequence[Leg]]) -> Lane:
        out_splits, in_splits = ([sum(leg.numel for leg in legs) for legs in peers] for peers in (out, into))
        return cls(
            leaving=tuple(leg for legs in out for leg in legs),
            arriving=tuple(leg for legs in into for leg in legs),
            out_splits=out_splits,
            in_splits=in_splits,
        )

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Elements of what leaves and of what arrives, leg by leg."""
        return [leg.numel for leg in self.leaving], [leg.numel for leg in self.arriving]

    @cached_property
    def shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        return [leg.shape for leg in self.leaving], [leg.shape for leg in self.arriving]


@dataclass(frozen=True, kw_only=True)
class BucketRoute:
    """One bucket as one rank sees it. Lists by peer are in the order of the wire, the same on both ends."""

    batches: tuple[tuple[int, ...], ...]  # the matrices that this rank orthogonalises, each tuple as one batch
    batch_shapes: tuple[tuple[int, int, int], ...]
    slicings: tuple[Slicing | None, ...]  # of each batch, whose matrices are slices then
    wire: torch.dtype
    gathers: bool
    scatters: bool
    gather_out: tuple[tuple[Leg, ...], ...]
    gather_in: tuple[tuple[Leg, ...], ...]
    stay: tuple[Leg, ...]  # pieces that this rank holds and owns: they never travel
    scatter_out: tuple[tuple[Leg, ...], ...]
    scatter_in: tuple[tuple[Leg, ...], ...]

    @cached_property
    def gather(self) -> Lane:
        return Lane.of(self.gather_out, self.gather_in)

    @cached_property
    def scatter(self) -> Lane:
        return Lane.of(self.scatter_out, self.scatter_in)

    # the views and slots of legs, as the step meets them
    @cached_property
    def gather_views(self) -> list[tuple[int, LocalView | None]]:
        return _views(self.gather.leaving)

    @cached_property
    def stay_views(self) -> list[tuple[int, LocalView | None]]:
        return _views(self.stay)

    @cached_property
    def filled(self) -> list[Slot]:
        """Of what arrives at this owner, and of what stays there."""
        return _slots((*self.gather.arriving, *self.stay))

    @cached_property
    def scatter_slots(self) -> list[Slot]:
        return _slots(self.scatter.leaving)

    @cached_property
    def stay_slots(self) -> list[Slot]:
        return _slots(self.stay)


def route_bucket(plan: Plan, bucket: int, me: int, stored_as_box: Callable[[int], bool], batch_keys: Sequence[Hashable]) -> BucketRoute:
    """The part that rank `me` takes in a bucket.

    `stored_as_box(parameter)`: its local tensor has its fragment's one box as shape. Matrices of one shape and `batch_keys` entry
    are one batch; that is this rank's own affair, and what travels doesn't depend on it.
    """
    indices = plan.buckets[bucket]
    grouped: dict[Hashable, list[int]] = {}
    for i in indices:
        if plan.owners[i] in (me, SLICED):
            grouped.setdefault((plan.matrices[i].shape, plan.slicings[i], batch_keys[i]), []).append(i)
    batches = tuple(map(tuple, grouped.values()))
    place = {i: (b, k) for b, batch in enumerate(batches) for k, i in enumerate(batch)}

    def per_peer() -> list[list[Leg]]:
        return [[] for _ in range(plan.n_ranks)]

    gather_out, gather_in, scatter_out, scatter_in = per_peer(), per_peer(), per_peer(), per_peer()
    stay: list[Leg] = []
    for i in indices:
        task = plan.matrices[i]
        fragment, own = plan.placements[task.parameter].fragments[me], plan.part_of(i, me)
        for piece in plan.pieces[i]:
            owner = plan.worker(i, piece)
            if owner != me and me not in piece.holders:
                continue
            view = local_view(fragment, piece.box, stored_as_box(task.parameter)) if me in piece.holders else None
            slot = None
            if owner == me:
                shape = box_shape(own)
                slot = Slot(*place[i], None if shape == plan.shape_of_part(i, me) else shape, _inside(own, piece.box))
            leg = Leg(i, task.parameter, box_numel(piece.box), box_shape(piece.box), view, slot, counts=piece.source == me)
            if owner == me:
                (stay if piece.source == me else gather_in[piece.source]).append(leg)
                for holder in piece.holders:
                    if holder != me:
                        scatter_out[holder].append(leg)
            else:
                if piece.source == me:
                    gather_out[owner].append(leg)
                scatter_in[owner].append(leg)
    frozen = [tuple(map(tuple, legs)) for legs in (gather_out, gather_in, scatter_out, scatter_in)]
    return BucketRoute(
        batches=batches,
        batch_shapes=tuple((len(batch), *plan.shape_of_part(batch[0], me)) for batch in batches),
        slicings=tuple(plan.slicings[batch[0]] for batch in batches),
        wire=DTYPE_OF_WIRE[plan.matrices[indices[0]].wire],
        gathers=plan.gathers(bucket),
        scatters=plan.scatters(bucket),
        gather_out=frozen[0],
        gather_in=frozen[1],
        stay=tuple(stay),
        scatter_out=frozen[2],
        scatter_in=frozen[3],
    )


class Traffic:
    """A started all-to-all: its buffers and its Work handle."""

    def __init__(self, lane: Lane, sources: list[Tensor], *, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
        self._lane = lane
        self._sent = torch.empty(sum(lane.out_splits), dtype=dtype, device=device)  # kept until the collective is done
        self._received = torch.empty(sum(lane.in_splits), dtype=dtype, device=device)
        copy(_parts(self._sent, lane.sizes[0], lane.shapes[0]), sources)
        self._work = dist.all_to_all_single(self._received, self._sent, lane.in_splits, lane.out_splits, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """Wait for the collective; what arrived, leg by leg, as views of the receive buffer. The send buffer is let go."""
        self._work.wait()
        del self._sent
        return _parts(self._received, self._lane.sizes[1], self._lane.shapes[1])


class Exchange:
    """One rank's side of what travels in a domain. Every piece of a bucket keeps its place in the lists of its route."""

    def __init__(self, *, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device

    @record_function("muon_dist::start_gather")
    def start_gather(self, route: BucketRoute, local: Sequence[Tensor]) -> Traffic | None:
        """Send this rank's pieces to their owners. `local` has, by parameter, what this rank stores, where a piece of it is sent."""
        return self._start(route, route.gather, _viewed(route.gather_views, local)) if route.gathers else None

    @record_function("muon_dist::finish_gather")
    def finish_gather(self, route: BucketRoute, traffic: Traffic | None, local: Sequence[Tensor]) -> list[Tensor]:
        """The matrices this rank owns, (B, m, n) per batch, in the wire dtype also where nothing travelled."""
        batches = [torch.empty(shape, dtype=route.wire, device=self._device) for shape in route.batch_shapes]
        arrived = [] if traffic is None else traffic.wait()
        copy(_slotted(route.filled, batches), arrived + _viewed(route.stay_views, local))
        return batches

    @record_function("muon_dist::start_scatter")
    def start_scatter(self, route: BucketRoute, batches: Sequence[Tensor]) -> Traffic | None:
        """Send the updates of the matrices this rank owns to all that hold a piece."""
        return self._start(route, route.scatter, _slotted(route.scatter_slots, batches)) if route.scatters else None

    def updates_at_home(self, route: BucketRoute, batches: Sequence[Tensor]) -> list[Tensor]:
        """The updates of pieces that this rank holds and owns, rounded as if they had travelled."""
        return _slotted(route.stay_slots, [batch.to(route.wire) for batch in batches]) if route.stay else []

    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks of the domain, in place; in fp32 at least. Collective."""
        if self._group is None:
            return
        whole = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        dist.all_reduce(whole, group=self._group)
        if whole is not tensor:
            tensor.copy_(whole)

    def _start(self, route: BucketRoute, lane: Lane, sources: list[Tensor]) -> Traffic:
        assert self._group is not None  # one rank sends nothing
        return Traffic(lane, sources, dtype=route.wire, device=self._device, group=self._group)


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _parts(buffer: Tensor, sizes: list[int], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True)] if sizes else []


def _views(legs: Sequence[Leg]) -> list[tuple[int, LocalView | None]]:
    """Of pieces that this rank holds: the parameter, and where in its tensor; None for all of it."""
    return [(leg.parameter, None if leg.view is None or leg.view.whole else leg.view) for leg in legs]


def _slots(legs: Sequence[Leg]) -> list[Slot]:
    slots = [leg.slot for leg in legs if leg.slot is not None]
    assert len(slots) == len(legs)  # of an owner's pieces
    return slots


def _viewed(views: Sequence[tuple[int, LocalView | None]], local: Sequence[Tensor]) -> list[Tensor]:
    return [local[parameter] if view is None else view.of(local[parameter]) for parameter, view in views]


def _slotted(slots: Sequence[Slot], batches: Sequence[Tensor]) -> list[Tensor]:
    matrices = [batch.unbind() for batch in batches]
    return [slot.of(matrices) for slot in slots]
