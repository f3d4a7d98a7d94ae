"""What is remembered of a matrix: what was decided, what takes effect soon, and what was measured; one row of numbers, in checkpoints too.

A row begins with the version of its layout. Rows of version 1, which had none, are read as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..polar.recorder import moment_count
from .moments import QUANTILES

Array = np.ndarray

VERSION = 2
MOST_STEPS = 16


class Choice(NamedTuple):
    """How a matrix is orthogonalised: deflated directions, steps, and the tolerance that these were generated for; 0: Jordan's own."""

    deflation: int
    steps: int
    tol: float

    @staticmethod
    def of(numbers: Iterable[float]) -> Choice:
        deflation, steps, tol = numbers
        return Choice(int(deflation), int(steps), float(tol))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A choice, and what was known when it was made; NaN for what is not known.

    Attributes:
        measurements: how often the matrix has been measured; 0 where the prior decided.
        error: of the choice, root mean square of (gain − 1) over the directions above the noise floor, as estimated.
        error_of_five: that of five Jordan steps.
        coverage: the share of those directions that the choice brings within the tolerance.
        below: the share of directions under the noise floor, from a measurement that reached it.
        quantiles: σ_q/‖M‖_F at `QUANTILES`; NaN where that is below the resolution.
    """

    choice: Choice
    measurements: int = 0
    error: float = math.nan
    error_of_five: float = math.nan
    coverage: float = math.nan
    below: float = math.nan
    quantiles: tuple[float, ...] = (math.nan,) * len(QUANTILES)

    def numbers(self) -> list[float]:
        known = (self.measurements, self.error, self.error_of_five, self.coverage, self.below)
        return [float(v) for v in (*self.choice, *known, *self.quantiles)]

    @staticmethod
    def of(numbers: Array) -> Decision:
        measurements, *known = (float(v) for v in numbers[3:])
        return Decision(
            choice=Choice.of(numbers[:3]),
            measurements=int(measurements),
            error=known[0],
            error_of_five=known[1],
            coverage=known[2],
            below=known[3],
            quantiles=tuple(known[4:]),
        )


# A row: its version; steps taken; the decision in force; when another was made (-1: none is under way), and that; when a measurement was
# taken that nobody has decided on (-1: none), what it was taken with, and its moments.
WIDTH_OF_DECISION = 8 + len(QUANTILES)
TAKEN = 1
IN_FORCE = slice(2, 2 + WIDTH_OF_DECISION)
DEFLATION, STEPS, TOL, MEASUREMENTS = range(2, 6)
DECIDED_AT = IN_FORCE.stop
NEXT = slice(DECIDED_AT + 1, DECIDED_AT + 1 + WIDTH_OF_DECISION)
MEASURED_AT = NEXT.stop
MEASURED_WITH = slice(MEASURED_AT + 1, MEASURED_AT + 4)
MOMENTS = slice(MEASURED_WITH.stop, MEASURED_WITH.stop + moment_count(MOST_STEPS, 1))
ROW_WIDTH = MOMENTS.stop

# Version 1: taken, steps, measurements, below, coverage, quantiles, and a measurement that was under way, which is taken anew
_WIDTH_1 = 5 + len(QUANTILES) + 2 + 3 + 4 * MOST_STEPS


def blank_rows(count: int) -> Array:
    """Rows of matrices about which nothing is known, not even their prior: (count, ROW_WIDTH) fp64."""
    rows = np.full((count, ROW_WIDTH), math.nan)
    rows[:, 0], rows[:, TAKEN], rows[:, DECIDED_AT], rows[:, MEASURED_AT] = VERSION, 0, -1, -1
    return rows


def read_rows(given: Tensor, name: str, *, deflation: int, tol: float) -> Array:
    """The rows of a parameter's matrices from its state, (count, ROW_WIDTH) fp64, a copy.

    `deflation` and `tol`: of the schedules in rows of version 1, which don't tell.

    Raises:
        ValueError: rows of another form.
    """
    rows = given.detach().to("cpu").double().numpy()
    if rows.ndim == 2 and rows.shape[1] == ROW_WIDTH and bool((rows[:, 0] == VERSION).all()):
        return rows.copy()
    if rows.ndim == 2 and rows.shape[1] == _WIDTH_1:
        return _from_version_1(rows, deflation, tol)
    versions = sorted({float(v) for v in rows[:, 0]}) if rows.ndim == 2 and rows.shape[1] else []
    raise ValueError(
        f"{name}: the measured spectra in its state have shape {tuple(rows.shape)} and begin with {versions[:3]}; this version of "
        f"muon_dist reads rows of {ROW_WIDTH} numbers that begin with {VERSION}, and those of version 1, of {_WIDTH_1}. Load with the "
        "version that saved it, or take 'spectrum' out of the state: it is then measured anew"
    )


def _from_version_1(old: Array, deflation: int, tol: float) -> Array:
    rows = blank_rows(len(old))
    taken, steps, measurements, below, coverage = old[:, :5].T
    rows[:, TAKEN] = taken
    for row, known, count in zip(rows, old, steps, strict=True):
        if not math.isnan(count):
            row[IN_FORCE] = Decision(choice=Choice(deflation, int(count), tol)).numbers()
            row[IN_FORCE.stop - len(QUANTILES) : IN_FORCE.stop] = known[5 : 5 + len(QUANTILES)]
    decided = ~np.isnan(steps)
    rows[decided, MEASUREMENTS] = measurements[decided]
    rows[decided, MEASUREMENTS + 3], rows[decided, MEASUREMENTS + 4] = coverage[decided], below[decided]
    return rows
