"""Slices: a matrix cut along its longer side, a part for every rank to work on.

Where the ranks store it cut that way already, their parts are the slices and nothing travels; else the slices are even and the pieces
travel to them as they would to an owner.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Box, box_shape, intersect
from .tasks import MatrixTask, Piece

UNEVEN = 1.5  # ranks work on what they store where nobody stores more than this many times an even share


@dataclass(frozen=True)
class Slicing:
    """How a matrix is cut.

    Attributes:
        dim: the dimension of the matrix that is cut, 0 or 1.
        axis: the dimension of its box that is cut.
        bounds: (ranks + 1,), ascending: rank r works on [bounds[r], bounds[r + 1]) of that axis, which may be empty.
        lines: rows or columns of the matrix for each step along the axis; more than one in a convolution kernel.
        stays: whether every rank works on what it stores.
    """

    dim: int
    axis: int
    bounds: tuple[int, ...]
    lines: int
    stays: bool

    def part(self, box: Box, rank: int) -> Box:
        """A rank's slice of the matrix that lies in `box`."""
        return (*box[: self.axis], (self.bounds[rank], self.bounds[rank + 1]), *box[self.axis + 1 :])

    @property
    def extents(self) -> np.ndarray:
        """(ranks,): the rows or columns in each rank's slice."""
        return np.diff(self.bounds) * self.lines


def slicing_of(task: MatrixTask, pieces: Sequence[Piece], n_ranks: int) -> Slicing | None:
    """The slices of a matrix, along its longer side (of a square one, along the side that the ranks have cut); None if no axis is one."""
    m, n = task.shape
    ways = [way for dim in (0, 1) if task.shape[dim] >= max(m, n) and (way := _axis(task, dim)) is not None]
    for dim, axis, lines in ways:
        bounds = _bounds_of(pieces, task.box, axis, n_ranks)
        if bounds is not None:
            return Slicing(dim, axis, bounds, lines, stays=True)
    for dim, axis, lines in ways:
        start, stop = task.box[axis]
        bounds = tuple(start + (stop - start) * r // n_ranks for r in range(n_ranks + 1))
        return Slicing(dim, axis, bounds, lines, stays=False)
    return None


def _axis(task: MatrixTask, dim: int) -> tuple[int, int, int] | None:
    """(dim, the axis of the box to cut, the matrix's lines per step along it), or None where one axis doesn't tell the dimension."""
    sizes = box_shape(task.box)
    last_of_rows = next((a for a in range(len(sizes)) if math.prod(sizes[: a + 1]) == task.shape[0] and sizes[a] == task.shape[0]), None)
    if last_of_rows is None:
        return None
    if dim == 0:
        return dim, last_of_rows, 1
    axis = next((a for a in range(last_of_rows + 1, len(sizes)) if sizes[a] > 1), None)
    return None if axis is None else (dim, axis, math.prod(sizes[axis + 1 :]))


def _bounds_of(pieces: Sequence[Piece], box: Box, axis: int, n_ranks: int) -> tuple[int, ...] | None:
    """The cuts that the ranks' pieces make along an axis, if each rank holds one full slice at most, in order, none much more than its
    share, and nobody a copy.
    """
    cuts: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        if len(piece.holders) > 1 or piece.source in cuts:
            return None
        if any(a != b for k, (a, b) in enumerate(zip(piece.box, box, strict=True)) if k != axis):
            return None
        cuts[piece.source] = piece.box[axis]
    bounds = [box[axis][0]]
    for rank in range(n_ranks):
        start, stop = cuts.get(rank, (bounds[-1], bounds[-1]))
        if start != bounds[-1]:
            return None
        bounds.append(stop)
    even = -(-(box[axis][1] - box[axis][0]) // n_ranks)
    return tuple(bounds) if max(b - a for a, b in itertools.pairwise(bounds)) <= UNEVEN * even else None


def sliced_pieces(pieces: Sequence[Piece], slicing: Slicing, box: Box) -> tuple[Piece, ...]:
    """The pieces of a matrix, cut where slices end, each with the rank that works on it."""
    result = []
    for piece in pieces:
        start, stop = piece.box[slicing.axis]
        first = bisect.bisect_right(slicing.bounds, start) - 1
        for rank in range(first, bisect.bisect_left(slicing.bounds, stop)):
            part = intersect(piece.box, slicing.part(box, rank))
            if part is not None:
                source = rank if rank in piece.holders else piece.holders[0]
                result.append(Piece(part, source, piece.holders, owner=rank))
    return tuple(result)
