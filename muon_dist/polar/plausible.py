"""Whether an orthogonalised matrix can be one: the last look at an update before it reaches weights."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from .polynomials import Schedule, image

# What an update's norm may be over that of UVᵀ, √r, where the schedule's band reaches less far
MARGIN = 1.5


def are_plausible(batch: Tensor, schedule: Schedule, rank: int, norms: Tensor | None = None) -> Tensor:
    """Which results of `orthogonalize_batch`, (B, m, n), have a norm that UVᵀ of this rank can have: (B,), bool.

    Products that lose more digits than a schedule stands give norms far beyond, or NaN. `norms`, (B,): the Frobenius norms, where they
    are known.
    """
    if norms is None:
        norms = torch.linalg.vector_norm(batch, dim=(-2, -1), dtype=torch.promote_types(batch.dtype, torch.float32))
    return norms <= most_norm(schedule, rank)


def most_norm(schedule: Schedule, rank: int) -> float:
    """The largest Frobenius norm of a result: of `rank` singular values, each within the schedule's band."""
    return max(MARGIN, 1.1 * _largest_gain(schedule)) * math.sqrt(rank)


@functools.cache
def _largest_gain(schedule: Schedule) -> float:
    """The largest that a singular value up to 1 becomes: 1.3 and less for published schedules; more for a wide `tol` or cut steps."""
    x = np.concatenate([np.linspace(0, 1, 4096), np.geomspace(1e-12, 1, 4096)])
    return float(np.abs(image(schedule.steps, x)).max())
