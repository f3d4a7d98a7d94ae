"""Products whose result is known to be symmetric: one triangle is computed and mirrored.

XXᵀ is symmetric, and so is every product of polynomials of one Gram matrix, since they commute.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

# On a CPU, MKL reaches its full rate from about this many rows a block on (measured; twelve or more blocks gain nothing further)
_ROWS, _MOST_BLOCKS = 128, 8


@functools.cache
def block_rows(size: int, device_type: str) -> tuple[tuple[int, int], ...]:
    """The half-open ranges of rows in which a size × size symmetric result is computed, each up to the diagonal; one range: all of it."""
    count = max(1, min(size // _ROWS, _MOST_BLOCKS)) if device_type == "cpu" else 1
    return tuple(itertools.pairwise(round(size * k / count) for k in range(count + 1)))


@functools.cache
def computed_elements(size: int, device_type: str) -> int:
    """How many elements of a size × size symmetric result are computed, the others being mirrored."""
    return sum((stop - start) * stop for start, stop in block_rows(size, device_type))


def symmetric_product(
    first: Tensor, second: Tensor, out: Tensor, *, addend: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """out ← beta·addend + alpha·first·second, or first·second without an addend, (m, m) or (B, m, m), where that is symmetric.

    `out` shares memory with none of the others.
    """
    ranges = block_rows(out.shape[-1], out.device.type)
    for start, stop in ranges:
        rows, columns, part = first[..., start:stop, :], second[..., :stop], out[..., start:stop, :stop]
        if addend is None:
            (torch.mm if out.ndim == 2 else torch.bmm)(rows, columns, out=part)
        else:
            multiply_add = torch.addmm if out.ndim == 2 else torch.baddbmm
            multiply_add(addend[..., start:stop, :stop], rows, columns, beta=beta, alpha=alpha, out=part)
    for start, stop in ranges[1:]:
        out[..., :start, start:stop].copy_(out[..., start:stop, :start].mT)
