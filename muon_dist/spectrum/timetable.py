"""Which matrices are measured at which step: often at first, while spectra change fast, then once in `measure_every` steps."""

from __future__ import annotations

import numpy as np


def are_due(taken: np.ndarray, numbers: np.ndarray, count: int, measure_every: np.ndarray, burn_in: np.ndarray) -> np.ndarray:
    """Which of `count` matrices are measured at the coming step, (…,) bool.

    After `burn_in` steps every matrix is measured at once, then once in each of the steps 2–3, 4–7, 8–15, … as long as these are fewer than
    `measure_every`, and then once in `measure_every` steps. Within those a matrix's turn depends on its number, so that every step
    measures about as many.

    Args:
        taken: steps that each matrix has taken.
        numbers: the matrices', from 0 to count − 1.
        measure_every, burn_in: of each.
    """
    since = taken - burn_in + 1  # of the coming step, from 1
    start = 2 ** np.floor(np.log2(np.maximum(since, 1))).astype(np.int64)  # 1, 2, 2, 4, 4, 4, 4, 8, …
    dense = since == start + numbers * start // count
    later = (since - measure_every - numbers * measure_every // count) % measure_every == 0
    due: np.ndarray = (since > 0) & np.where(since < measure_every, dense, later)
    return due
