"""What the plan is made of: matrices with their costs, which are passed in, and the pieces in which they lie on the ranks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from .layout import Box, box_numel

SLICED = -1  # in place of an owner: every rank works on a slice


@dataclass(frozen=True, kw_only=True)
class SlicedCost:
    """What a matrix costs every rank where each works on a slice along the longer side.

    Attributes:
        fixed: FLOPs that all ranks do alike.
        per_line: FLOPs for every row or column of the rank's slice.
        added_up: bytes that are added up over the ranks.
        workspace: bytes beside slices and what they become.
    """

    fixed: int
    per_line: int
    added_up: int
    workspace: int

    def flops(self, lines: np.ndarray) -> np.ndarray:
        """Of ranks with so many rows or columns each."""
        return self.fixed + self.per_line * lines


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
        sliced: what it costs where every rank works on a slice of it; None: it needs an owner.
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
    sliced: SlicedCost | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def wire_bytes(self) -> int:
        return self.numel * self.wire_itemsize


@dataclass(frozen=True)
class Piece:
    """A part of a matrix as it lies on the ranks: its box, the rank whose copy the owner reads, and all that hold it.

    `owner` is the rank that works on it where the matrix is sliced; else the matrix has an owner, and this is SLICED.
    """

    box: Box
    source: int
    holders: tuple[int, ...]
    owner: int = SLICED


def held_alone(pieces: tuple[Piece, ...], n_ranks: int, memo: dict[int, np.ndarray | None]) -> np.ndarray | None:
    """Elements per rank where every piece has one holder, else None."""
    if id(pieces) not in memo:
        alone = all(len(piece.holders) == 1 for piece in pieces)
        sizes = [box_numel(piece.box) for piece in pieces]
        memo[id(pieces)] = np.bincount([p.source for p in pieces], sizes, n_ranks).astype(np.int64) if alone else None
    return memo[id(pieces)]
