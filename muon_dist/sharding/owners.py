"""Who works on which matrix: owners by cost, or all ranks on slices of it where that is done sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .layout import Placement, box_numel
from .slicing import Slicing, slicing_of
from .tasks import SLICED, MatrixTask, Piece, held_alone

PLACEMENTS = ("owner", "gram", "auto")

# What moving a byte costs in floating-point operations when owners are chosen: a rank that runs 400 TFLOP/s behind a
# 100 GB/s link does 4,000 of them in the time of one byte.
FLOPS_PER_BYTE = 4_000

# Work is no longer moved for balance once the busiest owner is within this factor of what can be reached.
EVEN_ENOUGH = 1.05


def units_of(placements: Sequence[Placement], matrices: Sequence[MatrixTask], among: Sequence[int]) -> list[list[int]]:
    """Matrices that must share an owner: those of one replicated parameter; every other matrix is by itself."""
    units: dict[tuple[int, int], list[int]] = {}
    for i in among:
        task = matrices[i]
        key = (task.parameter, -1 if placements[task.parameter].replicated else i)
        units.setdefault(key, []).append(i)
    return list(units.values())


def choose(
    placements: Sequence[Placement],
    matrices: Sequence[MatrixTask],
    pieces: Sequence[tuple[Piece, ...]],
    n_ranks: int,
    placement: str,
) -> tuple[list[int], list[Slicing | None]]:
    """The owner of every matrix, or SLICED and how it is sliced.

    `placement` is "owner"; "gram": all matrices that have a longer side to cut are sliced; or "auto": those of the costliest shapes, as
    many shapes as end the step soonest.

    Raises:
        ValueError: "gram", and a matrix that can't be sliced because its parameter is replicated or its costs don't say what that takes.
    """
    slicings: list[Slicing | None] = [None] * len(matrices)
    if placement == "owner" or n_ranks == 1:
        return _choose_owners(placements, matrices, pieces, n_ranks, range(len(matrices)))[0], slicings
    memo: dict[tuple[object, ...], Slicing | None] = {}
    possible: dict[int, Slicing] = {}
    for i, task in enumerate(matrices):
        if placements[task.parameter].replicated or task.sliced is None:
            if placement == "gram":
                reason = (
                    "nothing says what slices of it cost" if task.sliced is None else "it is replicated, so one rank keeps its momentum"
                )
                raise ValueError(
                    f"placement='gram' can't slice {task.name}: {reason}. Choose 'owner' or 'auto', or shard its parameter (fully_shard)"
                )
            continue
        key = (id(pieces[i]), task.box, task.shape)
        if key not in memo:
            memo[key] = slicing_of(task, pieces[i], n_ranks)
        if (slicing := memo[key]) is not None:
            possible[i] = slicing
    chosen: list[int] = list(possible)
    if placement == "auto":
        shapes = sorted(
            {matrices[i].shape for i in possible}, key=lambda s: (-max(matrices[i].flops for i in possible if matrices[i].shape == s), s)
        )
        best = math.inf
        for count in range(len(shapes) + 1):
            sliced = [i for i in possible if matrices[i].shape in shapes[:count]]
            rest = sorted(set(range(len(matrices))) - set(sliced))
            ends = sum(_sliced_cost(matrices[i], possible[i]) for i in sliced)
            ends += _choose_owners(placements, matrices, pieces, n_ranks, rest)[1]
            if ends < best:
                best, chosen = ends, sliced
    for i in chosen:
        slicings[i] = possible[i]
    rest = [i for i, slicing in enumerate(slicings) if slicing is None]
    return _choose_owners(placements, matrices, pieces, n_ranks, rest)[0], slicings


def _sliced_cost(task: MatrixTask, slicing: Slicing) -> float:
    """What the rank with the largest slice takes, in FLOPs: an all-reduce sends nearly everything twice."""
    assert task.sliced is not None
    lines = slicing.extents.max(keepdims=True)  # of the rank with the largest slice
    travels = 0 if slicing.stays else 2 * lines * min(task.shape) * task.wire_itemsize
    return float((task.sliced.flops(lines) + FLOPS_PER_BYTE * (2 * task.sliced.added_up + travels))[0])


def _choose_owners(
    placements: Sequence[Placement],
    matrices: Sequence[MatrixTask],
    pieces: Sequence[tuple[Piece, ...]],
    n_ranks: int,
    among: Sequence[int],
) -> tuple[list[int], float]:
    """Owners of the matrices `among` all, SLICED for the others; and what the busiest rank takes, in FLOPs."""
    units = sorted(units_of(placements, matrices, among), key=lambda u: (-sum(matrices[i].flops for i in u), matrices[u[0]].name, u[0]))
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

    owners = [SLICED] * len(matrices)
    for unit, owner in zip(units, owner_of, strict=True):
        for i in unit:
            owners[i] = int(owner)
    return owners, float(load.max(initial=0.0))


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
        held = held_alone(pieces[i], n_ranks, memo)
        if held is not None:
            missing -= 2 * held * task.wire_itemsize
            continue
        for piece in pieces[i]:
            missing[list(piece.holders)] -= 2 * box_numel(piece.box) * task.wire_itemsize
    return missing
