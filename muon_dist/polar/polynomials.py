"""Families of Newton–Schulz polynomials: a name and a step count give a schedule.

One step maps the singular values of X by p(x) = a·x + b·x³ + c·x⁵. A **schedule** is one (a, b, c) per step. Schedules
of the minimax families are generated for their step count: the first k steps of a longer schedule leave an output that
is not near 1 anywhere, so nothing here is ever truncated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Union

import numpy as np

Coefficients = tuple[float, float, float]
Polynomial = Union[str, Coefficients, Sequence[Coefficients]]

# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). Repeated, it oscillates in about
# [.68, 1.13] and does not converge.
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)

# The last two of DeepSeek-V4's ten steps; the eight before them are JORDAN.
DEEPSEEK_V4_LAST: Coefficients = (2.0, -1.5, 0.5)

# Polar Express (arXiv 2505.16932) and CANS (arXiv 2506.10935) are both greedy minimax schedules for [1e-3, 1] as
# published; the first widens no interval beyond its cushion and divides all steps but the last by a safety factor.
PUBLISHED_LOWER = 1e-3
POLAR_EXPRESS_CUSHION = 0.02407327424182761
POLAR_EXPRESS_SAFETY = 1.01

# Where a family must be generated for fewer steps than it was published for, its lower bound is the smallest from which
# that many steps reach |p(x) - 1| <= TOLERANCE.
TOLERANCE = 0.3

NAMES = ("jordan", "polar_express", "cans", "deepseek_v4")
MAX_STEPS = 100


def schedule_for(polynomial: Polynomial, steps: int) -> tuple[Coefficients, ...]:
    """The schedule of `steps` Newton–Schulz steps: one (a, b, c) per step.

    `polynomial` is one of `NAMES`, one triple (a, b, c) that every step repeats, or a list of triples, one per step. A
    list says its own length; beside it `steps` must be that length or the default of 5.

    Raises:
        ValueError: an unknown name, a malformed triple, or a step count the family doesn't have.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < MAX_STEPS:
        raise ValueError(f"steps must be an integer from 1 to {MAX_STEPS - 1}, got {steps!r}")
    if isinstance(polynomial, str):
        return _named(polynomial, steps)
    if isinstance(polynomial, Sequence) and len(polynomial) == 3 and all(isinstance(c, (int, float)) for c in polynomial):
        return (_triple(polynomial),) * steps
    schedule = explicit_schedule(polynomial)
    if steps not in (len(schedule), 5):
        raise ValueError(
            f"polynomial lists {len(schedule)} steps but the step count is {steps}: give one (a, b, c) per step, or one "
            "triple (a, b, c) outside a list to repeat it"
        )
    return schedule


def explicit_schedule(schedule: object) -> tuple[Coefficients, ...]:
    """A list of (a, b, c), one per step, as a checked tuple of floats."""
    if not isinstance(schedule, Sequence) or isinstance(schedule, str) or len(schedule) == 0:
        raise ValueError(f"a schedule is a non-empty list of (a, b, c), one per step, got {schedule!r}")
    return tuple(_triple(step) for step in schedule)


def _triple(step: object) -> Coefficients:
    if not isinstance(step, Sequence) or isinstance(step, str) or len(step) != 3:
        raise ValueError(f"a Newton–Schulz step is three numbers (a, b, c), got {step!r}")
    a, b, c = (float(v) for v in step)
    if not all(math.isfinite(v) for v in (a, b, c)):
        raise ValueError(f"a Newton–Schulz step must be finite, got {step!r}")
    return (a, b, c)


@functools.cache
def _named(name: str, steps: int) -> tuple[Coefficients, ...]:
    if name == "jordan":
        return (JORDAN,) * steps
    if name == "deepseek_v4":
        if steps < 3:
            raise ValueError(f"deepseek_v4 ends with two (2, -1.5, .5) steps after the others: steps must be >= 3, got {steps}")
        return (JORDAN,) * (steps - 2) + (DEEPSEEK_V4_LAST,) * 2
    if name in ("polar_express", "cans"):
        cushion = POLAR_EXPRESS_CUSHION if name == "polar_express" else 0.0
        lower = PUBLISHED_LOWER
        if _reach(lower, steps, cushion) < 1 - TOLERANCE:
            lower = _lowest_reached(steps, cushion)
        schedule = greedy_minimax(lower, steps, cushion=cushion)
        if name == "cans":
            return schedule
        s = POLAR_EXPRESS_SAFETY
        return tuple((a / s, b / s**3, c / s**5) for a, b, c in schedule[:-1]) + schedule[-1:]
    raise ValueError(f"unknown polynomial {name!r}: choose one of {', '.join(NAMES)}, or give a list of (a, b, c)")


def greedy_minimax(lower: float, steps: int, *, cushion: float = 0.0) -> tuple[Coefficients, ...]:
    """Odd quintics, each the best approximation of 1 on the interval that the ones before it leave of [lower, 1].

    `cushion` keeps a step's own interval from being wider than [cushion·u, u] (Polar Express, arXiv 2505.16932,
    section 3.4); the step is then rescaled so that the whole interval maps symmetrically around 1.
    """
    schedule, low, high = [], lower, 1.0
    for _ in range(steps):
        a, b, c = _minimax_quintic(max(low, cushion * high), high)
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        centre = 2.0 / (at_low + at_high)
        schedule.append((a * centre, b * centre, c * centre))
        low, high = at_low * centre, 2.0 - at_low * centre
    return tuple(schedule)


def _reach(lower: float, steps: int, cushion: float) -> float:
    """The image of `lower` after the schedule generated for it: how near to 1 its last direction comes."""
    x = lower
    for a, b, c in greedy_minimax(lower, steps, cushion=cushion):
        x = a * x + b * x**3 + c * x**5
    return x


def _lowest_reached(steps: int, cushion: float) -> float:
    """The smallest lower bound that `steps` greedy steps bring to within TOLERANCE of 1 (bisection in the logarithm)."""
    low, high = math.log(1e-16), math.log(0.5)
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _reach(math.exp(middle), steps, cushion) >= 1 - TOLERANCE:
            high = middle
        else:
            low = middle
    return math.exp(high)


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
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, new_error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        # p'(x) = a + 3b·x² + 5c·x⁴ = 0
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        inner = sorted(math.sqrt(max((-3 * b + sign * root) / (10 * c), 0.0)) for sign in (1, -1))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
    return (a, b, c)
