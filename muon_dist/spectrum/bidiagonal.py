"""Quantiles of singular values from products with M and Mᵀ, where no rank holds M whole: Golub–Kahan bidiagonalisation.

From a block of b random start vectors, k steps give a block-bidiagonal matrix of side k·b whose singular values and vectors are the
nodes and weights of a Gauss quadrature of M's spectrum (Golub & Meurant, Matrices, Moments and Quadrature, 2010). Vectors on the
side of the columns are known everywhere and fully reorthogonalised; those on the side of the rows stay with whoever has the rows
(one-sided reorthogonalisation: Simon & Zha, SIAM J. Sci. Comput. 21, 2257 (2000)). So an iteration needs one sum over ranks, of
b·(cols + b) numbers, which many matrices share. Row or block samples of M are not used: they are biased.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .moments import QUANTILES

PROBES = 4
ITERATIONS = 24
# Random start vectors weigh the directions unevenly, which averages out over all of them: smaller matrices get more vectors
DIRECTIONS = 4096
MOST_PROBES = 16


@dataclass(frozen=True)
class RowShard:
    """This rank's rows of a matrix, as products with them.

    Attributes:
        name: seeds the start vectors, with `step`.
        rows, cols: of the whole matrix.
        held: which rows are here, as increasing row numbers; may be empty.
        forward: v, (cols, b) -> M[held] v, (len(held), b).
        backward: u, (len(held), b) -> M[held]ᵀ u, (cols, b).
        energy: the sum of squares of the rows that are here.
        device: of the vectors.
    """

    name: str
    rows: int
    cols: int
    held: Tensor
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    energy: float
    device: torch.device


@dataclass(frozen=True)
class QuantileEstimate:
    """q -> σ_q/‖M‖_F at rank ⌈q·r⌉ from the top, and one standard error of ln σ_q by the uneven weights of the start vectors.

    The error leaves out that few iterations resolve the smallest singular values badly: q above .5 needs more than the default.
    """

    quantiles: dict[float, float]
    errors: dict[float, float]


def golub_kahan_quantiles(
    shards: Sequence[RowShard],
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
    *,
    probes: int | None = None,
    iterations: int = ITERATIONS,
    quantiles: Sequence[float] = QUANTILES,
    step: int = 0,
) -> list[QuantileEstimate | None]:
    """Estimate the quantiles of every matrix; None for one that is zero.

    Args:
        shards: this rank's rows of each matrix; the same matrices in the same order on every rank.
        reduce: sums a flat fp64 tensor over all ranks; called iterations + 2 times. The identity, on one rank.
        probes: start vectors. None: 4, or 4096/rank where that is more, up to 16.
        iterations: steps, fewer where they exhaust a matrix; then its singular values are exact.
        step: changes the start vectors.

    Raises:
        ValueError: numbers below 1.
    """
    if (probes is not None and probes < 1) or iterations < 1:
        raise ValueError(f"probes and iterations must be at least 1, got {probes} and {iterations}")
    if not shards:
        return []
    runs = [_Run(shard, probes, iterations, step) for shard in shards]
    energy = reduce(torch.tensor([shard.energy for shard in shards], dtype=torch.float64, device=shards[0].device)).tolist()
    for k in range(iterations + 1):
        active = [r for r in runs if k <= r.iterations]
        if not active:
            break
        parts = [r.partial() for r in active]
        total = reduce(torch.cat([p.flatten() for p in parts]))
        for r, part in zip(active, total.split([p.numel() for p in parts]), strict=True):
            r.advance(part.view(-1, r.probes))
    return [r.estimate(quantiles, e) for r, e in zip(runs, energy, strict=True)]


class _Run:
    """One matrix under way. Starts on its shorter side, whose directions are all counted once."""

    def __init__(self, shard: RowShard, probes: int | None, iterations: int, step: int) -> None:
        self.shard, self.short = shard, min(shard.rows, shard.cols)
        default = min(max(PROBES, DIRECTIONS // max(1, self.short)), MOST_PROBES)
        self.probes = max(1, min(default if probes is None else probes, self.short))
        self.iterations = min(iterations, -(-self.short // self.probes))
        self.from_rows = shard.rows < shard.cols
        seed = int.from_bytes(hashlib.sha256(f"{shard.name}/{step}".encode()).digest()[:7], "big")
        generator = torch.Generator("cpu").manual_seed(seed)
        start = torch.randn(self.short, self.probes, generator=generator, dtype=torch.float64, device="cpu")
        start = torch.linalg.qr(start)[0].to(shard.device)
        self.alphas: list[Tensor] = []  # (b, b) blocks of the bidiagonal matrix: the diagonal,
        self.betas: list[Tensor] = []  # and beside it
        self.basis = torch.zeros(shard.cols, 0, dtype=torch.float64, device=shard.device)
        self.left = start[shard.held.to(shard.device)] if self.from_rows else shard.forward(start)  # not orthonormal
        if not self.from_rows:
            self.basis = start

    def partial(self) -> Tensor:
        """This rank's part of Mᵀu and uᵀu, (cols + b, b)."""
        return torch.cat([self.shard.backward(self.left), self.left.mT @ self.left])

    def advance(self, total: Tensor) -> None:
        """One step of the recurrence with the sums over all ranks."""
        root, inverse = _root(total[self.shard.cols :])
        u, right = self.left @ inverse, total[: self.shard.cols] @ inverse  # u·root is what left was
        if self.from_rows:  # lower bidiagonal: Mᵀu_j = v_j α_jᵀ + v_{j−1} β_jᵀ, M v_j = u_j α_j + u_{j+1} β_{j+1}
            if self.alphas:
                self.betas.append(root)
            v, factor = self._orthonormal(right)
            self.alphas.append(factor.mT)
            self.left = self.shard.forward(v) - u @ factor.mT
        else:  # upper bidiagonal: M v_j = u_j α_j + u_{j−1} β_j, Mᵀu_j = v_j α_jᵀ + v_{j+1} β_{j+1}ᵀ
            self.alphas.append(root)
            v, factor = self._orthonormal(right)
            self.betas.append(factor.mT)
            self.left = self.shard.forward(v) - u @ factor.mT
        self.basis = torch.cat([self.basis, v], dim=1)

    def _orthonormal(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """What is new in `right`, as an orthonormal block times a factor; the block is zero once the space is exhausted."""
        for _ in range(2):
            right = right - self.basis @ (self.basis.mT @ right)
        factor, inverse = _root(right.mT @ right)
        return right @ inverse, factor

    def estimate(self, quantiles: Sequence[float], energy: float) -> QuantileEstimate | None:
        """The quantiles by the quadrature, or exact ones where the block exhausted the matrix."""
        if energy <= 0 or not self.short:
            return None
        k, b = self.iterations, self.probes
        bidiagonal = np.zeros((k * b, k * b))
        for j in range(k):
            bidiagonal[j * b : (j + 1) * b, j * b : (j + 1) * b] = self.alphas[j].cpu().numpy()
            if j + 1 < k:
                beta = self.betas[j].cpu().numpy()
                at = (slice((j + 1) * b, (j + 2) * b), slice(j * b, (j + 1) * b))
                bidiagonal[at if self.from_rows else at[::-1]] = beta
        left, sigma, right = np.linalg.svd(bidiagonal)
        weight = ((left[:b] if self.from_rows else right[:, :b].T) ** 2).sum(0) / b  # of the start vectors
        exhausted = k * b >= self.short
        if exhausted:
            sigma, weight = sigma[: self.short], np.full(self.short, 1 / self.short)
        middle, ln_sigma = np.cumsum(weight) - weight / 2, np.log(np.maximum(sigma, 1e-300)) - 0.5 * math.log(energy)
        found, errors = {}, {}
        for q in quantiles:
            position = (math.ceil(q * self.short) - 0.5) / self.short
            found[q] = math.exp(float(np.interp(position, middle, ln_sigma)))
            away = math.sqrt(2 * q * (1 - q) / (self.short * b))  # of the counted share, by the start vectors' weights
            ends = np.interp([position - away, position + away], middle, ln_sigma)
            errors[q] = 0.0 if exhausted else float(abs(ends[1] - ends[0])) / 2
        return QuantileEstimate(found, errors)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(b, b) R with RᵀR = gram, and its pseudo-inverse: directions that are exhausted have none."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    keep = values > values[-1].clamp_min(1e-280) * 1e-24
    root = torch.where(keep, values, 0.0).sqrt()
    inverse = torch.where(keep, 1 / torch.where(keep, root, 1.0), 0.0)
    return root[:, None] * vectors.mT, vectors * inverse
