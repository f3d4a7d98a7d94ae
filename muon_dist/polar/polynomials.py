"""Newton–Schulz schedules: the polynomials of one orthogonalisation, published ones and generated ones.

One step maps the singular values of X by p(x) = a·x + b·x³ + c·x⁵. A **schedule** is one (a, b, c) per step, with what X is
divided by beforehand. Schedules of the minimax families are generated for their step count: the first k steps of a longer
schedule leave an output that is not near 1 anywhere, so of these nothing is ever truncated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, Union

import numpy as np

from .coefficients import DEEPSEEK_V4_LAST, JORDAN, PUBLISHED, Coefficients

Number = TypeVar("Number", float, np.ndarray)
Polynomial = Union[str, Coefficients, Sequence[Coefficients]]

# Polar Express (arXiv 2505.16932) and CANS (arXiv 2506.10935) are both greedy minimax schedules for [1e-3, 1] as
# published; the first widens no interval beyond its cushion and divides all steps but the last by a safety factor.
PUBLISHED_LOWER = 1e-3
POLAR_EXPRESS_CUSHION = 0.02407327424182761
POLAR_EXPRESS_SAFETY = 1.01

# Where a family must be generated for fewer steps than it was published for, its lower bound is the smallest from which
# that many steps reach |p(x) - 1| <= TOLERANCE.
TOLERANCE = 0.3

# Our own generated steps are designed for an interval that reaches this much further up than promised: rounding in bf16, and a
# norm that is 1% off, then stay inside it. (Polar Express divides by 1.01 for the same reason.)
SAFETY = 1.02

# Lower bounds are rounded down to powers of 10^(1/8), and tolerances to hundredths, so that schedules stay few.
BOUNDS_PER_DECADE = 8

REPEATED = {row.name: row for row in PUBLISHED if row.name is not None}  # steps as published, whatever their count
NAMES = (*REPEATED, "polar_express", "cans", "deepseek_v4", "minimax")
NORMALISATIONS = ("frobenius", "schatten4", "schatten8")
MAX_STEPS = 100


@dataclass(frozen=True)
class Schedule:
    """The polynomials of one orthogonalisation and what comes before them.

    Two schedules are equal where they compute the same; `error`, `coverage` and `quantiles` only report.

    Attributes:
        steps: one (a, b, c) per Newton–Schulz step.
        normalisation: what X is divided by: "frobenius", ‖X‖_F, as published families are; "schatten4", (Σσ⁴)^¼, or
            "schatten8", (Σσ⁸)^⅛, both upper bounds of σ₁ from the first step's Gram matrix and far tighter.
        deflation: how many dominant singular values are lowered first to lie among the others (`flattening`), which are then iterated
            at their own scale; 0: none.
        error: the root mean square of (gain − 1) over the directions above the noise floor, as estimated by `choose_schedule`.
        coverage: the share of directions above the noise floor that the steps bring within the tolerance, as estimated by
            `choose_schedule`.
        quantiles: q -> σ_q/‖X‖_F, the singular value at rank ⌈q·r⌉ from the top, as estimated by `choose_schedule`; None
            where the measurement doesn't resolve it.
    """

    steps: tuple[Coefficients, ...]
    normalisation: str = "frobenius"
    deflation: int = 0
    error: float | None = field(default=None, compare=False)
    coverage: float | None = field(default=None, compare=False)
    quantiles: Mapping[float, float | None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Sequence) or isinstance(self.steps, str) or len(self.steps) == 0:
            raise ValueError(f"a schedule is a non-empty list of (a, b, c), one per step, got {self.steps!r}")
        object.__setattr__(self, "steps", tuple(_triple(step) for step in self.steps))
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation={self.normalisation!r}: choose one of {', '.join(NORMALISATIONS)}")
        if isinstance(self.deflation, bool) or not isinstance(self.deflation, int) or self.deflation < 0:
            raise ValueError(f"deflation must be a number of directions, at least 0, got {self.deflation!r}")

    def __len__(self) -> int:
        return len(self.steps)


def schedule_for(polynomial: Polynomial, steps: int) -> Schedule:
    """The schedule of `steps` Newton–Schulz steps.

    `polynomial` is one of `NAMES`, one triple (a, b, c) that every step repeats, or a list of triples, one per step. A
    list says its own length; beside it `steps` must be that length or the default of 5. "minimax" is `widest_schedule`.

    Raises:
        ValueError: an unknown name, a malformed triple, or a step count the family doesn't have.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < MAX_STEPS:
        raise ValueError(f"ns_steps must be an integer from 1 to {MAX_STEPS - 1}, got {steps!r}")
    if isinstance(polynomial, str):
        return _named(polynomial, steps)
    if isinstance(polynomial, Sequence) and len(polynomial) == 3 and all(isinstance(c, (int, float)) for c in polynomial):
        return Schedule((_triple(polynomial),) * steps)
    schedule = explicit_schedule(polynomial)
    if steps not in (len(schedule), 5):
        raise ValueError(
            f"polynomial lists {len(schedule)} steps but the step count is {steps}: give one (a, b, c) per step, or one "
            "triple (a, b, c) outside a list to repeat it"
        )
    return schedule


def explicit_schedule(schedule: object) -> Schedule:
    """A `Schedule` as it is, or one with Frobenius normalisation from a list of (a, b, c)."""
    return schedule if isinstance(schedule, Schedule) else Schedule(schedule)  # type: ignore[arg-type]  # Schedule checks it


def _triple(step: object) -> Coefficients:
    if not isinstance(step, Sequence) or isinstance(step, str) or len(step) != 3:
        raise ValueError(f"a Newton–Schulz step is three numbers (a, b, c), got {step!r}")
    a, b, c = (float(v) for v in step)
    if not all(math.isfinite(v) for v in (a, b, c)):
        raise ValueError(f"a Newton–Schulz step must be finite, got {step!r}")
    return (a, b, c)


@functools.cache
def _named(name: str, steps: int) -> Schedule:
    if name in REPEATED:
        return Schedule(REPEATED[name].first(steps))
    if name == "deepseek_v4":
        if steps < 3:
            raise ValueError(f"deepseek_v4 ends with two (2, -1.5, .5) steps after the others: steps must be >= 3, got {steps}")
        return Schedule((JORDAN,) * (steps - 2) + (DEEPSEEK_V4_LAST,) * 2)
    if name == "minimax":
        return widest_schedule(steps)
    if name in ("polar_express", "cans"):
        cushion = POLAR_EXPRESS_CUSHION if name == "polar_express" else 0.0
        lower = PUBLISHED_LOWER
        if image(greedy_minimax(lower, steps, cushion=cushion), lower) < 1 - TOLERANCE:
            lower = _lowest_reached(steps, TOLERANCE, cushion=cushion)
        schedule = greedy_minimax(lower, steps, cushion=cushion)
        if name == "cans":
            return Schedule(schedule)
        s = POLAR_EXPRESS_SAFETY
        return Schedule(tuple((a / s, b / s**3, c / s**5) for a, b, c in schedule[:-1]) + schedule[-1:])
    raise ValueError(f"unknown polynomial {name!r}: choose one of {', '.join(NAMES)}, or give a list of (a, b, c)")


def minimax_schedule(lower: float, steps: int, *, tol: float | None = None, safety: float = SAFETY) -> Schedule:
    """The schedule that brings singular values in [lower, 1] nearest to 1 in `steps` steps, each the best odd quintic for what
    the ones before it leave (Polar Express, arXiv 2505.16932: greedy is optimal for the composition).

    X is divided by its Schatten-8 norm. Schedules are cached, and `lower` is rounded down to a power of 10^(1/8).

    Args:
        lower: the smallest singular value that counts, in (0, 1), relative to the normalised X.
        steps: Newton–Schulz steps.
        tol: what must be reached, |p(x) − 1| <= tol on [lower, 1]; None asks for nothing.
        safety: every step is designed for an interval whose upper end is this much larger, at least 1, so that rounding and an
            underestimated norm don't make it diverge.

    Raises:
        ValueError: arguments outside their range, or a `tol` that `steps` steps don't reach.
    """
    _check_tolerance(tol if tol is not None else TOLERANCE)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < MAX_STEPS:
        raise ValueError(f"steps must be an integer from 1 to {MAX_STEPS - 1}, got {steps!r}")
    if not 1 <= safety <= 1.5:
        raise ValueError(f"safety must lie in [1, 1.5], got {safety!r}")
    bound = _rounded_down(lower)
    schedule = _greedy_schedule(bound, steps, safety)
    if tol is not None and image(schedule.steps, bound) < 1 - tol:
        raise ValueError(
            f"{steps} steps bring [{lower:g}, 1] to within {1 - image(schedule.steps, bound):.2f} of 1, not {tol:g}: "
            f"give {steps_for(lower, tol, safety=safety)} steps, or a larger lower bound or tol"
        )
    return schedule


def steps_for(lower: float, tol: float = TOLERANCE, *, safety: float = SAFETY) -> int:
    """The fewest steps after which the generated schedule for [lower, 1] lies within `tol` of 1."""
    _check_tolerance(tol)
    bound = _rounded_down(lower)
    return next(k for k in range(1, MAX_STEPS) if image(_greedy_schedule(bound, k, safety).steps, bound) >= 1 - tol)


@functools.cache
def widest_schedule(steps: int, tol: float = TOLERANCE, *, safety: float = SAFETY, normalisation: str = "schatten8") -> Schedule:
    """The schedule of `steps` steps that brings the longest interval [lower, 1] to within `tol` of 1: one for each step count."""
    _check_tolerance(tol)
    lower = _lowest_reached(steps, round(tol, 2), safety=safety)
    return Schedule(greedy_minimax(lower, steps, safety=safety), normalisation)


def image(steps: Sequence[Coefficients], x: Number) -> Number:
    """What the steps make of a singular value x, or of each in an array."""
    for a, b, c in steps:
        x = _quintic(a, b, c, x)
    return x


def _quintic(a: float, b: float, c: float, x: Number) -> Number:
    """By multiplications alone, which every CPU rounds alike; of powers and of BLAS the last bits differ."""
    square = x * x
    return x * (a + square * (b + square * c))


def _check_tolerance(tol: float) -> None:
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0.01 <= tol < 1:
        raise ValueError(f"tol must be a number in [0.01, 1), got {tol!r}")


def _rounded_down(lower: float) -> float:
    if isinstance(lower, bool) or not isinstance(lower, (int, float)) or not 1e-16 <= lower < 1:
        raise ValueError(f"lower must be a number in [1e-16, 1), got {lower!r}")
    return float(10 ** (math.floor(BOUNDS_PER_DECADE * math.log10(lower) + 1e-9) / BOUNDS_PER_DECADE))


@functools.cache
def _greedy_schedule(lower: float, steps: int, safety: float) -> Schedule:
    return Schedule(greedy_minimax(lower, steps, safety=safety), "schatten8")


def greedy_minimax(lower: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> tuple[Coefficients, ...]:
    """Odd quintics, each the best approximation of 1 on the interval that the ones before it leave of [lower, 1].

    `cushion` keeps a step's own interval from being wider than [cushion·u, u] (Polar Express, arXiv 2505.16932,
    section 3.4); the step is then rescaled so that the whole interval maps symmetrically around 1. `safety` widens a step's
    own interval [l, u] to [l, safety·u]. Ranks must compute with the same coefficients, whatever their CPUs: no BLAS here, and twelve
    digits.
    """
    schedule, low, high = [], lower, 1.0
    for _ in range(steps):
        a, b, c = _minimax_quintic(max(low, cushion * high), safety * high)
        at_low, at_high = (_quintic(a, b, c, x) for x in (low, safety * high))
        centre = 2.0 / (at_low + at_high)
        a, b, c = (_rounded(v * centre) for v in (a, b, c))
        schedule.append((a, b, c))
        low = _quintic(a, b, c, low)
        high = 2.0 - low
    return tuple(schedule)


@functools.cache
def _lowest_reached(steps: int, tol: float, *, cushion: float = 0.0, safety: float = 1.0) -> float:
    """The smallest lower bound that `steps` greedy steps bring to within `tol` of 1 (bisection in the logarithm)."""
    low, high = math.log(1e-16), math.log(1 - 0.5 * tol)
    for _ in range(60):
        middle = 0.5 * (low + high)
        lower = math.exp(middle)
        if image(greedy_minimax(lower, steps, cushion=cushion, safety=safety), lower) >= 1 - tol:
            high = middle
        else:
            low = middle
    return _rounded(math.exp(high))


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _minimax_quintic(low: float, high: float) -> Coefficients:
    """The odd quintic p that minimises max |1 - p(x)| on [low, high], by Remez's exchange.

    The error equioscillates at low, two interior extrema and high, so each round solves four linear equations for
    (a, b, c, error) and moves the interior points to the extrema of the new p.
    """
    if low > high * (1 - 5e-6):  # the interval is a point in floating point: Newton–Schulz of order five
        return (1.875 / high, -1.25 / high**3, 0.375 / high**5)
    inner = [low + (high - low) * 0.25, low + (high - low) * 0.75]
    error, a, b, c = math.inf, 0.0, 0.0, 0.0
    for _ in range(100):
        points = (low, *inner, high)
        a, b, c, new_error = _solve([[x, x * x * x, x * x * x * x * x, sign, 1.0] for x, sign in zip(points, (1.0, -1.0) * 2, strict=True)])
        # p'(x) = a + 3b·x² + 5c·x⁴ = 0
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = sorted(math.sqrt(max((-3 * b + sign * root) / (10 * c), 0.0)) for sign in (1, -1))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
    return (a, b, c)


def _solve(rows: list[list[float]]) -> list[float]:
    """Linear equations, each with its right side last, by elimination with partial pivoting."""
    size = len(rows)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    result = [0.0] * size
    for k in reversed(range(size)):
        known = sum(rows[k][j] * result[j] for j in range(k + 1, size))
        result[k] = (rows[k][size] - known) / rows[k][k]
    return result
