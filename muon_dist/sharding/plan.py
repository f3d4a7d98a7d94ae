"""The plan: which rank orthogonalises which matrix, in which bucket it travels, and what that costs.

Pure data from global metadata, so every rank computes the same plan without talking; ranks compare its digest when they
bind. Ranks are positions in a domain (0 … n−1), not global ranks. Costs are passed in: nothing here knows Newton–Schulz.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Box, Placement, box_numel
from .owners import choose, units_of
from .slicing import Slicing, sliced_pieces
from .tasks import SLICED, MatrixTask, Piece, held_alone

# What starting one more pair of all-to-alls costs, in bytes on the wire: 40 µs at 100 GB/s.
START_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one step asks of a rank: FLOPs, bytes sent and received on the wire, and the peak of its temporary memory."""

    flops: int
    bytes_sent: int
    bytes_received: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class BucketLoads:
    """What every bucket asks of every rank, as arrays of (buckets, ranks).

    Attributes:
        flops: of the matrices that a rank owns.
        gather, scatter: (buckets, 2, ranks): bytes sent, bytes received.
        owned: bytes of the matrices that a rank owns, as they travel.
        workspace: bytes that its largest batch needs beside.
        pieces: that it sends, receives or keeps at home, counted where each is read and where it is written.
        added_up: (buckets,): bytes of Gram matrices that are added up over all ranks.
    """

    flops: np.ndarray
    gather: np.ndarray
    scatter: np.ndarray
    owned: np.ndarray
    workspace: np.ndarray
    pieces: np.ndarray
    added_up: np.ndarray

    def sent_and_received(self) -> tuple[np.ndarray, np.ndarray]:
        """(ranks,) each: bytes of all buckets, all-reduces included."""
        n = self.flops.shape[1]
        round_trip = int(self.added_up.sum()) * 2 * (n - 1) // n
        sent, received = (self.gather[:, k].sum(0) + self.scatter[:, k].sum(0) + round_trip for k in (0, 1))
        return sent, received


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Owners, pieces and buckets. `buckets` holds positions in `matrices`; every rank joins every bucket, in order.

    A matrix is owned by one rank, or it is sliced: `owners` says SLICED, `slicings` how, and its pieces who works on them.
    """

    placements: tuple[Placement, ...]
    matrices: tuple[MatrixTask, ...]
    owners: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    buckets: tuple[tuple[int, ...], ...]
    n_ranks: int
    slicings: tuple[Slicing | None, ...]

    def part_of(self, matrix: int, rank: int) -> Box:
        """What a rank works on, if it is the owner or the matrix is sliced."""
        task, slicing = self.matrices[matrix], self.slicings[matrix]
        return task.box if slicing is None else slicing.part(task.box, rank)

    def shape_of_part(self, matrix: int, rank: int) -> tuple[int, int]:
        """That part as rows × cols."""
        shape, slicing = self.matrices[matrix].shape, self.slicings[matrix]
        if slicing is None:
            return shape
        lines = int(slicing.extents[rank])
        return (lines, shape[1]) if slicing.dim == 0 else (shape[0], lines)

    def worker(self, matrix: int, piece: Piece) -> int:
        """The rank that works on a piece of a matrix."""
        return self.owners[matrix] if self.slicings[matrix] is None else piece.owner

    def digest(self) -> str:
        """A hash of everything that ranks must agree on."""
        agreed = (self.n_ranks, self.placements, self.matrices, self.owners, self.slicings, self.buckets)
        return hashlib.sha256(repr(agreed).encode()).hexdigest()

    def gathers(self, bucket: int) -> bool:
        """Whether anything travels to the owners in this bucket."""
        return any(p.source != self.worker(i, p) for i in self.buckets[bucket] for p in self.pieces[i])

    def scatters(self, bucket: int) -> bool:
        """Whether any update travels back in this bucket."""
        return any(h != self.worker(i, p) for i in self.buckets[bucket] for p in self.pieces[i] for h in p.holders)

    def bucket_loads(self) -> BucketLoads:
        """The work of every bucket on every rank."""
        shape = (len(self.buckets), self.n_ranks)
        flops, owned, workspace, pieces = (np.zeros(shape, np.int64) for _ in range(4))
        gather, scatter = np.zeros((shape[0], 2, shape[1]), np.int64), np.zeros((shape[0], 2, shape[1]), np.int64)
        added_up = np.zeros(shape[0], np.int64)
        memo: dict[int, np.ndarray | None] = {}
        for b, bucket in enumerate(self.buckets):
            batches: dict[tuple[int, Hashable], int] = {}
            for i in bucket:
                task, owner, slicing = self.matrices[i], self.owners[i], self.slicings[i]
                if slicing is None:
                    flops[b, owner] += task.flops
                    owned[b, owner] += task.wire_bytes
                    key = (owner, (task.shape, task.batch_key))
                    batches[key] = batches.get(key, 0) + task.workspace
                else:
                    assert task.sliced is not None
                    size_of_slice = slicing.extents * (task.wire_bytes // max(task.shape))
                    flops[b] += task.sliced.flops(slicing.extents)
                    owned[b] += size_of_slice
                    workspace[b] = np.maximum(workspace[b], size_of_slice + task.sliced.workspace)
                    added_up[b] += task.sliced.added_up
                held = held_alone(self.pieces[i], self.n_ranks, memo)
                if held is not None and slicing is None:
                    away = held * task.wire_itemsize
                    away[owner] = 0
                    gather[b, 0] += away
                    gather[b, 1, owner] += away.sum()
                    scatter[b, 0, owner] += away.sum()
                    scatter[b, 1] += away
                    pieces[b] += held > 0
                    pieces[b, owner] += len(self.pieces[i])
                    continue
                for piece in self.pieces[i]:
                    owner = self.worker(i, piece)
                    size = box_numel(piece.box) * task.wire_itemsize
                    if piece.source != owner:
                        gather[b, 0, piece.source] += size
                        gather[b, 1, owner] += size
                    others = np.array([h for h in piece.holders if h != owner], np.int64)
                    scatter[b, 0, owner] += size * len(others)
                    scatter[b, 1, others] += size
                    pieces[b, list(piece.holders)] += 1
                    pieces[b, owner] += len(piece.holders)
            for (owner, _), size in batches.items():
                workspace[b, owner] = max(workspace[b, owner], size)
        return BucketLoads(flops=flops, gather=gather, scatter=scatter, owned=owned, workspace=workspace, pieces=pieces, added_up=added_up)

    def loads(self) -> list[RankLoad]:
        """The cost of one step on every rank.

        The peak counts, in the worst bucket, the wire buffers of its gather and scatter, those of the next gather and
        the last scatter (which travel meanwhile), the matrices that are orthogonalised with their results, and the
        workspace of the largest batch.
        """
        n, work = self.n_ranks, self.bucket_loads()
        nothing = np.zeros(n, np.int64)
        peak = nothing
        gather, scatter = work.gather.sum(1), work.scatter.sum(1)
        for b in range(len(self.buckets)):
            beside = (gather[b + 1] if b + 1 < len(self.buckets) else nothing) + (scatter[b - 1] if b else nothing)
            peak = np.maximum(peak, beside + np.maximum(gather[b], scatter[b]) + work.owned[b] + work.workspace[b])
        flops = work.flops.sum(0)
        sent, received = work.sent_and_received()
        return [
            RankLoad(flops=int(flops[r]), bytes_sent=int(sent[r]), bytes_received=int(received[r]), peak_bytes=int(peak[r]))
            for r in range(n)
        ]

    def imbalance(self) -> float:
        """The busiest rank's FLOPs over the mean of all ranks; 1 is even."""
        work = self._flops()
        return float(work.max(initial=0.0)) * self.n_ranks / float(work.sum()) if work.any() else 1.0

    def imbalance_lower_bound(self) -> float:
        """What no choice of owners can beat: the costliest single piece of work over the mean, and at least 1."""
        owned = [i for i, owner in enumerate(self.owners) if owner != SLICED]
        largest = max((sum(self.matrices[i].flops for i in unit) for unit in units_of(self.placements, self.matrices, owned)), default=0)
        total = float(self._flops().sum())
        return max(1.0, largest * self.n_ranks / total) if total else 1.0

    def _flops(self) -> np.ndarray:
        """(ranks,): FLOPs of a step."""
        own = [(owner, task.flops) for owner, task in zip(self.owners, self.matrices, strict=True) if owner != SLICED]
        work = np.bincount([owner for owner, _ in own], [flops for _, flops in own], self.n_ranks)
        for task, slicing in zip(self.matrices, self.slicings, strict=True):
            if slicing is not None and task.sliced is not None:
                work = work + task.sliced.flops(slicing.extents)
        return work


def make_plan(
    placements: Sequence[Placement], matrices: Sequence[MatrixTask], *, n_ranks: int, bucket_bytes: int, placement: str = "owner"
) -> Plan:
    """Choose an owner for every matrix and cut the work into buckets.

    Owners: a matrix goes to the rank that holds most of it; one that no rank holds more of than others, costliest first, to
    the rank that would be done first. Then matrices leave the busiest rank while that shortens the step, where the step
    counts FLOPs and the bytes that have to travel. The matrices of a replicated parameter stay together, since its momentum
    lives whole with its owner.

    Buckets: each owner's matrices, largest shapes first and equal shapes side by side, are cut where one rank would
    receive more than `bucket_bytes`, or more than `_cut_bytes` finds worth waiting for; bucket k joins the k-th cut of every owner, so
    all owners work at the same time. A matrix larger than that is a cut of its own. Sliced matrices come last, in buckets of their own.

    `placement`: see `owners.choose`.
    """
    all_pieces = _pieces_of(placements, matrices)
    owners, slicings = choose(placements, matrices, all_pieces, n_ranks, placement)
    memo: dict[tuple[int, Box], tuple[Piece, ...]] = {}
    sent = np.zeros(n_ranks, np.int64)
    pieces = []
    for task, owner, parts, slicing in zip(matrices, owners, all_pieces, slicings, strict=True):
        if slicing is not None:
            key = (id(parts), task.box)
            if key not in memo:
                memo[key] = sliced_pieces(parts, slicing, task.box)
            pieces.append(memo[key])
            continue
        if all(len(piece.holders) == 1 for piece in parts):
            pieces.append(parts)
            continue
        own = []
        for piece in parts:  # the owner's own copy, else that of the rank which has sent least
            source = owner if owner in piece.holders else min(piece.holders, key=lambda r: (sent[r], r))
            if source != owner:
                sent[source] += box_numel(piece.box) * task.wire_itemsize
            own.append(Piece(piece.box, source, piece.holders))
        pieces.append(tuple(own))
    most = min(bucket_bytes, _cut_bytes(matrices, owners)) if n_ranks > 1 else bucket_bytes
    buckets = _cut_buckets(matrices, owners, most) + _cut_sliced(matrices, slicings, bucket_bytes, n_ranks)
    return Plan(
        placements=tuple(placements),
        matrices=tuple(matrices),
        owners=tuple(owners),
        pieces=tuple(pieces),
        buckets=buckets,
        n_ranks=n_ranks,
        slicings=tuple(slicings),
    )


def _pieces_of(placements: Sequence[Placement], matrices: Sequence[MatrixTask]) -> list[tuple[Piece, ...]]:
    """The pieces of every matrix, each with its first holder as source. Layers that lie alike share them."""
    memo: dict[tuple[int, Box], tuple[Piece, ...]] = {}
    result = []
    for task in matrices:
        placement = placements[task.parameter]
        key = (id(placement.fragments), task.box)
        if key not in memo:
            memo[key] = tuple(Piece(box, holders[0], holders) for box, holders in placement.pieces(task.box))
        result.append(memo[key])
    return result


def _cut_bytes(matrices: Sequence[MatrixTask], owners: Sequence[int]) -> int:
    """How much an owner should gather at a time, so that a step waits least.

    Nothing hides the first gather and the last scatter. In k cuts of B bytes these take 2B/k; every cut costs START_BYTES; the sum is
    least at k = √(2B / START_BYTES).
    """
    own = [(owner, task.wire_bytes) for owner, task in zip(owners, matrices, strict=True) if owner != SLICED]
    owned = np.bincount([owner for owner, _ in own], [size for _, size in own]).max(initial=0.0)
    cuts = max(1, round(math.sqrt(2 * owned / START_BYTES)))
    return max(1, math.ceil(owned / cuts))


def _largest_first(matrices: Sequence[MatrixTask], among: Iterable[int]) -> list[int]:
    return sorted(among, key=lambda i: (-matrices[i].numel, matrices[i].shape, repr(matrices[i].batch_key), i))


def _cut_sliced(
    matrices: Sequence[MatrixTask], slicings: Sequence[Slicing | None], bucket_bytes: int, n_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """Buckets of sliced matrices, cut where a rank's slices are more than `bucket_bytes`."""
    buckets: list[list[int]] = []
    size, wire = 0, ""
    for i in sorted(_largest_first(matrices, (i for i, s in enumerate(slicings) if s is not None)), key=lambda i: matrices[i].wire):
        part = matrices[i].wire_bytes // n_ranks
        if not buckets or size + part > bucket_bytes or matrices[i].wire != wire:
            buckets.append([])
            size, wire = 0, matrices[i].wire
        buckets[-1].append(i)
        size += part
    return tuple(map(tuple, buckets))


def _cut_buckets(matrices: Sequence[MatrixTask], owners: Sequence[int], bucket_bytes: int) -> tuple[tuple[int, ...], ...]:
    order = _largest_first(matrices, (i for i, owner in enumerate(owners) if owner != SLICED))
    buckets: dict[tuple[str, int], list[int]] = {}
    filled: dict[tuple[str, int], tuple[int, int]] = {}  # (wire dtype, owner) -> (its current cut, bytes in it)
    for i in order:
        task = matrices[i]
        cut, size = filled.get((task.wire, owners[i]), (0, 0))
        if size and size + task.wire_bytes > bucket_bytes:
            cut, size = cut + 1, 0
        filled[(task.wire, owners[i])] = (cut, size + task.wire_bytes)
        buckets.setdefault((task.wire, cut), []).append(i)
    return tuple(tuple(buckets[key]) for key in sorted(buckets))
