"""Gram space: several Newton–Schulz steps on the Gram matrix alone, and where a schedule has to start again from X.

Within a segment of steps X is seen twice: A = XXᵀ at its start, RX at its end. Between, every step is Q = a + bA + cA², R ← QR,
A ← QAQ, all m × m and symmetric, m the smaller side. Rounding of A is never put right within a segment, and small directions suffer
first, so how long segments may be depends on the polynomials and on how products round. Here that is found by trying.

The order of factors matters: rounding of PR and Q(AQ) stays small where a direction is small. Of (AQ)Q, of RP, or with AQ mirrored at its
diagonal, it does not, and errors grow two- to tenfold (measured on the trial matrices below).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .coefficients import Coefficients
from .products import Precision

Rounding = Callable[[Tensor], Tensor]

LONGEST = 4  # no published or generated schedule stands five steps on one Gram matrix in fp32

# Segments are taken where their result is at most this many times as far from exact arithmetic as that of single steps. (Twice as far on
# average over the trial matrices was seen to be thirty times for a 2 × 7 matrix: few directions, one of them unlucky.)
WORSE = 1.5

_SIZE, _DRAWS, _MANY = 64, 4, 40  # of the matrices that are tried: their side, how many have each spectrum, and how many `stands` takes


def single_steps(count: int) -> tuple[int, ...]:
    """The direct form: every step a segment of its own."""
    return (1,) * count


@functools.cache
def possible_segments(steps: tuple[Coefficients, ...], precision: Precision) -> dict[tuple[int, int], float]:
    """(first step, length) of every segment that may be taken in `precision` -> how much worse its result is than that of single
    steps.

    Each is tried alone, with products that round so, on `_trial_matrices`. Single steps are not listed.
    """
    found: dict[tuple[int, int], float] = {}
    for length in range(2, LONGEST + 1):
        for first in range(len(steps) - length + 1):
            if length > 2 and not {(first, length - 1), (first + 1, length - 1)} & found.keys():
                continue
            segments = (*single_steps(first), length, *single_steps(len(steps) - first - length))
            if (worse := how_much_worse(steps, precision, segments)) <= WORSE:
                found[first, length] = worse
    return found


def best_segments(steps: tuple[Coefficients, ...], precision: Precision, cost: Callable[[int], float]) -> tuple[int, ...]:
    """The lengths of the segments, in order, that cost least among those that may be taken together in `precision`.

    `cost(length)` is of one segment; where nothing is cheaper every step stays single.
    """
    direct, possible = single_steps(len(steps)), None
    while cost(2) < 2 * cost(1):  # else longer ones don't pay either
        possible = dict(possible_segments(steps, precision)) if possible is None else possible
        chosen = _cheapest(len(steps), possible, cost)
        if chosen == direct or (how_much_worse(steps, precision, chosen) <= WORSE and stands(steps, precision, chosen)):
            return chosen
        starts = [sum(chosen[:k]) for k in range(len(chosen))]
        taken = [(first, length) for first, length in zip(starts, chosen, strict=True) if length > 1]
        del possible[max(taken, key=lambda segment: possible[segment])]
    return direct


def _cheapest(count: int, possible: dict[tuple[int, int], float], cost: Callable[[int], float]) -> tuple[int, ...]:
    """Segments of `count` steps of least cost, by dynamic programming over where the last one begins; short ones where costs tie."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, count + 1):
        options = [(best[end - 1][0] + cost(1), (*best[end - 1][1], 1))]
        for length in range(2, min(LONGEST, end) + 1):
            if (end - length, length) in possible:
                total, segments = best[end - length]
                options.append((total + cost(length), (*segments, length)))
        best.append(min(options, key=lambda option: option[0]))
    return best[count][1]


@functools.cache
def how_much_worse(steps: tuple[Coefficients, ...], precision: Precision, segments: tuple[int, ...]) -> float:
    """The error of Newton–Schulz in these segments, its products rounded as `precision` says, over that of single steps: the largest
    over a few spectra. For fp64 that of fp32, to which the same share of digits is lost.

    Rounded to three digits, since the last bits of it are those of the CPU that it is found on.
    """
    if precision == torch.float64:
        return how_much_worse(steps, torch.float32, segments)
    x = _trial_matrices()
    exact, single = _iterations(steps, precision)
    worse = float((_errors(iterate(x, steps, segments, *_rounding(precision)), exact) / single).nan_to_num(nan=float("inf")).max())
    return float(f"{worse:.3g}")


@functools.cache
def stands(steps: tuple[Coefficients, ...], precision: Precision, segments: tuple[int, ...]) -> bool:
    """Whether the norm of no matrix of many becomes larger than in exact arithmetic, by a fifth. True for fp32 and fp64.

    Where products round to half precision a small eigenvalue of A may come out negative, and steps on A alone then magnify it: with eight
    and more generated steps in bf16 that was seen in one matrix of fifty whose rows are of unlike size, and never in `_trial_matrices`.
    """
    if precision in (torch.float32, torch.float64):
        return True
    x, exact = _graded_matrices(steps)
    return bool((torch.linalg.matrix_norm(iterate(x, steps, segments, *_rounding(precision))) < 1.2 * exact).all())


@functools.cache
def _graded_matrices(steps: tuple[Coefficients, ...]) -> tuple[Tensor, Tensor]:
    """(6·draws, m, 2m) whose rows become smaller over two to four decades, with σ₁ = 1 and with ‖X‖_F = 1; and the norms of what the
    steps make of them.
    """
    rows = np.random.default_rng(2017).standard_normal((_MANY, _SIZE, 2 * _SIZE))
    graded = np.concatenate([rows * np.logspace(0, -decades, _SIZE)[:, None] for decades in (2, 3, 4)])
    norms = np.linalg.norm(graded, axis=(-2, -1), keepdims=True)
    largest = np.linalg.norm(graded[:, :1], axis=-1, keepdims=True) * 1.2  # about σ₁, from above
    x = torch.from_numpy(np.concatenate([graded / largest, graded / norms]))
    return x, torch.linalg.matrix_norm(iterate(x, steps, single_steps(len(steps)), lambda t: t))


def _rounding(precision: Precision) -> tuple[Rounding, Rounding]:
    """How results of products are rounded, and how their factors are before: to half precision the first, to bf16 or TF32 the second."""
    if isinstance(precision, torch.dtype):
        return lambda t: t.to(precision).to(torch.float64), lambda t: t
    if precision == "bf16":
        return lambda t: t.float().double(), lambda t: t.bfloat16().double()
    return lambda t: t.float().double(), _to_tf32


def _to_tf32(t: Tensor) -> Tensor:
    """With eleven significant bits, as TF32 has."""
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def _errors(rounded: Tensor, exact: Tensor) -> Tensor:
    """Root mean square errors, one for each spectrum."""
    return torch.linalg.vector_norm(rounded - exact, dim=(-3, -2, -1))


@functools.cache
def _iterations(steps: tuple[Coefficients, ...], precision: Precision) -> tuple[Tensor, Tensor]:
    """Newton–Schulz on the trial matrices in fp64, and the errors of single steps in `precision`."""
    x, direct = _trial_matrices(), single_steps(len(steps))
    exact = iterate(x, steps, direct, lambda t: t)
    return exact, _errors(iterate(x, steps, direct, *_rounding(precision)), exact)


@functools.cache
def _trial_matrices() -> Tensor:
    """(8, draws, m, m): four spectra (flat, three and five decades, one direction with most of the energy before four decades), each with
    σ₁ = 1, the most that any normalisation leaves, and with ‖X‖_F = 1.
    """
    # numpy, whatever a user's default device or dtype is, so that all ranks find the same
    generator = np.random.default_rng(2016)
    spectra = np.stack(
        [
            np.linspace(1, 0.1, _SIZE),
            np.logspace(0, -3, _SIZE),
            np.logspace(0, -5, _SIZE),
            np.concatenate([np.ones(1), np.logspace(-1.5, -4, _SIZE - 1)]),
        ]
    )
    spectra = np.stack([spectra, spectra / np.linalg.norm(spectra, axis=-1, keepdims=True)]).reshape(-1, 1, _SIZE)
    left, right = np.linalg.qr(generator.standard_normal((2, _DRAWS, _SIZE, _SIZE)))[0]
    return torch.from_numpy((left * spectra[:, :, None]) @ right)


def iterate(x: Tensor, steps: Sequence[Coefficients], segments: Sequence[int], rounded: Rounding, factor: Rounding = lambda t: t) -> Tensor:
    """Newton–Schulz in segments on (…, m, n), m <= n, written for reading; `rounded` is applied to every result, `factor` to what a
    product multiplies.

    Symmetric products keep their lower triangle, as where only that is computed: an error on one side of the diagonal then shows on both.
    """

    def symmetric(product: Tensor) -> Tensor:
        lower = rounded(product).tril()
        return lower + lower.tril(-1).mT

    def times(first: Tensor, second: Tensor) -> Tensor:
        return factor(first) @ factor(second)

    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    x, k = rounded(x), 0
    for length in segments:
        gram, root = symmetric(times(x, x.mT)), eye
        for step, (a, b, c) in enumerate(steps[k : k + length]):
            polynomial = symmetric(b * gram + c * times(gram, gram))
            if length == 1:
                x = rounded(a * x + times(polynomial, x))
                break
            root = symmetric(a * root + times(polynomial, root))
            if step < length - 1:
                q = rounded(polynomial + a * eye)
                gram = symmetric(times(q, rounded(times(gram, q))))
        if length > 1:
            x = rounded(times(root, x))
        k += length
    return x
