"""The plan: which rank orthogonalises which matrix, in which bucket it travels, and what that costs.

Pure data from global metadata, so every rank computes the same plan without talking; ranks compare its digest when they
bind. Ranks are positions in a domain (0 … n−1), not global ranks. Costs are passed in: nothing here knows Newton–Schulz.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Box, Placement, box_numel

# What moving a byte costs in floating-point operations when owners are chosen: a rank that runs 400 TFLOP/s behind a
# 100 GB/s link does 4,000 of them in the time of one byte.
FLOPS_PER_BYTE = 4_000

# What starting one more pair of all-to-alls costs, in bytes on the wire: 40 µs at 100 GB/s.
START_BYTES = 4 * 2**20

# Work is no longer moved for balance once the busiest owner is within this factor of what can be reached.
EVEN_ENOUGH = 1.05


@dataclass(frozen=True, kw_only=True)
class MatrixTask:
    """One matrix to orthogonalise.

    Attributes:
        name: for reports.
        parameter: position of its parameter among the domain's placements.
        box: the matrix's place in the parameter.
        shape: (m, n) as stored; matrices of one shape and `batch_key` are orthogonalised together.
        flops: of its orthogonalisation.
        form: how it is orthogonalised, in words; for reports.
        workspace: bytes that its orthogonalisation needs beside input and output.
        wire: the dtype's name on the wire; a bucket carries one.
        wire_itemsize: its bytes per element.
    """

    name: str
    parameter: int
    box: Box
    shape: tuple[int, int]
    flops: int
    workspace: int
    wire: str
    wire_itemsize: int
    batch_key: Hashable = None
    form: str = ""

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def wire_bytes(self) -> int:
        return self.numel * self.wire_itemsize


@dataclass(frozen=True)
class Piece:
    """A part of a matrix as it lies on the ranks: its box, the rank whose copy the owner reads, and all that hold it."""

    box: Box
    source: int
    holders: tuple[int, ...]


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
    """

    flops: np.ndarray
    gather: np.ndarray
    scatter: np.ndarray
    owned: np.ndarray
    workspace: np.ndarray
    pieces: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Owners, pieces and buckets. `buckets` holds positions in `matrices`; every rank joins every bucket, in order."""

    placements: tuple[Placement, ...]
    matrices: tuple[MatrixTask, ...]
    owners: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    buckets: tuple[tuple[int, ...], ...]
    n_ranks: int

    def digest(self) -> str:
        """A hash of everything that ranks must agree on."""
        agreed = (self.n_ranks, self.placements, self.matrices, self.owners, self.buckets)
        return hashlib.sha256(repr(agreed).encode()).hexdigest()

    def gathers(self, bucket: int) -> bool:
        """Whether anything travels to the owners in this bucket."""
        return any(p.source != self.owners[i] for i in self.buckets[bucket] for p in self.pieces[i])

    def scatters(self, bucket: int) -> bool:
        """Whether any update travels back in this bucket."""
        return any(h != self.owners[i] for i in self.buckets[bucket] for p in self.pieces[i] for h in p.holders)

    def bucket_loads(self) -> BucketLoads:
        """The work of every bucket on every rank."""
        shape = (len(self.buckets), self.n_ranks)
        flops, owned, workspace, pieces = (np.zeros(shape, np.int64) for _ in range(4))
        gather, scatter = np.zeros((shape[0], 2, shape[1]), np.int64), np.zeros((shape[0], 2, shape[1]), np.int64)
        memo: dict[int, np.ndarray | None] = {}
        for b, bucket in enumerate(self.buckets):
            batches: dict[tuple[int, Hashable], int] = {}
            for i in bucket:
                task, owner = self.matrices[i], self.owners[i]
                flops[b, owner] += task.flops
                owned[b, owner] += task.wire_bytes
                key = (owner, (task.shape, task.batch_key))
                batches[key] = batches.get(key, 0) + task.workspace
                held = _held_alone(self.pieces[i], self.n_ranks, memo)
                if held is not None:
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
        return BucketLoads(flops=flops, gather=gather, scatter=scatter, owned=owned, workspace=workspace, pieces=pieces)

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
        sent, received = (work.gather[:, k].sum(0) + work.scatter[:, k].sum(0) for k in (0, 1))
        return [
            RankLoad(flops=int(flops[r]), bytes_sent=int(sent[r]), bytes_received=int(received[r]), peak_bytes=int(peak[r]))
            for r in range(n)
        ]

    def imbalance(self) -> float:
        """The busiest owner's FLOPs over the mean of all ranks; 1 is even."""
        return _over_mean(np.bincount(self.owners, [t.flops for t in self.matrices], self.n_ranks).max(initial=0), self)

    def imbalance_lower_bound(self) -> float:
        """What no choice of owners can beat: the costliest single piece of work over the mean, and at least 1."""
        units = [sum(self.matrices[i].flops for i in unit) for unit in _units(self.placements, self.matrices)]
        return max(1.0, _over_mean(max(units, default=0), self))


def _over_mean(flops: float, plan: Plan) -> float:
    total = sum(task.flops for task in plan.matrices)
    return float(flops) * plan.n_ranks / total if total else 1.0


def make_plan(placements: Sequence[Placement], matrices: Sequence[MatrixTask], *, n_ranks: int, bucket_bytes: int) -> Plan:
    """Choose an owner for every matrix and cut the work into buckets.

    Owners: a matrix goes to the rank that holds most of it; one that no rank holds more of than others, costliest first, to
    the rank that would be done first. Then matrices leave the busiest rank while that shortens the step, where the step
    counts FLOPs and the bytes that have to travel. The matrices of a replicated parameter stay together, since its momentum
    lives whole with its owner.

    Buckets: each owner's matrices, largest shapes first and equal shapes side by side, are cut where one rank would
    receive more than `bucket_bytes`, or more than `_cut_bytes` finds worth waiting for; bucket k joins the k-th cut of every owner, so
    all owners work at the same time. A matrix larger than that is a cut of its own.
    """
    all_pieces = _pieces_of(placements, matrices)
    owners = _choose_owners(placements, matrices, all_pieces, n_ranks)
    sent = np.zeros(n_ranks, np.int64)
    pieces = []
    for task, owner, parts in zip(matrices, owners, all_pieces, strict=True):
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
    buckets = _cut_buckets(matrices, owners, min(bucket_bytes, _cut_bytes(matrices, owners)) if n_ranks > 1 else bucket_bytes)
    return Plan(
        placements=tuple(placements),
        matrices=tuple(matrices),
        owners=tuple(owners),
        pieces=tuple(pieces),
        buckets=buckets,
        n_ranks=n_ranks,
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


def _held_alone(pieces: tuple[Piece, ...], n_ranks: int, memo: dict[int, np.ndarray | None]) -> np.ndarray | None:
    """Elements per rank where every piece has one holder, else None."""
    if id(pieces) not in memo:
        alone = all(len(piece.holders) == 1 for piece in pieces)
        sizes = [box_numel(piece.box) for piece in pieces]
        memo[id(pieces)] = np.bincount([p.source for p in pieces], sizes, n_ranks).astype(np.int64) if alone else None
    return memo[id(pieces)]


def _units(placements: Sequence[Placement], matrices: Sequence[MatrixTask]) -> list[list[int]]:
    """Matrices that must share an owner: those of one replicated parameter; every other matrix is by itself."""
    units: dict[tuple[int, int], list[int]] = {}
    for i, task in enumerate(matrices):
        key = (task.parameter, -1 if placements[task.parameter].replicated else i)
        units.setdefault(key, []).append(i)
    return list(units.values())


def _choose_owners(
    placements: Sequence[Placement],
    matrices: Sequence[MatrixTask],
    pieces: Sequence[tuple[Piece, ...]],
    n_ranks: int,
) -> list[int]:
    units = sorted(_units(placements, matrices), key=lambda u: (-sum(matrices[i].flops for i in u), matrices[u[0]].name, u[0]))
    memo: dict[int, np.ndarray | None] = {}
    work = np.array([sum(matrices[i].flops for i in unit) for unit in units], float)
    missing = np.array([_missing_bytes(unit, placements, matrices, pieces, n_ranks, memo) for unit in units]).reshape(len(units), n_ranks)
    cost = work[:, None] + FLOPS_PER_BYTE * missing  # of a unit on a rank

    owner_of = np.full(len(units), -1)
    load = np.zeros(n_ranks)
    has_home = missing.min(axis=1, initial=np.inf) < missing.mean(axis=1) if len(units) else np.zeros(0, bool)
    for u in np.flatnonzero(has_home):
        home = np.flatnonzero(missing[u] == missing[u].min())
        owner_of[u] = home[np.argmin(load[home])]
        load[owner_of[u]] += cost[u, owner_of[u]]
    for u in np.flatnonzero(~has_home):
        owner_of[u] = np.argmin(load + cost[u])
        load[owner_of[u]] += cost[u, owner_of[u]]

    even = EVEN_ENOUGH * max(work.sum() / n_ranks, work.max(initial=0.0))
    for _ in range(4 * len(units)):  # relieve the busiest rank while that pays for the way
        busiest = int(np.argmax(load))
        own = np.flatnonzero(owner_of == busiest)
        if work[own].sum() <= even:
            break
        step = min(_best_move(own, busiest, load, cost), _best_swap(own, busiest, load, cost, owner_of))
        if step[0] >= load[busiest]:
            break
        _, away, to, back = step
        for moved, origin, goal in ((away, busiest, to), (back, to, busiest)):
            if moved >= 0:
                load[origin] -= cost[moved, origin]
                load[goal] += cost[moved, goal]
                owner_of[moved] = goal

    owners = [0] * len(matrices)
    for unit, owner in zip(units, owner_of, strict=True):
        for i in unit:
            owners[i] = int(owner)
    return owners


Relief = tuple[float, int, int, int]  # the later of two ranks' ends; the unit that leaves the busiest, where to, and what comes back or -1


def _best_move(own: np.ndarray, busiest: int, load: np.ndarray, cost: np.ndarray) -> Relief:
    """Of the busiest rank's units, the one to move away, and where to."""
    target = np.argmin(load + cost[own], axis=1)
    after = np.maximum(load[busiest] - cost[own, busiest], load[target] + cost[own, target])
    best = int(np.argmin(after))
    return float(after[best]), int(own[best]), int(target[best]), -1


def _best_swap(own: np.ndarray, busiest: int, load: np.ndarray, cost: np.ndarray, owner_of: np.ndarray) -> Relief:
    """Of the busiest rank's units, the one to swap for another rank's, and that one."""
    others = np.flatnonzero(owner_of != busiest)
    if not others.size:
        return math.inf, -1, -1, -1
    at = owner_of[others]
    here = load[busiest] - cost[own, busiest][:, None] + cost[others, busiest][None, :]
    there = (load[at] - cost[others, at])[None, :] + cost[np.ix_(own, at)]
    after = np.maximum(here, there)
    u, v = divmod(int(np.argmin(after)), len(others))
    return float(after[u, v]), int(own[u]), int(at[v]), int(others[v])


def _missing_bytes(
    unit: Sequence[int],
    placements: Sequence[Placement],
    matrices: Sequence[MatrixTask],
    pieces: Sequence[tuple[Piece, ...]],
    n_ranks: int,
    memo: dict[int, np.ndarray | None],
) -> np.ndarray:
    """What would travel if a rank owned the unit, for each rank: the bytes it doesn't hold come in, and their update goes out."""
    missing = np.zeros(n_ranks)
    for i in unit:
        task = matrices[i]
        if placements[task.parameter].replicated:
            continue
        missing += 2 * task.wire_bytes
        held = _held_alone(pieces[i], n_ranks, memo)
        if held is not None:
            missing -= 2 * held * task.wire_itemsize
            continue
        for piece in pieces[i]:
            missing[list(piece.holders)] -= 2 * box_numel(piece.box) * task.wire_itemsize
    return missing


def _cut_bytes(matrices: Sequence[MatrixTask], owners: Sequence[int]) -> int:
    """How much an owner should gather at a time, so that a step waits least.

    Nothing hides the first gather and the last scatter. In k cuts of B bytes these take 2B/k; every cut costs START_BYTES; the sum is
    least at k = √(2B / START_BYTES).
    """
    owned = np.bincount(owners, [task.wire_bytes for task in matrices]).max(initial=0.0)
    cuts = max(1, round(math.sqrt(2 * owned / START_BYTES)))
    return max(1, math.ceil(owned / cuts))


def _cut_buckets(matrices: Sequence[MatrixTask], owners: Sequence[int], bucket_bytes: int) -> tuple[tuple[int, ...], ...]:
    order = sorted(range(len(matrices)), key=lambda i: (-matrices[i].numel, matrices[i].shape, repr(matrices[i].batch_key), i))
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
