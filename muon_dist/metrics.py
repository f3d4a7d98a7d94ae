"""What a step did to every matrix: norms of its update and of its weights, for hardly anything and seldom.

At a reported step every rank adds up the squares of the pieces that it stores; one small all-reduce behind the step completes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .domain import Domain
from .shared import Shared

REPORT_EVERY = 100  # steps between two reports, where no spectra are measured
LAG = 2  # steps after which what was shared has arrived


class Metrics:
    """The reports of one domain. The first is of its first step.

    Args:
        every: steps between two reports.
    """

    def __init__(self, domain: Domain, every: int) -> None:
        self._domain, self._every = domain, every
        self._sums: Tensor | None = None  # (matrices + 1, 2) fp64: squares of updates and of weights; last, what was left out
        self._under_way: tuple[int, Shared] | None = None
        self._counts: tuple[str, ...] = ()

    def begin_step(self, step: int) -> None:
        """Begin a report, where it is time for one."""
        if step == 1 or step % self._every == 0:
            self._sums = torch.zeros(len(self._domain.matrices) + 1, 2, dtype=torch.float64, device=self._domain.device)

    @property
    def active(self) -> bool:
        """Whether this step is reported."""
        return self._sums is not None

    def add(self, matrices: Tensor, weights: list[Tensor], updates: list[Tensor], rate: float) -> None:
        """Add pieces that this rank counts.

        Args:
            matrices: (pieces,) int64 on the domain's device, the matrices that they are of.
            weights, updates: the pieces themselves; weights have been updated.
            rate: what updates are multiplied by on their way into weights.
        """
        assert self._sums is not None  # active
        for column, pieces, factor in ((0, updates, rate), (1, weights, 1.0)):
            norms = torch.stack([norm.to(torch.float64) for norm in torch._foreach_norm(pieces)]).to(self._sums.device)
            self._sums[:, column].index_add_(0, matrices, (norms * factor).square_())

    def end_step(self, step: int, left_out: Mapping[str, Tensor | None]) -> None:
        """Share what this step has added up. Collective, at reported steps.

        Args:
            left_out: at most two counts by name, 0-d, equal on all ranks; None: 0.
        """
        if self._sums is None:
            return
        self._counts = tuple(left_out)
        if self._domain.me == 0:  # all ranks know these
            for column, count in enumerate(left_out.values()):
                if count is not None:
                    self._sums[-1, column] = count
        self._under_way, self._sums = (step, Shared(self._sums, self._domain)), None

    def arrived(self, step: int | None) -> Iterator[dict[str, Any]]:
        """The lines of a report that has arrived by `step`; None: of any that is under way. The host waits for it, if it hasn't."""
        if self._under_way is None or (step is not None and step < self._under_way[0] + LAG):
            return
        at, sharing = self._under_way
        self._under_way = None
        sums = sharing.wait()
        for (update, weight), task in zip(sums[:-1].tolist(), self._domain.plan.matrices, strict=True):
            yield {"type": "update", "step": at, "name": task.name, "shape": list(task.shape), **_sizes(update, weight, task.numel)}
        yield {"type": "skipped", "step": at, **{name: int(sums[-1, column]) for column, name in enumerate(self._counts)}}


def _sizes(update: float, weight: float, numel: int) -> Mapping[str, float | None]:
    """From sums of squares: root mean squares, and the ratio of both norms."""
    ratio = math.sqrt(update / weight) if weight > 0 else None
    return {"update_rms": math.sqrt(update / numel), "weight_rms": math.sqrt(weight / numel), "update_to_weight": ratio}
