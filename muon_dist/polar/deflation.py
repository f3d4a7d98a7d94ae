"""Deflation: the few dominant directions of a matrix taken out, so that the others are iterated at their own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .polynomials import widest_schedule

SEED = 20160  # of the random sketch: fixed, so that a step repeats exactly and the global generator is left alone

# Passes of subspace iteration from a random sketch. On real momentum two find nine tenths of what exact directions give.
PASSES = 2

# Eight generated steps and two of Newton–Schulz's own: the polar factor of anything whose condition number is below 1e5
_SMALL_STEPS = (*widest_schedule(8).steps, *[(1.875, -1.25, 0.375)] * 2)


def deflation_flops(rows: int, cols: int, count: int) -> int:
    """Operations on products with the matrix: the sketch, two for every pass, QᵀX, X − QQᵀX, and the result."""
    return (2 + 4 * PASSES + 6) * rows * cols * min(count, rows, cols)


def split_dominant(x: Tensor, count: int, basis: Tensor | None = None) -> Tensor:
    """Take the `count` dominant directions out of each matrix of x, (B, m, n), in place; returns their polar factor, (B, m, n).

    An orthonormal basis Q of the dominant left directions (right ones where x is tall) comes from a randomised subspace iteration
    (Halko, Martinsson & Tropp, arXiv 0909.4061): x becomes X − QQᵀX, and the result is Q times the polar factor of QᵀX. Where
    σ_count and the one after it are close Q mixes them, which changes the sum of both polar factors little.

    `basis`, (B, min(m, n), count), holds the Q of the last call, or zeros, and is overwritten with this one's. From an earlier Q one
    pass is enough, and no sketch is taken.
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    count = min(count, wide.shape[-2])
    warm = basis is not None and bool(basis.any())
    if warm:
        assert basis is not None
        q = basis[..., :count].to(x.dtype)
    else:
        generator = torch.Generator(x.device).manual_seed(SEED)
        sketch = torch.randn(wide.shape[-1], count, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
        q = torch.linalg.qr(wide @ sketch)[0]  # (B, m, count)
    for _ in range(1 if warm else PASSES):
        q = torch.linalg.qr(wide @ (wide.mT @ q))[0]
    if basis is not None:
        basis[..., :count] = q.to(basis.dtype)
    rows = q.mT @ wide  # (B, count, n)
    wide.baddbmm_(q, rows, alpha=-1)
    dominant = (q @ inverse_root(rows).to(x.dtype)) @ rows
    return dominant.mT if tall else dominant


def inverse_root(rows: Tensor) -> Tensor:
    """(R Rᵀ)^(−½) of (B, d, n), by Newton–Schulz on the d × d Gram matrix in fp64; zero directions stay finite."""
    precise = rows.to(torch.float64)
    gram = precise @ precise.mT
    scale = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)  # ‖R‖₄², an upper bound of σ₁²
    scale = scale.masked_fill_(scale == 0, 1.0)
    gram = gram / scale
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = eye.expand_as(gram)
    for a, b, c in _SMALL_STEPS:
        step = a * eye + b * gram + c * gram @ gram
        root, gram = step @ root, step @ gram @ step
    return root / scale.sqrt()
