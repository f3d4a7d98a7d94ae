"""Flattening: the few dominant singular values of a matrix are lowered first, so that ordinary steps work at the scale of the others.

With Q an orthonormal basis of the d dominant left directions, R = QᵀX and T = RRᵀ, X + Q(τT^(−½) − 1)R has the singular vectors of X and
its singular values, but for the d largest, which all lie at τ, half of the smallest of them. Nothing has to be put back afterwards:
τ lies inside the interval that the steps bring to 1. Directions that lie close to the d-th are mixed where Q is not exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .polynomials import widest_schedule

PLACE = 0.5  # of τ, relative to σ_d; from .25 to .6 errors of the polar factor were alike (measured on momentum of three models)
# Of ‖X‖_F: τ lies no lower than PLACE of it, so that rounding is not lifted to 1 where fewer than d directions count. (At 1e-5 a matrix of
# rank 8 that was deflated by 32 came out with .43 of noise beside each direction, at 1e-3 with .004; errors on real momentum are the same.)
SMALLEST = 1e-3
DOMINANT = 8  # singular values that a measurement of the flattened directions yields

# Six generated steps reach a condition number of 1 / SMALLEST, and one of Newton–Schulz's own takes their error from .3 to .1
_ROOT_STEPS = (*widest_schedule(6).steps, (1.875, -1.25, 0.375))
_SORTING = 16  # Cholesky iterations: neighbours that are a twentieth apart are told apart

# How often XXᵀ is applied to a random start. With 32, 16 and 8 of 256 directions one pass leaves an error of .400, .528 and .625 where two
# leave .378, .497 and .604, and exact directions .350, .477 and .587 (two steps, momentum after 20 steps of training). Of few vectors one
# pass misses a dominant direction by bad luck, which was seen.
PASSES = 2


def flattening_flops(rows: int, cols: int, count: int) -> tuple[int, int]:
    """Operations of `flatten_dominant`: those of products with the matrix, and those in fp64, on d vectors and d × d matrices."""
    m, n = min(rows, cols), max(rows, cols)
    d = min(count, m)
    return 4 * (PASSES + 1) * m * n * d, (3 * PASSES * (m + n) + 2 * (m + n)) * d**2 + 2 * 4 * len(_ROOT_STEPS) * d**3


def dominant_ranks(count: int) -> tuple[int, ...]:
    """The ranks, from 1 to `count`, whose singular values a measurement yields: `DOMINANT` of them, evenly in the logarithm."""
    return tuple(round(count ** (k / (DOMINANT - 1))) for k in range(DOMINANT))


@dataclass(frozen=True)
class Part:
    """What a process holds of matrices that lie on several.

    Attributes:
        rows: (start, stop) of its rows, of the wide form, where they are cut; None: its columns are some of all, with all rows.
        add_up: adds a tensor up over all that hold parts, in place.
    """

    rows: tuple[int, int] | None
    add_up: Callable[[Tensor], None]


def flatten_dominant(x: Tensor, count: int, *, tall: bool, part: Part | None = None, dominant: Tensor | None = None) -> Tensor:
    """Flatten the `count` dominant directions of each matrix of x, (B, m, n) with ‖·‖_F <= 1, in place; returns τ, (B,) in fp64.

    Q comes from a randomised subspace iteration (Halko, Martinsson & Tropp, arXiv 0909.4061), made orthonormal by a Cholesky factor of
    its small Gram matrix in fp64. There is no QR and no decomposition, whose batched kernels are slow on a GPU, and nothing that the host
    waits for.

    Args:
        x: fp32 or fp64; of matrices that lie on several processes, this one's part.
        count: d, at most min(m, n) of the whole matrix.
        tall: whether the whole matrix has more rows than columns; x.mT is then the wide form, whose left directions are found.
        part: None: x is whole.
        dominant: (B, DOMINANT) fp64, filled with the singular values at `dominant_ranks(count)`.
    """
    wide = x.mT if tall else x  # (B, m, n)
    cut_rows = part is not None and part.rows is not None

    def over_rows(product: Tensor) -> Tensor:
        """A product that sums over rows, where they lie on several processes."""
        if part is not None and cut_rows:
            part.add_up(product)
        return product

    def over_columns(product: Tensor) -> Tensor:
        if part is not None and not cut_rows:
            part.add_up(product)
        return product

    if part is not None and part.rows is not None:
        q = _start(part.rows[1], count, x.device)[part.rows[0] :]
    else:
        q = _start(wide.shape[-2], count, x.device)
    q = q.expand(wide.shape[0], -1, -1)  # (B, m, d)
    for _ in range(PASSES):  # on both sides: of XXᵀΩ at once rounding would grow with (σ₁/σ_d)², and the update with how X is summed up
        right = over_rows(torch.bmm(wide.mT, q.to(x.dtype))).double()  # (B, n, d)
        right = _orthonormal(right, over_columns(torch.bmm(right.mT, right)))
        left = over_columns(torch.bmm(wide, right.to(x.dtype))).double()
        q = _orthonormal(left, over_rows(torch.bmm(left.mT, left)))
    rows = over_rows(torch.bmm(q.mT.to(x.dtype), wide))  # (B, d, n)
    precise = rows.double()
    gram = over_columns(torch.bmm(precise, precise.mT))  # (B, d, d)
    gram.diagonal(dim1=-2, dim2=-1).add_(SMALLEST**2)
    if dominant is not None:
        values = _eigenvalues(gram).sqrt_()
        dominant.copy_(torch.stack([values[:, rank - 1] for rank in dominant_ranks(count)], dim=1))
    root = _inverse_root(gram)
    # (Σσ⁻⁸)^(−⅛), a lower bound of σ_d that a few equal ones lower little
    square = torch.bmm(root, root)
    fourth = torch.bmm(square, square)
    tau = PLACE * torch.linalg.vector_norm(fourth, dim=(-2, -1)) ** -0.25
    change = root.mul_(tau.view(-1, 1, 1))
    change.diagonal(dim1=-2, dim2=-1).sub_(1)
    wide.baddbmm_(torch.bmm(q, change).to(x.dtype), rows)
    return tau


def _start(rows: int, count: int, device: torch.device) -> Tensor:
    """(rows, count) pseudo-random numbers in [−1, 1), fp64, the same on every kind of device: SplitMix64 of their positions (Steele et al.,
    OOPSLA 2014). No generator is asked, so that a step repeats exactly.
    """
    bits = torch.arange(1, rows * count + 1, dtype=torch.int64, device=device).mul_(-7046029254386353131)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits.bitwise_xor_(bits >> shift).mul_(factor)
    return (bits >> 40).to(torch.float64).mul_(2.0**-23).view(rows, count)


def _orthonormal(y: Tensor, gram: Tensor) -> Tensor:
    """An orthonormal basis of the columns of each (m, d), by shifted Cholesky QR (Fukaya et al., SIAM J. Sci. Comput. 42, A477, 2020).

    Columns that depend on others come out short, or zero. `gram` is their Gram matrix, and lost.
    """
    shift = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).mul_(1e-14).add_(1e-200)
    gram.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor = torch.linalg.cholesky_ex(gram)[0]
    return torch.linalg.solve_triangular(factor, y.mT, upper=False).mT


def _eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues of positive definite (B, d, d), about in falling order, (B, d): LR iterations, by Cholesky factors.

    Those that are close to each other are mixed, which changes none of them much.
    """
    for _ in range(_SORTING):
        factor = torch.linalg.cholesky_ex(gram)[0]
        gram = torch.bmm(factor.mT, factor)
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)


def _inverse_root(gram: Tensor) -> Tensor:
    """T^(−½) of positive definite (B, d, d), to within a tenth of each singular value, by Newton–Schulz."""
    scale = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    gram = gram / scale
    root = None
    for a, b, c in _ROOT_STEPS:
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        root = step if root is None else torch.bmm(step, root)
        gram = torch.bmm(step, torch.bmm(gram, step))
    assert root is not None
    return root / scale.sqrt()
