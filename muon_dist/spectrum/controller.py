"""From measured spectra to a schedule for each matrix: which matrix is measured at which step, and what its steps become.

Nothing here depends on ranks, devices or timing: every rank of a domain is given the same moments, so all of them make the same
decisions. What is remembered of a matrix is one row of numbers, which is its state in checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..polar.newton_schulz import moment_count, orthogonalize
from ..polar.polynomials import TOLERANCE, Schedule, image, schedule_for, widest_schedule
from .moments import NOISE_FLOOR, QUANTILES, RESOLVED_GAIN, Spectrum, spectrum_from_moments
from .scaling_law import layer_kind, shipped_laws

# Generated schedules touch the band's edges all over their interval, so they are made for one that is this much narrower
BAND_MARGIN = 0.02
# Fewer steps are taken only where they are expected to cover this much more than asked, so that decisions don't flicker
HYSTERESIS = 0.02
# Where no schedule reaches the target, more steps are not taken for less than this
WORTHWHILE = 0.01
# Every so many measurements one runs enough steps to see the noise floor
PROBE_EVERY = 8
# The prior lowers every predicted quantile by so many standard deviations
PRIOR_CAUTION = 2.0
# Steps between a measurement and its effect. Moments are shared and copied to the host meanwhile.
LAG = 2

MOST_STEPS = 16
FAMILIES = ("minimax", "jordan")


@dataclass(frozen=True)
class Policy:
    """What `ns_steps="adaptive"` was asked for.

    Attributes:
        coverage: share of the directions above the noise floor to bring within `tol` of 1.
        tol: half the width of the band around 1.
        min_ns_steps, max_ns_steps: bounds of the step count. Rare probes of the noise floor may take up to 6.
        measure_every: steps between two measurements of a matrix.
        burn_in: steps before the first measurement; until it takes effect the prior holds.
        polynomial: "minimax", generated for each step count, or "jordan".
        deflation: dominant directions taken out before the rest is iterated.
        floor: noise floor relative to ‖M‖_F.
        normalisation: of the generated polynomials; the Jordan family keeps Frobenius.
    """

    coverage: float = 0.9
    tol: float = TOLERANCE
    min_ns_steps: int = 2
    max_ns_steps: int = 12
    measure_every: int = 50
    burn_in: int = 50
    polynomial: str = "minimax"
    deflation: int = 0
    floor: float = NOISE_FLOOR
    normalisation: str = "schatten8"

    def __post_init__(self) -> None:
        def number(name: str, low: float, high: float) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
                raise ValueError(f"{name} must be a number in ({low:g}, {high:g}], got {value!r}")

        number("coverage", 0, 1)
        number("tol", 0.03, 0.9)
        number("floor", 0, 0.1)
        for name, least in (("min_ns_steps", 1), ("max_ns_steps", 1), ("measure_every", LAG), ("burn_in", 0), ("deflation", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.max_ns_steps > MOST_STEPS:
            raise ValueError(f"max_ns_steps is at most {MOST_STEPS}, got {self.max_ns_steps}: floating point resolves no more")
        if self.min_ns_steps > self.max_ns_steps:
            raise ValueError(f"min_ns_steps={self.min_ns_steps} is above max_ns_steps={self.max_ns_steps}")
        if self.polynomial not in FAMILIES:
            raise ValueError(
                f"ns_steps='adaptive' generates its polynomials and takes polynomial={' or '.join(map(repr, FAMILIES))}, not "
                f"{self.polynomial!r}: leave polynomial out, or give a fixed ns_steps"
            )

    def schedule(self, steps: int) -> Schedule:
        """The family's schedule of that many steps."""
        return _schedule(self.polynomial, steps, self.tol, self.deflation, self.normalisation)

    @functools.cached_property
    def probe(self) -> int:
        """The fewest steps that resolve the noise floor, whatever the spectrum: what a probe takes, also above max_ns_steps."""
        resolving = (k for k in range(1, MOST_STEPS) if image(self.schedule(k).steps, self.floor) >= RESOLVED_GAIN)
        return next(resolving, MOST_STEPS)

    def fewest_steps(self, spectrum: Spectrum, *, below: float | None = None, now: int | None = None) -> tuple[int, float]:
        """The cheapest step count that covers enough, and what it is expected to cover.

        `now` is the step count in use, which asks fewer steps for a margin; `below` as in `Spectrum.coverage`.
        """
        expected: dict[int, float] = {}
        for k in range(self.min_ns_steps, self.max_ns_steps + 1):
            coverage = spectrum.coverage(self.schedule(k), tol=self.tol, floor=self.floor, below=below)[0]
            expected[k] = round(coverage, 6)  # last bits differ between CPUs, and all ranks must decide alike
            if expected[k] >= self.coverage + (HYSTERESIS if now is not None and k < now else 0.0):
                return k, expected[k]
        best = max(expected.values())
        return next((k, value) for k, value in expected.items() if value >= best - WORTHWHILE)

    def prior(self, name: str, part: int, parts: int, depth: float, rank: int) -> int:
        """Steps for a matrix that has not been measured: what the shipped scaling laws predict, on the safe side."""
        return _prior(self, layer_kind(name, part, parts), depth, max(rank, 1))


@functools.cache
def _prior(policy: Policy, kind: str | None, depth: float, rank: int) -> int:
    """Cached, since a model has many matrices alike: experts above all."""
    return policy.fewest_steps(shipped_laws().spectrum(kind, depth, rank, caution=PRIOR_CAUTION))[0]


@functools.cache
def _schedule(polynomial: str, steps: int, tol: float, deflation: int, normalisation: str) -> Schedule:
    if polynomial == "jordan":
        chosen = schedule_for("jordan", steps)
    else:
        chosen = widest_schedule(steps, round(tol - BAND_MARGIN, 2), normalisation=normalisation)
    return dataclasses.replace(chosen, deflation=deflation)


# What is remembered of a matrix, by position in its row
TAKEN, STEPS, MEASUREMENTS, BELOW, COVERAGE = range(5)
FIRST_QUANTILE = 5
MEASURED_AT = FIRST_QUANTILE + len(QUANTILES)  # of a measurement that hasn't taken effect; -1 for none
MEASURED_WITH = MEASURED_AT + 1
FIRST_MOMENT = MEASURED_AT + 2
ROW_WIDTH = FIRST_MOMENT + moment_count(MOST_STEPS)


class Controller:
    """Decides how many steps one matrix gets, from the measurements it is given.

    Args:
        policy: what was asked for.
        rank: min(rows, cols).
        row: (ROW_WIDTH,) fp64, kept up to date in place; everything that a resumed run needs.

    Attributes:
        phase: when in the cycle of `measure_every` steps this matrix is measured, so that few are at the same time.
    """

    def __init__(self, policy: Policy, rank: int, row: np.ndarray) -> None:
        self.policy, self.rank, self.row, self.phase = policy, rank, row, 0

    @staticmethod
    def new_row(prior: int) -> np.ndarray:
        """The row of a matrix about which nothing is known but its prior step count."""
        row = np.full(ROW_WIDTH, math.nan)
        row[TAKEN], row[STEPS], row[MEASUREMENTS], row[MEASURED_AT] = 0, prior, 0, -1
        return row

    @property
    def steps(self) -> int:
        """The step count in use; a bound that has changed since it was chosen holds at once."""
        return min(max(int(self.row[STEPS]), self.policy.min_ns_steps), self.policy.max_ns_steps)

    @property
    def schedule(self) -> Schedule:
        return self.policy.schedule(self.steps)

    def measures_with(self) -> int | None:
        """The step count of the measurement that is due at the coming step, or None."""
        since = int(self.row[TAKEN]) - self.policy.burn_in - self.phase
        if since < 0 or since % self.policy.measure_every or self.row[MEASURED_AT] >= 0:
            return None
        return max(self.policy.probe, self.steps) if self.row[MEASUREMENTS] % PROBE_EVERY == 0 else self.steps

    def take_step(self) -> None:
        """Count a step, after what was due has been measured."""
        self.row[TAKEN] += 1

    def measured(self, moments: Sequence[float] | np.ndarray, steps: int, at: int) -> None:
        """Take note of what was measured at step number `at` with so many steps; it takes effect LAG steps later."""
        self.row[MEASURED_AT], self.row[MEASURED_WITH] = at, steps
        self.row[FIRST_MOMENT : FIRST_MOMENT + moment_count(steps)] = moments

    def is_lag_over(self, at: int) -> bool:
        """Whether what was measured at step number `at` takes effect before the coming step."""
        return bool(self.row[TAKEN] >= at + LAG)

    def due(self) -> bool:
        """Whether a measurement takes effect before the coming step."""
        return bool(self.row[MEASURED_AT] >= 0) and self.is_lag_over(int(self.row[MEASURED_AT]))

    def decide(self) -> bool:
        """Let a due measurement take effect; whether the step count changed.

        A matrix that was zero then, or whose step was skipped, tells nothing: its schedule stands still.
        """
        before, with_steps = self.steps, int(self.row[MEASURED_WITH])
        moments = self.row[FIRST_MOMENT : FIRST_MOMENT + moment_count(with_steps)]
        spectrum = spectrum_from_moments(moments, self.policy.schedule(with_steps), self.rank)
        self.row[MEASURED_AT], self.row[FIRST_MOMENT:] = -1, math.nan
        if spectrum is None:
            return False
        if with_steps >= self.policy.probe:
            self.row[BELOW] = round(spectrum.share_below(self.policy.floor), 6)
        below = None if math.isnan(self.row[BELOW]) else float(self.row[BELOW])
        now = self.steps if self.row[MEASUREMENTS] > 0 else None
        self.row[STEPS], self.row[COVERAGE] = self.policy.fewest_steps(spectrum, below=below, now=now)
        self.row[FIRST_QUANTILE:MEASURED_AT] = [math.nan if (s := spectrum.quantile(q)) is None else s for q in QUANTILES]
        self.row[MEASUREMENTS] += 1
        return self.steps != before

    def report(self) -> dict[str, float | int | None]:
        """What is known of the matrix, for telemetry: None for what was not measured or is below the resolution."""
        quantiles = self.row[FIRST_QUANTILE:MEASURED_AT]
        known = {f"sigma_{q:g}": None if math.isnan(s) else float(s) for q, s in zip(QUANTILES, quantiles, strict=True)}
        unless_nan = {
            name: None if math.isnan(self.row[at]) else float(self.row[at]) for name, at in (("coverage", COVERAGE), ("below_floor", BELOW))
        }
        return {"ns_steps": self.steps, "measurements": int(self.row[MEASUREMENTS]), **unless_nan, **known}


def choose_schedule(
    x: Tensor,
    *,
    coverage: float = 0.9,
    tol: float = TOLERANCE,
    max_steps: int = 12,
    floor: float = NOISE_FLOOR,
    deflation: int = 0,
) -> Schedule:
    """The cheapest generated schedule that brings enough of a matrix's directions near 1, measured by one orthogonalisation.

    No singular value decomposition is computed: the spectrum is read from the moments of Newton–Schulz iterates, at the cost of
    that one orthogonalisation (6 steps at the default floor). Measure seldom and use the schedule often.

    Args:
        x: (..., m, n), floating point. Of several matrices the one that needs most decides.
        coverage: share of the directions above the noise floor to bring into [1 − tol, 1 + tol], in (0, 1].
        tol: half the width of that band.
        max_steps: the most steps to take; where they don't reach `coverage`, the returned schedule's `coverage` says so.
        floor: noise floor relative to ‖x‖_F; directions below it are not counted.
        deflation: dominant directions to take out first.

    Returns:
        A `Schedule`: `.steps`, one (a, b, c) each; `.coverage`, the estimate; `.quantiles`, q -> σ_q/‖x‖_F or None where
        the measurement doesn't resolve it. A zero matrix gets one step, coverage 1 and no quantiles.

    Raises:
        ValueError: an empty or non-floating x, or an argument outside its range.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or not 1 <= max_steps <= MOST_STEPS:
        raise ValueError(f"max_steps must be an integer from 1 to {MOST_STEPS}, got {max_steps!r}")
    policy = Policy(coverage=coverage, tol=tol, min_ns_steps=1, max_ns_steps=max_steps, deflation=deflation, floor=floor)
    if x.ndim >= 2 and x.numel() == 0:
        raise ValueError(f"choose_schedule needs a matrix with elements, got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("choose_schedule needs finite values, got NaN or infinity")
    measured_with = policy.schedule(policy.probe)
    _, moments = orthogonalize(x, schedule=measured_with, return_moments=True)
    rank = min(x.shape[-2:])
    found: list[tuple[int, float, Spectrum]] = []
    for row in moments.reshape(-1, moments.shape[-1]).cpu().numpy():
        spectrum = spectrum_from_moments(row, measured_with, rank)
        if spectrum is not None:
            found.append((*policy.fewest_steps(spectrum), spectrum))
    if not found:
        return dataclasses.replace(policy.schedule(1), coverage=1.0, quantiles={})
    steps, _, spectrum = max(found, key=lambda f: (f[0], -f[1]))
    chosen = policy.schedule(steps)
    covered = min(s.coverage(chosen, tol=tol, floor=floor)[0] for _, _, s in found)
    return dataclasses.replace(chosen, coverage=covered, quantiles={q: spectrum.quantile(q) for q in QUANTILES})
