"""From measured spectra to a schedule: what may be chosen, what of it is enough, and which is cheapest.

Nothing here depends on ranks or timing. What a schedule costs depends on the kind of device, by `polar.cost`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..polar.cost import flops_of
from ..polar.forms import BANDS, DEEP
from ..polar.newton_schulz import default_compute_dtype, orthogonalize
from ..polar.polynomials import TOLERANCE, Schedule, image, schedule_for, widest_schedule
from ..polar.products import SymmetricProducts, products_on
from .moments import NOISE_FLOOR, QUANTILES, RESOLVED_GAIN, Spectrum, spectrum_from_moments
from .record import MOST_STEPS, Choice, Decision
from .scaling_law import layer_kind, shipped_laws

# The default, and its fewest steps: the loosest that keeps the loss of five Jordan steps (README.md, "Loss")
ACCURACY, FEWEST = "jordan4", 2
ACCURACIES = tuple(f"jordan{k}" for k in range(3, 9))

# Generated schedules touch the band's edges all over their interval, so they are made for one that is this much narrower
BAND_MARGIN = 0.02
# What may be deflated, in parts of the rank; and the least, since fewer take as long (4 of 256 took twice the time of 16, measured)
DEFLATIONS, LEAST = (64, 32, 16, 8), 16
# Another choice is taken only where it saves so much and does so much better than asked, or costs no more and does so much better than
# the one in use, so that decisions don't flicker
HYSTERESIS = 0.02
# Where no schedule reaches the coverage, more is not paid for less than this
WORTHWHILE = 0.01
# The prior lowers every predicted quantile by so many standard deviations
PRIOR_CAUTION = 2.0

FAMILIES = ("minimax", "jordan")
FIVE = schedule_for("jordan", 5)


@dataclass(frozen=True)
class Work:
    """What tells the cost of a schedule for a matrix: its shape, and how products are taken."""

    rows: int
    cols: int
    compute_dtype: torch.dtype
    products: SymmetricProducts

    @property
    def rank(self) -> int:
        return min(self.rows, self.cols)

    def flops(self, schedule: Schedule) -> int:
        return flops_of(self.rows, self.cols, schedule, self.compute_dtype, self.products)


@dataclass(frozen=True)
class Policy:
    """What `ns_steps="adaptive"` was asked for.

    Attributes:
        accuracy: "jordan4": the cheapest schedule that leaves a matrix no further from UVᵀ than four Jordan steps, and none that is dearer
            than they are; "jordan3" to "jordan8" likewise. None: "jordan4", unless `coverage` is given.
        coverage: instead, the share of the directions above the noise floor to bring within `tol` of 1, at any price.
        tol: half the width of the band around 1; .3 for None, and only with `coverage`.
        min_ns_steps, max_ns_steps: bounds of the step count. None: at least 2, or 1 with `coverage`.
        measure_every: steps between two measurements of a matrix, once the first few, which are denser, are over.
        burn_in: steps before the first measurement; until it takes effect the prior holds.
        polynomial: "minimax", generated for each step count, or "jordan".
        deflation: dominant directions that are flattened before the steps; None: none, or 1/64 to an eighth of the rank, whatever is
            cheapest in the end.
        floor: noise floor relative to ‖M‖_F.
        normalisation: of the generated polynomials; the Jordan family keeps Frobenius.
    """

    accuracy: str | None = None
    coverage: float | None = None
    tol: float | None = None
    min_ns_steps: int | None = None
    max_ns_steps: int = 12
    measure_every: int = 100
    burn_in: int = 0
    polynomial: str = "minimax"
    deflation: int | None = None
    floor: float = NOISE_FLOOR
    normalisation: str = "schatten8"

    def __post_init__(self) -> None:
        def number(name: str, low: float, high: float) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
                raise ValueError(f"{name} must be a number in ({low:g}, {high:g}], got {value!r}")

        if self.accuracy is not None and self.coverage is not None:
            raise ValueError(f"accuracy={self.accuracy!r} and coverage={self.coverage!r} are two ways to say what is enough: give one")
        if self.accuracy is not None and self.accuracy not in ACCURACIES:
            raise ValueError(
                f"accuracy={self.accuracy!r}: choose one of {', '.join(ACCURACIES)}, no further from UVᵀ than so many Jordan steps"
            )
        if self.coverage is not None:
            number("coverage", 0, 1)
        if self.tol is not None:
            number("tol", 0.03, 0.9)
            if self.coverage is None:
                raise ValueError(f"tol={self.tol!r} is the width of coverage's band: give coverage as well, or leave tol out")
        number("floor", 0, 0.1)
        for name, least in (("min_ns_steps", 1), ("max_ns_steps", 1), ("measure_every", 2), ("burn_in", 0), ("deflation", 0)):
            value = getattr(self, name)
            if value is None and name in ("deflation", "min_ns_steps"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.max_ns_steps > MOST_STEPS:
            raise ValueError(f"max_ns_steps is at most {MOST_STEPS}, got {self.max_ns_steps}: floating point resolves no more")
        if self.min_ns_steps is not None and self.min_ns_steps > self.max_ns_steps:
            raise ValueError(f"min_ns_steps={self.min_ns_steps} is above max_ns_steps={self.max_ns_steps}")
        if self.polynomial not in FAMILIES:
            raise ValueError(
                f"ns_steps='adaptive' generates its polynomials and takes polynomial={' or '.join(map(repr, FAMILIES))}, not "
                f"{self.polynomial!r}: leave polynomial out, or give a fixed ns_steps"
            )

    @property
    def fewest(self) -> int:
        """The fewest steps that may be chosen."""
        if self.min_ns_steps is not None:
            return self.min_ns_steps
        return min(FEWEST, self.max_ns_steps) if self.reference is not None else 1

    @property
    def band(self) -> float:
        """Half the width of the band around 1 in which a direction counts as covered."""
        return TOLERANCE if self.tol is None else self.tol

    @functools.cached_property
    def reference(self) -> Schedule | None:
        """The Jordan steps that set the error to be met; None where a coverage is asked for."""
        if self.coverage is not None:
            return None
        return schedule_for("jordan", int(re.sub(r"\D", "", self.accuracy or ACCURACY)))

    def schedule(self, choice: Choice) -> Schedule:
        """The schedule of a choice."""
        return _schedule(choice, self.normalisation)

    @functools.cached_property
    def probe(self) -> Choice:
        """The fewest steps that resolve the noise floor, whatever the spectrum."""
        tol = self._bands[len(self._bands) // 2]
        choices = (Choice(0, k, tol) for k in range(1, MOST_STEPS))
        resolving = (c for c in choices if image(self.schedule(c).steps, self.floor) >= RESOLVED_GAIN)
        return next(resolving, Choice(0, MOST_STEPS, tol))

    @property
    def _bands(self) -> tuple[float, ...]:
        """What schedules are generated for. Where an error is to be met a narrow one serves spectra that lie high, a wide one others."""
        if self.polynomial == "jordan":
            return (0.0,)
        return BANDS if self.reference is not None else (round(self.band - BAND_MARGIN, 2),)

    def choices(self, work: Work, *, deep: bool = False) -> tuple[tuple[int, Choice], ...]:
        """What may be chosen for a matrix, with its FLOPs, the cheapest first; nothing dearer than the Jordan steps of `accuracy`.

        `deep`: instead, what takes more than `DEEP` steps, for a coverage that nothing else reaches. Such schedules are in no table of
        forms, and seldom needed.
        """
        return _choices(self, work, deep)

    def best(
        self, spectra: Sequence[Spectrum], work: Work, *, now: Choice | None = None, below: float | None = None, most: int | None = None
    ) -> Choice:
        """The cheapest choice that is enough for all of the spectra, which are of matrices of one shape; or the one that comes nearest.

        Of choices that cost the same it is the nearest. `now` is the choice in use, which is kept where another saves or gains little;
        `below` as in `Spectrum.coverage`; `most`: FLOPs that it must not exceed.
        """
        quality = self._quality(spectra, work, below)
        tried: list[Choice] = []
        for deep in (False, True):
            priced = self.choices(work, deep=deep)
            allowed = [(cost, choice) for cost, choice in priced if most is None or cost <= most] or list(() if tried else priced[:1])
            tried += [choice for _, choice in allowed]
            for cost, alike in itertools.groupby(allowed, key=operator.itemgetter(0)):
                nearest = max((choice for _, choice in alike), key=quality)
                if (better := quality(nearest)) < 0.0:
                    continue
                if now is not None and now != nearest and (slack := quality(now)) >= 0.0:
                    kept = work.flops(self.schedule(now))
                    cheaper = cost <= (1 - HYSTERESIS) * kept and better >= HYSTERESIS
                    closer = cost <= kept and better >= slack + HYSTERESIS
                    if kept <= (most or kept) and not (cheaper or closer):
                        return now
                return nearest
        enough = max(map(quality, tried)) - (WORTHWHILE if self.reference is None else 0.0)
        return next(choice for choice in tried if quality(choice) >= enough)

    def _quality(self, spectra: Sequence[Spectrum], work: Work, below: float | None) -> Callable[[Choice], float]:
        """What tells by how much a choice does better than is asked for: a share of the error, or of the directions."""
        known: dict[Choice, float] = {}

        def quality(choice: Choice) -> float:
            if choice not in known:  # with all that deflate as much, which together cost little more
                listed = [c for _, c in self.choices(work, deep=choice.steps > DEEP)]
                alike = [c for c in listed if (c.deflation, c.tol == 0) == (choice.deflation, choice.tol == 0)]
                alike = alike if choice in alike else [choice]
                known.update(zip(alike, np.min([worth(s, alike) for s in spectra], axis=0).tolist(), strict=True))
            return known[choice]

        def worth(spectrum: Spectrum, alike: Sequence[Choice]) -> np.ndarray:
            schedules = [self.schedule(c) for c in alike]
            if self.reference is None:
                result: np.ndarray = spectrum.coverages(schedules, tol=self.band, floor=self.floor, below=below) - (self.coverage or 0.0)
            else:
                target = spectrum.error(self.reference, floor=self.floor)
                result = 1 - spectrum.errors(schedules, floor=self.floor) / max(target, 1e-9)
            return result

        return quality

    def decide(self, spectrum: Spectrum, work: Work, before: Decision, *, reaches_floor: bool) -> Decision:
        """What a measured spectrum makes of the decision before."""
        kept = before.below if self.reference is None else math.nan  # that of an early step would be stale, and nothing measures it anew
        below = round(spectrum.share_below(self.floor), 6) if reaches_floor else kept
        known = None if math.isnan(below) else below
        choice = self.best([spectrum], work, now=before.choice if before.measurements else None, below=known)
        return self.described(choice, spectrum, measurements=before.measurements + 1, below=below)

    def described(self, choice: Choice, spectrum: Spectrum, *, measurements: int, below: float = math.nan) -> Decision:
        """A decision for a choice, with what the spectrum tells of it."""
        known = None if math.isnan(below) else below
        return Decision(
            choice=choice,
            measurements=measurements,
            error=spectrum.error(self.schedule(choice), floor=self.floor, below=known),
            error_of_five=spectrum.error(FIVE, floor=self.floor, below=known),
            coverage=spectrum.coverage(self.schedule(choice), tol=self.band, floor=self.floor, below=known),
            below=below,
            quantiles=tuple(math.nan if (s := spectrum.quantile(q)) is None else s for q in QUANTILES),
        )

    def to_measure(self, choice: Choice, work: Work, *, floor: bool) -> Choice:
        """What a matrix is measured with: one step more than it takes, which shows directions that are now left small.

        Not where that is dearer than five Jordan steps. With `floor`, as many steps as resolve the noise floor, whatever they cost.
        """
        if floor and self.probe.steps > choice.steps:
            return self.probe
        more = choice._replace(steps=choice.steps + 1)
        return more if work.flops(self.schedule(more)) <= work.flops(FIVE) else choice

    def prior(self, name: str, part: int, parts: int, depth: float, work: Work) -> Choice:
        """The choice for a matrix that has not been measured, by the shipped scaling laws; never dearer than five Jordan steps."""
        return _prior(self, layer_kind(name, part, parts), depth, work)


@functools.lru_cache(maxsize=4096)
def _prior(policy: Policy, kind: str | None, depth: float, work: Work) -> Choice:
    """Cached, since a model has many matrices alike: experts above all."""
    predicted = [shipped_laws().spectrum(kind, depth, max(work.rank, 1), caution=caution) for caution in (0.0, PRIOR_CAUTION)]
    return policy.best(predicted, work, most=work.flops(FIVE))


@functools.lru_cache(maxsize=1024)
def _choices(policy: Policy, work: Work, deep: bool) -> tuple[tuple[int, Choice], ...]:
    if policy.deflation is not None:
        deflations = [min(policy.deflation, work.rank)]
    elif policy.polynomial == "jordan":
        deflations = [0]
    else:
        deflations = sorted({0, *(min(max(LEAST, work.rank // share), work.rank // DEFLATIONS[-1]) for share in DEFLATIONS)})
    bands = policy._bands
    counts = [k for k in range(policy.fewest, policy.max_ns_steps + 1) if (k > DEEP) == deep]
    found = [Choice(d, k, tol) for d in deflations for k in counts for tol in bands]
    if (reference := policy.reference) is not None:
        if deep and policy.fewest <= DEEP:
            return ()
        own = Choice(0, len(reference), 0.0)
        if own not in found and own.steps in counts and policy.deflation in (None, 0):
            found.append(own)
        found = [c for c in found if c.steps <= len(reference) + 2] or found  # longer ones are dearer, and need not be priced
    priced = sorted((work.flops(policy.schedule(c)), c) for c in found)
    if reference is not None:
        most = work.flops(reference)
        priced = [(cost, c) for cost, c in priced if cost <= most] or priced[:1]
    return tuple(priced)


@functools.cache
def _schedule(choice: Choice, normalisation: str) -> Schedule:
    if choice.tol == 0.0:
        return dataclasses.replace(schedule_for("jordan", choice.steps), deflation=choice.deflation)
    return dataclasses.replace(widest_schedule(choice.steps, choice.tol, normalisation=normalisation), deflation=choice.deflation)


def choose_schedule(
    x: Tensor,
    *,
    accuracy: str | None = None,
    coverage: float | None = None,
    tol: float | None = None,
    max_steps: int = 12,
    floor: float = NOISE_FLOOR,
    deflation: int | None = None,
) -> Schedule:
    """The cheapest schedule that is enough for a matrix, measured by one orthogonalisation.

    No singular value decomposition is computed: the spectrum is read from the moments of Newton–Schulz iterates, at the cost of
    that one orthogonalisation (6 steps at the default floor). Measure seldom and use the schedule often.

    Args:
        x: (..., m, n), floating point. Of several matrices the one that needs most decides.
        accuracy: "jordan3" to "jordan8": leave x no further from UVᵀ than so many Jordan steps do, and take nothing dearer than they are on
            this device; at least two steps, which training needs. None: "jordan4", unless `coverage` is given.
        coverage: instead, the share of the directions above the noise floor to bring into [1 − tol, 1 + tol], in (0, 1], at any price.
        tol: half the width of that band; None: .3.
        max_steps: the most steps to take; where they don't reach what is asked, the returned schedule's `error` and `coverage` say so.
        floor: noise floor relative to ‖x‖_F; directions below it are not counted.
        deflation: dominant directions to flatten first; None: 0, or up to an eighth of the rank, whichever is cheapest in the end.

    Returns:
        A `Schedule`: `.steps`, one (a, b, c) each; `.error`, the root mean square of (gain − 1), and `.coverage`, both estimates;
        `.quantiles`, q -> σ_q/‖x‖_F or None where the measurement doesn't resolve it. A zero matrix gets one step, error 0, coverage 1 and
        no quantiles.

    Raises:
        ValueError: an empty or non-floating x, or an argument outside its range.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or not 1 <= max_steps <= MOST_STEPS:
        raise ValueError(f"max_steps must be an integer from 1 to {MOST_STEPS}, got {max_steps!r}")
    policy = Policy(accuracy=accuracy, coverage=coverage, tol=tol, max_ns_steps=max_steps, deflation=deflation, floor=floor)
    if x.ndim >= 2 and x.numel() == 0:
        raise ValueError(f"choose_schedule needs a matrix with elements, got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("choose_schedule needs finite values, got NaN or infinity")
    measured_with = policy.schedule(policy.probe)
    _, moments = orthogonalize(x, schedule=measured_with, return_moments=True)
    work = Work(x.shape[-2], x.shape[-1], default_compute_dtype(x.device, x.dtype), products_on(x.device.type))
    rows = moments.reshape(-1, moments.shape[-1]).cpu().numpy()
    spectra = [s for row in rows if (s := spectrum_from_moments(row, measured_with, work.rank)) is not None]
    if not spectra:
        one = Choice(0, 1, policy._bands[0])
        return dataclasses.replace(policy.schedule(one), error=0.0, coverage=1.0, quantiles={})
    choice = policy.best(spectra, work)
    described = [policy.described(choice, s, measurements=1) for s in spectra]
    worst = max(range(len(spectra)), key=lambda k: described[k].error)
    return dataclasses.replace(
        policy.schedule(choice),
        error=described[worst].error,
        coverage=min(d.coverage for d in described),
        quantiles={q: spectra[worst].quantile(q) for q in QUANTILES},
    )
