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
    """One piece on its way: the matrix and parameter it belongs to, and where it lies on this rank."""

    matrix: int
    parameter: int
    numel: int
    shape: tuple[int, ...]
    view: LocalView | None = None  # at a holder
    slot: Slot | None = None  # at the owner


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
            leg = Leg(i, task.parameter, box_numel(piece.box), box_shape(piece.box), view, slot)
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
    """A started all-to-all: its buffers, its Work handle, and the legs that arrive, each with its part of the buffer."""

    def __init__(
        self,
        lane: Lane,
        read: Callable[[Leg], Tensor],
        *,
        travels: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.arriving = lane.arriving
        self._work: dist.Work | None = None
        self._received = torch.empty(0, dtype=dtype, device=device)
        if not travels:
            return
        self._sent = torch.empty(sum(lane.out_splits), dtype=dtype, device=device)  # kept until the collective is done
        self._received = torch.empty(sum(lane.in_splits), dtype=dtype, device=device)
        copy([part.view(leg.shape) for leg, part in _parts(lane.leaving, self._sent)], [read(leg) for leg in lane.leaving])
        self._work = dist.all_to_all_single(self._received, self._sent, lane.in_splits, lane.out_splits, group=group, async_op=True)

    def wait(self) -> list[tuple[Leg, Tensor]]:
        """Wait for the collective; what arrived, as views of the receive buffer. The send buffer is let go."""
        if self._work is not None:
            self._work.wait()
            del self._sent
        self._work = None
        return [(leg, part.view(leg.shape)) for leg, part in _parts(self.arriving, self._received)]


class Exchange:
    """One rank's side of all buckets of a domain."""

    def __init__(self, routes: Sequence[BucketRoute], *, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.routes = tuple(routes)
        self._group = group
        self._device = device

    @record_function("muon_dist::start_gather")
    def start_gather(self, bucket: int, local: Callable[[int], Tensor]) -> Traffic:
        """Send this rank's pieces to their owners. `local(parameter)` is the tensor in which this rank stores its fragment."""
        route = self.routes[bucket]
        return self._start(route, route.gather, lambda leg: _viewed(leg, local), route.gathers)

    @record_function("muon_dist::finish_gather")
    def finish_gather(self, bucket: int, traffic: Traffic, local: Callable[[int], Tensor]) -> list[Tensor]:
        """The matrices this rank owns, (B, m, n) per batch, in the wire dtype also where nothing travelled."""
        route = self.routes[bucket]
        batches = [torch.empty(shape, dtype=route.wire, device=self._device) for shape in route.batch_shapes]
        arrived, matrices = traffic.wait(), [batch.unbind() for batch in batches]
        slots = [_slotted(leg, matrices) for leg, _ in arrived] + [_slotted(leg, matrices) for leg in route.stay]
        copy(slots, [part for _, part in arrived] + [_viewed(leg, local) for leg in route.stay])
        return batches

    @record_function("muon_dist::start_scatter")
    def start_scatter(self, bucket: int, batches: Sequence[Tensor]) -> Traffic:
        """Send the updates of the matrices this rank owns to all that hold a piece."""
        route, matrices = self.routes[bucket], [batch.unbind() for batch in batches]
        return self._start(route, route.scatter, lambda leg: _slotted(leg, matrices), route.scatters)

    def updates_at_home(self, bucket: int, batches: Sequence[Tensor]) -> list[tuple[Leg, Tensor]]:
        """The updates of pieces that this rank holds and owns, rounded as if they had travelled."""
        route = self.routes[bucket]
        matrices = [batch.to(route.wire).unbind() for batch in batches] if route.stay else []
        return [(leg, _slotted(leg, matrices)) for leg in route.stay]

    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks of the domain, in place; in fp32 at least. Collective."""
        if self._group is None:
            return
        whole = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        dist.all_reduce(whole, group=self._group)
        if whole is not tensor:
            tensor.copy_(whole)

    def _start(self, route: BucketRoute, lane: Lane, read: Callable[[Leg], Tensor], travels: bool) -> Traffic:
        return Traffic(lane, read, travels=travels, dtype=route.wire, device=self._device, group=self._group)


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _parts(legs: Sequence[Leg], buffer: Tensor) -> list[tuple[Leg, Tensor]]:
    return list(zip(legs, buffer.split([leg.numel for leg in legs]), strict=True)) if legs else []


def _viewed(leg: Leg, local: Callable[[int], Tensor]) -> Tensor:
    assert leg.view is not None  # only holders read
    return leg.view.of(local(leg.parameter))


def _slotted(leg: Leg, matrices: Sequence[Sequence[Tensor]]) -> Tensor:
    assert leg.slot is not None  # only owners write
    return leg.slot.of(matrices)
