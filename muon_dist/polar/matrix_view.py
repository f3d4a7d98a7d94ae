"""A parameter as the matrices that are orthogonalised: fused projections, heads, expert stacks, convolutions.

A matrix is a box of its parameter, a half-open range in every dimension. What is fused stays where it is stored; only the
boxes say where one matrix ends and the next begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """How one parameter is read as matrices.

    Attributes:
        kind: "matrix" for (rows, cols) or a stack (..., rows, cols), each trailing matrix by itself (experts);
            "conv" for a kernel (out, in, *k), read as one (out, in·k) matrix.
        split: sizes along the output dimension, one matrix each: (q, k, v) rows of a fused QKV, (gate, up); or one
            integer, the rows of every piece (heads). None: one matrix.
        transpose: the weight is stored (in, out), so its output dimension is the last one.
    """

    kind: str = "matrix"
    split: tuple[int, ...] | int | None = None
    transpose: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("matrix", "conv"):
            raise ValueError(f"unknown matrix view {self.kind!r}: choose 'matrix' or 'conv'")
        if self.kind == "conv" and self.transpose:
            raise ValueError("a convolution kernel is stored (out, in, *k) and can't be transposed; drop it from transpose=")
        if self.split is not None:
            sizes = (self.split,) if isinstance(self.split, int) else tuple(self.split)
            if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s <= 0 for s in sizes):
                raise ValueError(f"split sizes must be positive integers, got {self.split!r}")
            if not isinstance(self.split, int):
                object.__setattr__(self, "split", sizes)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix of a parameter: the box it fills there and its shape as stored, (m, n)."""

    box: Box
    shape: tuple[int, int]
    transpose: bool = False

    @property
    def rows(self) -> int:
        """Outputs, as the update's scale sees them."""
        return self.shape[1] if self.transpose else self.shape[0]

    @property
    def cols(self) -> int:
        """Inputs."""
        return self.shape[0] if self.transpose else self.shape[1]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def matrices_of(shape: Sequence[int], view: MatrixView, name: str = "parameter") -> tuple[Matrix, ...]:
    """The matrices of a parameter of `shape`, in storage order; together they tile it. An empty parameter has none.

    Raises:
        ValueError: fewer than two dimensions, or split sizes that don't add up to the output dimension.
    """
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {shape}: Muon needs at least two dimensions. Consider algorithm='adamw' for it")
    if math.prod(shape) == 0:
        return ()
    conv = view.kind == "conv"
    if conv and len(shape) < 3:
        raise ValueError(f"{name} has shape {shape}: a convolution kernel has at least three dimensions (out, in, *k)")
    leading = () if conv else shape[:-2]
    out_dim = 0 if conv else len(shape) - (1 if view.transpose else 2)
    bounds = _split_bounds(shape[out_dim], view.split, name)

    matrices = []
    for index in itertools.product(*(range(size) for size in leading)):
        for start, stop in bounds:
            box = [(i, i + 1) for i in index] + [(0, size) for size in shape[len(leading) :]]
            box[out_dim] = (start, stop)
            m, *rest = (stop - start for start, stop in box[len(leading) :])
            matrices.append(Matrix(box=tuple(box), shape=(m, math.prod(rest)), transpose=view.transpose))
    return tuple(matrices)


def _split_bounds(size: int, split: tuple[int, ...] | int | None, name: str) -> list[tuple[int, int]]:
    if split is None:
        return [(0, size)]
    if isinstance(split, int):
        if size % split:
            raise ValueError(f"{name}: pieces of {split} rows don't divide its output dimension of {size}")
        split = (split,) * (size // split)
    if sum(split) != size:
        raise ValueError(f"{name}: split sizes {split} add up to {sum(split)}, but its output dimension is {size}")
    stops = list(itertools.accumulate(split))
    return list(zip([0, *stops[:-1]], stops, strict=True))
