"""Which matrices are measured at which step: often at first, while spectra change fast, then once in `measure_every` steps."""

from __future__ import annotations

import zlib

import numpy as np


def turn_of(name: str) -> float:
    """When in a period a matrix has its turn, in [0, 1): by its name alone, so that it is the same wherever the matrix lies."""
    return zlib.crc32(name.encode()) / 2**32


def are_due(taken: np.ndarray, turns: np.ndarray, measure_every: np.ndarray, burn_in: np.ndarray) -> np.ndarray:
    """Which matrices are measured at the coming step, (n,) bool.

    After `burn_in` steps every matrix is measured at once, then once in each of the steps 2–3, 4–7, 8–15, … as long as these are fewer than
    `measure_every`, and then once in `measure_every` steps. Turns spread them within those.

    Args:
        taken: steps that each matrix has taken.
        turns: of each, as `turn_of` gives them.
        measure_every, burn_in: of each.
    """
    since = taken - burn_in + 1  # of the coming step, from 1
    start = 2 ** np.floor(np.log2(np.maximum(since, 1))).astype(np.int64)  # 1, 2, 2, 4, 4, 4, 4, 8, …
    dense = since == start + (turns * start).astype(np.int64)
    later = (since - measure_every - (turns * measure_every).astype(np.int64)) % measure_every == 0
    due: np.ndarray = (since > 0) & np.where(since < measure_every, dense, later)
    return due
