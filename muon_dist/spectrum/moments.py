"""The spectrum of a matrix from the moments that its own Newton–Schulz iterates yield, for any schedule.

Every moment is Σ_j f(t_j) over the singular values t_j of the normalised matrix, for a known function f. Those of the first
iterates tell the large singular values, those of the last iterates the small ones, down to what the steps lift out of the
noise. Fitted is a smooth density of ln t: the exponential of a cubic spline, its roughness penalised as in Silverman, Ann.
Statist. 10, 795 (1982). A matrix has a finite number of singular values, so a moment scatters around its integral by about
Σ f(t_j)²; that scatter weighs the moments, and a moment that one dominant direction decides says little about the rest. Where no smooth
density gives the moments, as for an orthogonal matrix, few atoms do. The idea to read spectra from the iterates: arXiv 2609.33047.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..polar.coefficients import Coefficients
from ..polar.flattening import PLACE, SMALLEST, dominant_ranks
from ..polar.polynomials import TOLERANCE, Schedule, image
from ..polar.recorder import moment_count

Array = np.ndarray

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NOISE_FLOOR = 1e-4  # relative to ‖X‖_F: what lies below is not counted, since more steps only amplify rounding there

DECADES = 8  # the grid of t reaches from 1 down to 1e-8
CELLS = 96
POINTS = 8  # per cell: polynomials oscillate within one
KNOTS = 28
STIFFNESS = 2.0  # prior deviation of a second difference of the spline's coefficients: ln density may bend by that much per knot
SCATTER = 0.3  # of a moment, relative to that of independent singular values, which repel each other
RELATIVE_ERROR = 5e-3  # of a moment, by rounding
RESOLVED_GAIN = 0.3  # a direction is resolved where the steps lift it to at least this
# Deviations are halved: on real momentum, errors were a third to a half of what scatter and stiffness alone promise
CALIBRATION = 0.5
# Mean square misfit of the moments beyond which no smooth density is near: on real momentum it stays below 8, a spike gives hundreds
MOST_MISFIT = 10.0
# Flattened directions are not exact, so that the largest singular value beside them comes out larger than the next one was: by so much in
# the median on momentum of three models, and by nothing above a gap. What was not measured is judged by the worse of both.
LEAK = 1.15
FLATTENED_ERROR = 0.05  # of what flattened directions add to a moment: their subspace is not exact
ATOM_ERROR = 0.1  # deviation of an atom's mass, relative: a guess on the safe side
MOST_ERROR = 0.2  # in ln σ: a quantile that is known no better is not reported

_EDGES = np.linspace(-DECADES * math.log(10), 0.0, CELLS * POINTS + 1)  # of the points' surroundings
_STEP = _EDGES[1] - _EDGES[0]
_POINTS = _EDGES[:-1] + _STEP / 2  # ln t
_CENTRES = _POINTS.reshape(CELLS, POINTS).mean(1)
_WIDTH = DECADES * math.log(10) / (KNOTS - 3)


def _spline_basis() -> Array:
    """Cubic B-splines on equidistant knots at the cells' centres, (CELLS, KNOTS)."""
    x = np.abs((_CENTRES[:, None] - _EDGES[0]) / _WIDTH - (np.arange(KNOTS) - 1)[None, :])
    return np.where(x < 1, (4 - 6 * x**2 + 3 * x**3) / 6, np.where(x < 2, (2 - x) ** 3 / 6, 0.0))


_BASIS = _spline_basis()
_ROUGHNESS = np.diff(np.eye(KNOTS), 2, axis=0) / STIFFNESS
_ROUGHNESS = _ROUGHNESS.T @ _ROUGHNESS + 1e-4 * np.eye(KNOTS)


def _rows(steps: Sequence[Coefficients], x: Array) -> Array:
    """What singular values x add to the moments, (J, …): u, u², u·P(u), P(u)² for every step, and u of the result."""
    rows = []
    for a, b, c in steps:
        u = x * x
        p = b * u + c * u * u
        rows += [u, u * u, u * p, p * p]
        x = x * (a + p)
    return np.stack([*rows, x * x])


@functools.lru_cache(maxsize=256)
def _functions(steps: tuple[Coefficients, ...]) -> tuple[Array, Array, Array]:
    """What a singular value at each point adds to the moments and to the mass, (J, CELLS·POINTS); its average in each cell, (J, CELLS);
    and the average of the products of two such, (J·J, CELLS).
    """
    x = np.exp(_POINTS)
    f = np.concatenate([_rows(steps, x), np.ones((1, len(x)))])
    cells = f.reshape(len(f), CELLS, POINTS)
    return f, cells.mean(2), np.einsum("jgp,kgp->jkg", cells, cells).reshape(-1, CELLS) / POINTS


# Gains are looked up in tables: a hundred schedules are judged for every measurement
_TABLE = np.linspace(-2.5 * DECADES, 0.0, 8001)


@functools.lru_cache(maxsize=1024)
def _gain_table(steps: tuple[Coefficients, ...]) -> Array:
    return np.asarray(image(steps, np.exp(_TABLE)))


@functools.lru_cache(maxsize=256)
def _gain_tables(each: tuple[tuple[Coefficients, ...], ...]) -> Array:
    return np.stack([_gain_table(steps) for steps in each])


def _places(ln_x: Array) -> Array:
    """Where exp(ln_x), at most 1, stands in a table."""
    places = (ln_x - _TABLE[0]) * ((len(_TABLE) - 1) / -_TABLE[0]) + 0.5
    clipped: Array = np.minimum(np.maximum(places, 0), len(_TABLE) - 1).astype(np.intp)
    return clipped


@dataclass(frozen=True, eq=False)
class Spectrum:
    """An estimated distribution of singular values, relative to ‖X‖_F.

    Attributes:
        mass: expected number of directions around each point of a grid in ln t, (CELLS·POINTS,), dominant ones excluded.
        root: (CELLS·POINTS, K), with root·rootᵀ the covariance of `mass`.
        scale: σ/‖X‖_F = scale · t.
        norms: normalisation -> what it divides by, relative to ‖X‖_F, once the dominant directions are flattened.
        resolution: the smallest σ/‖X‖_F that the measurement resolves.
        rank: min(rows, cols), dominant directions included.
        dominant: (d,), σ/‖X‖_F of the largest singular values, falling, where some were flattened.
    """

    mass: Array
    root: Array
    scale: float
    norms: Mapping[str, float]
    resolution: float
    rank: int
    dominant: Array = field(default_factory=lambda: np.zeros(0))
    _known: dict[int, tuple[Array, float]] = field(default_factory=dict, init=False, repr=False)  # of `_flattened`

    def quantile(self, q: float) -> float | None:
        """σ/‖X‖_F at rank ⌈q·rank⌉ from the top; None where that is below the resolution."""
        value, error = self._quantile(q)
        return value if value >= self.resolution and error <= MOST_ERROR else None

    def quantile_error(self, q: float) -> float:
        """One standard deviation of ln σ at the quantile."""
        return self._quantile(q)[1]

    def _quantile(self, q: float) -> tuple[float, float]:
        if not 0 < q <= 1:
            raise ValueError(f"a quantile lies in (0, 1], got {q!r}")
        number = math.ceil(q * self.rank)
        if number <= len(self.dominant):
            return float(self.dominant[number - 1]), FLATTENED_ERROR
        position = number - 0.5 - len(self.dominant)  # half a direction: the middle of the step
        counted = np.concatenate([[0.0], np.cumsum(self.mass[::-1])])  # from the top
        ln_t = float(np.interp(position, counted, _EDGES[::-1]))
        above = (_EDGES[1:] > ln_t).astype(float)
        near = np.abs(_POINTS - ln_t) <= _STEP * POINTS / 2
        density = max(float(self.mass[near].sum()) / (_STEP * POINTS), 1e-9)
        return math.exp(ln_t) * self.scale, float(np.linalg.norm(above @ self.root)) / density

    def share_below(self, sigma: float) -> float:
        """The share of all directions whose σ/‖X‖_F is below `sigma`."""
        return float(self.mass @ (math.log(sigma / self.scale) > _POINTS) + (self.dominant < sigma).sum()) / self.rank

    @functools.cached_property
    def _from_the_top(self) -> tuple[Array, Array]:
        """ln σ/‖X‖_F and the number of directions there, the largest first: dominant ones, then the grid's points."""
        ln_sigma = np.concatenate([np.log(np.maximum(self.dominant, 1e-12)), _POINTS[::-1] + math.log(self.scale)])
        return ln_sigma, np.concatenate([np.ones(len(self.dominant)), self.mass[::-1]])

    def _flattened(self, count: int) -> tuple[Array, float]:
        """Once `count` directions are flattened: how many are left at each place of `_from_the_top`, and ln τ."""
        if count not in self._known:
            self._known[count] = self._flatten(count)
        return self._known[count]

    def _flatten(self, count: int) -> tuple[Array, float]:
        ln_sigma, counts = self._from_the_top
        taken = np.clip(count - (np.cumsum(counts) - counts), 0.0, counts)
        if not taken.any():
            return counts, 0.0
        ln_sigma = 0.5 * np.logaddexp(2 * ln_sigma, 2 * math.log(SMALLEST))
        last = float(ln_sigma[taken > 0].min())
        return counts - taken, math.log(PLACE) + last - 0.125 * math.log(float(taken @ np.exp(8 * (last - ln_sigma))))

    def _norm(self, normalisation: str, count: int) -> float:
        """What a normalisation divides by once `count` directions are flattened, relative to ‖X‖_F."""
        if count == len(self.dominant) and normalisation in self.norms:
            return self.norms[normalisation]
        if normalisation == "frobenius" and count == 0:
            return 1.0
        power = {"frobenius": 2, "schatten4": 4, "schatten8": 8}[normalisation]
        ln_sigma, _ = self._from_the_top
        left, ln_tau = self._flattened(count)
        return float(left @ np.exp(power * ln_sigma) + count * math.exp(power * ln_tau)) ** (1 / power)

    def _outcomes(self, schedules: Sequence[Schedule]) -> Iterator[tuple[Array, Array]]:
        """What schedules of one deflation and normalisation may make of the directions at each place of `_from_the_top`, (n, places), and
        of those that they flatten first, (n,).
        """
        count, normalisation = min(schedules[0].deflation, self.rank), schedules[0].normalisation
        tables = _gain_tables(tuple(s.steps for s in schedules))
        ln_norm, ln_tau = math.log(self._norm(normalisation, count)), self._flattened(count)[1]
        for leak in (0.0,) if count in (0, len(self.dominant)) else (0.0, math.log(LEAK)):
            places = _places(np.append(self._from_the_top[0], ln_tau) - ln_norm - leak)
            gains = tables[:, places]
            yield gains[:, :-1], gains[:, -1]

    def coverages(
        self, schedules: Sequence[Schedule], *, tol: float = TOLERANCE, floor: float = NOISE_FLOOR, below: float | None = None
    ) -> Array:
        """The share of directions above the noise floor that each schedule brings into [1 − tol, 1 + tol], (n,).

        Args:
            schedules: of one deflation and normalisation.
            below: the share of directions under the floor, where that is known from a measurement that reached it.
        """
        count = min(schedules[0].deflation, self.rank)
        counts = self._above(floor, count)
        share = self.share_below(floor) if below is None else below
        counted = max(self.rank * (1 - share), 1e-9)
        found = [(np.abs(gains - 1) <= tol) @ counts + count * (np.abs(flat - 1) <= tol) for gains, flat in self._outcomes(schedules)]
        covered: Array = np.minimum(np.min(found, axis=0) / counted, 1.0)
        return covered

    def errors(self, schedules: Sequence[Schedule], *, floor: float = NOISE_FLOOR, below: float | None = None) -> Array:
        """How far from UVᵀ each schedule leaves the matrix: the root mean square of (gain − 1) over the directions above the floor, (n,).

        Arguments as in `coverages`. Directions that the measurement doesn't resolve count as if they were where its fit puts them.
        """
        count = min(schedules[0].deflation, self.rank)
        counts = self._above(floor, count)
        total = max(self.rank * (1 - below) if below is not None else count + float(counts.sum()), 1e-9)
        found = [np.square(gains - 1) @ counts + count * np.square(flat - 1) for gains, flat in self._outcomes(schedules)]
        errors: Array = np.sqrt(np.max(found, axis=0) / total)
        return errors

    def _above(self, floor: float, count: int) -> Array:
        """How many directions above the floor are at each place of `_from_the_top`, once `count` are flattened."""
        return np.where(self._from_the_top[0] >= math.log(floor), self._flattened(count)[0], 0.0)

    def coverage(self, schedule: Schedule, **options: Any) -> float:
        """As `coverages`, of one schedule."""
        return float(self.coverages([schedule], **options)[0])

    def error(self, schedule: Schedule, **options: Any) -> float:
        """As `errors`, of one schedule."""
        return float(self.errors([schedule], **options)[0])


def spectrum_from_quantiles(quantiles: Mapping[float, float], rank: int) -> Spectrum:
    """The spectrum that a law predicts: ln σ is linear in q between the given quantiles and beyond them, and one dominant direction
    has what is missing for the squares to sum to ‖X‖_F² = 1. (At 2.8B parameters the source saw .30 to .985 of it in one.)

    Args:
        quantiles: q -> σ_q/‖X‖_F at rank ⌈q·rank⌉ from the top, falling with q.
        rank: min(rows, cols).
    """
    points = sorted(quantiles.items())
    if len(points) < 2 or not all(0 < q <= 1 and value > 0 for q, value in points):
        raise ValueError(f"quantiles are at least two q in (0, 1] with σ > 0, got {dict(quantiles)}")
    q = (np.arange(rank) + 0.5) / rank
    known, logs = np.array([k for k, _ in points]), np.minimum.accumulate(np.log([v for _, v in points]))
    first, last = ((logs[k + 1] - logs[k]) / (known[k + 1] - known[k]) for k in (0, len(known) - 2))
    ln_sigma = np.interp(q, known, logs)
    ln_sigma = np.where(q > known[-1], logs[-1] + last * (q - known[-1]), ln_sigma)
    ln_sigma = np.where(q < known[0], logs[0] + first * (q - known[0]), ln_sigma)
    ln_sigma[0] = 0.5 * math.log(max(1.0 - float(np.exp(2 * ln_sigma[1:]).sum()), math.exp(2 * ln_sigma[0])))
    ln_sigma = np.minimum(ln_sigma, 0.0)
    mass = np.histogram(np.maximum(ln_sigma, _EDGES[0]), bins=_EDGES)[0].astype(float)
    sigma = np.exp(ln_sigma)
    norms = {name: float((sigma**power).sum() ** (1 / power)) for name, power in (("frobenius", 2), ("schatten4", 4), ("schatten8", 8))}
    return Spectrum(mass=mass, root=np.zeros((CELLS * POINTS, 1)), scale=1.0, norms=norms, resolution=0.0, rank=rank)


def spectrum_from_moments(moments: Sequence[float] | Array, schedule: Schedule, rank: int) -> Spectrum | None:
    """The spectrum of a matrix from the moments of one orthogonalisation; None for a matrix that was zero or not finite.

    Args:
        moments: (3 + 4k,), or (3 + 4k + 8,) with deflation, as `orthogonalize(..., return_moments=True)` gives them.
        schedule: the one that they were measured with.
        rank: min(rows, cols) of the matrix.
    """
    values = np.asarray(moments, float)
    expected = moment_count(len(schedule), schedule.deflation)
    if values.shape != (expected,):
        raise ValueError(f"a schedule of {len(schedule)} steps yields {expected} moments, got shape {values.shape}")
    count = min(schedule.deflation, rank)
    tau, scale, measured, left = values[0], values[1], values[2 : 3 + 4 * len(schedule)], rank - count
    if not np.isfinite(values).all() or measured[0] <= 1e-12 or scale <= 0:
        return None
    dominant = np.zeros(0)
    if count:
        known = np.log(np.maximum(np.minimum.accumulate(values[3 + 4 * len(schedule) :]), 1e-12))
        dominant = np.exp(np.interp(np.log(np.arange(1, count + 1)), np.log(dominant_ranks(count)), known))
    if left:
        flattened = count * _rows(schedule.steps, np.asarray(tau / scale))
        mass, root = _fit(np.append(measured, left), flattened, *_functions(schedule.steps))
    else:
        mass, root = np.zeros(CELLS * POINTS), np.zeros((CELLS * POINTS, 1))
    reached = np.exp(_POINTS[np.argmax(image(schedule.steps, np.exp(_POINTS)) >= RESOLVED_GAIN)])
    return Spectrum(
        mass=mass,
        root=root,
        scale=scale,
        norms=_norms(measured, schedule, scale),
        resolution=float(reached) * scale,
        rank=rank,
        dominant=dominant,
    )


def _norms(measured: Array, schedule: Schedule, scale: float) -> dict[str, float]:
    """What each normalisation would divide by, relative to ‖X‖_F, from the moments of the first step."""
    (_, b, c), (u1, u2, up, pp) = schedule.steps[0], measured[:4]
    u4 = (pp + b * b * u2 - 2 * b * up) / c**2 if c else u2**2  # P² − 2b·u·P + b²·u² = c²·u⁴
    u4 = min(max(u4, u2**2 / u1**2 * u2), u2**2)  # between what Hölder's inequality and the triangle's allow
    return {"frobenius": scale * u1**0.5, "schatten4": scale * u2**0.25, "schatten8": scale * u4**0.125}


def _fit(moments: Array, flattened: Array, points: Array, functions: Array, products: Array) -> tuple[Array, Array]:
    """The mass around every point and a root of its covariance: a smooth density or, where none gives the moments, few atoms.

    `flattened`: what directions that were flattened add to the moments, but for the last, the number of the others.
    """
    mass, root, misfit = _fit_density(moments, flattened, functions, products)
    if misfit <= MOST_MISFIT:
        return np.repeat(mass, POINTS) / POINTS, np.repeat(root, POINTS, axis=0) / POINTS
    mass = _fit_atoms(points / moments[:, None], 1.0 - np.append(flattened, 0.0) / moments)
    return mass, ATOM_ERROR * np.diag(mass)


def _fit_atoms(points: Array, target: Array) -> Array:
    """Non-negative least squares by Lawson & Hanson's active sets (Solving Least Squares Problems, 1974): points @ mass ≈ target."""
    mass, active = np.zeros(points.shape[1]), np.zeros(points.shape[1], bool)
    for _ in range(3 * len(points)):
        gradient = points.T @ (target - points @ mass)
        gradient[active] = -np.inf
        best = int(gradient.argmax())
        if gradient[best] <= 1e-9 * float((points[:, best] ** 2).sum()):
            break
        active[best] = True
        while True:
            trial = np.zeros_like(mass)
            trial[active] = np.linalg.lstsq(points[:, active], target, rcond=1e-10)[0]
            if (trial[active] > 0).all():
                break
            shrinking = active & (trial <= 0)
            step = float((mass[shrinking] / np.maximum(mass[shrinking] - trial[shrinking], 1e-300)).min())
            mass = mass + step * (trial - mass)
            active &= mass > 1e-12
            mass[~active] = 0.0
            if not active.any():
                break
        mass = trial if active.any() else mass
        if np.abs(points @ mass - target).max() < RELATIVE_ERROR / 10:
            break
    return mass


def _fit_density(moments: Array, flattened: Array, functions: Array, products: Array) -> tuple[Array, Array, float]:
    """The mass of every cell, a root of its covariance, and the mean square misfit: the most probable spline, by damped Gauss–Newton.

    `moments` ends with the number of directions. The error that is granted to the others begins at 1 and shrinks to what it is, and
    their logarithms are compared first, which a far start needs; then they themselves, whose scatter has no bias.
    """
    left, moments = moments[-1], moments[:-1]
    count = len(moments)
    f, known = functions[:-1] / moments[:, None], flattened / moments
    pairs = products.reshape(count + 1, count + 1, CELLS)[:-1, :-1] / (moments[:, None, None] * moments[None, :, None])
    pairs = SCATTER * pairs.reshape(-1, CELLS)

    def density(spline: Array) -> Array:
        log = _BASIS @ spline
        mass: Array = np.exp(log - log.max())
        return mass * (left / mass.sum())

    def error_of(mass: Array) -> Array:
        return f @ mass + known - 1 if linear else np.log(f @ mass + known)

    spline = np.linalg.lstsq(_BASIS, -0.03 * (_CENTRES - math.log(0.9 / math.sqrt(left))) ** 2, rcond=None)[0]
    mass, granted, damping, linear = density(spline), 1.0, 1e-3, False
    for _ in range(40):
        weight = np.linalg.inv((pairs @ mass).reshape(count, count) + np.diag(granted**2 + np.square(FLATTENED_ERROR * known)))
        predicted, error = f @ mass, error_of(mass)
        slope = (f * mass) @ _BASIS - np.outer(predicted, mass @ _BASIS / left)
        if not linear:
            slope /= (predicted + known)[:, None]
        curvature = slope.T @ weight @ slope + _ROUGHNESS
        gradient = slope.T @ (weight @ error) + _ROUGHNESS @ spline
        before = after = error @ weight @ error + spline @ _ROUGHNESS @ spline
        for _ in range(6):
            move = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
            trial = spline + move * min(1.0, 3.0 / np.abs(move).max())
            error = error_of(density(trial))
            reached = error @ weight @ error + trial @ _ROUGHNESS @ trial
            if reached < before:
                spline, mass, after, damping = trial, density(trial), reached, max(damping / 8, 1e-7)
                break
            damping *= 8
        if granted == RELATIVE_ERROR and before - after < 2e-3 * before + 0.01:
            if linear:
                break
            linear, damping = True, 1e-3
        granted = max(RELATIVE_ERROR, 0.3 * granted)
    root = mass[:, None] * (_BASIS - mass @ _BASIS / left)
    error = f @ mass + known - 1
    return mass, CALIBRATION * root @ np.linalg.cholesky(np.linalg.inv(curvature)), float(error @ weight @ error) / count
