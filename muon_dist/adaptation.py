"""Adaptive step counts across ranks: every rank of a domain keeps the controllers of all its matrices and feeds them alike.

At a measured step the owners' moments are summed into one small tensor by an all-reduce that nobody waits for; LAG steps later
every rank reads it and decides. Schedules therefore never travel, and all state is the same on all ranks of the domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import policy_of
from .polar.newton_schulz import moment_count
from .polar.polynomials import Schedule
from .spectrum.controller import ROW_WIDTH, STEPS, TAKEN, Controller
from .spectrum.scaling_law import relative_depths

if TYPE_CHECKING:
    from .binding import BoundParameter, Domain

# Owners are looked at anew this many measuring periods apart
REBALANCE_PERIODS = 4


def blank_rows(count: int) -> Tensor:
    """The state of a parameter's `count` matrices before anything is known: (count, ROW_WIDTH), fp64, on the CPU."""
    rows = torch.full((count, ROW_WIDTH), float("nan"), dtype=torch.float64, device="cpu")
    rows[:, TAKEN] = 0
    return rows


def attach_controllers(
    parameters: Sequence[BoundParameter], state: Mapping[Tensor, dict[str, Tensor]], all_names: Sequence[str] = ()
) -> None:
    """Give the matrices of adaptive groups their controllers, which work on `state[parameter]["spectrum"]` in place.

    Rows that are blank, or of another number of matrices since a parameter is split differently now, begin with the prior.
    """
    adaptive = [(b, policy) for b in parameters if b.muon and (policy := policy_of(b.group)) is not None]
    depths = relative_depths([*(b.name for b, _ in adaptive), *all_names])
    for (b, policy), depth in zip(adaptive, depths, strict=False):  # the depths of other names are left over
        b.depth = depth
        b.controllers = [Controller(policy, min(matrix.shape), blank_rows(1)[0].numpy()) for matrix in b.matrices]
        if b.matrices:  # a frozen parameter keeps what was measured
            attach_rows(b, state[b.parameter])


def attach_rows(b: BoundParameter, entry: dict[str, Tensor]) -> None:
    """Let a parameter's controllers work on `entry["spectrum"]`, which a host may have replaced; blank rows begin with the prior."""
    given, count = entry.get("spectrum"), len(b.matrices)
    if given is None or tuple(given.shape) != (count, ROW_WIDTH):
        given = blank_rows(count)
    b.rows = entry["spectrum"] = rows = given.detach().to("cpu", torch.float64).contiguous()
    for part, controller in enumerate(b.controllers):
        if rows[part, STEPS].isnan():
            prior = controller.policy.prior(b.name, part, count, b.depth, controller.rank)
            rows[part].copy_(torch.from_numpy(Controller.new_row(prior)))
        controller.row = rows[part].numpy()


class Adaptation:
    """The controllers of a domain's matrices, what is measured at this step, and what has been measured but not read."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.controllers: list[Controller | None] = []
        for b in domain.parameters:
            self.controllers += b.controllers or [None] * len(b.matrices)
        self.measuring: dict[int, int] = {}  # matrix -> step count of its measurement at this step
        self.changed: list[int] = []  # matrices that have another schedule at this step than at the last
        self._buffer = torch.empty(0, device="cpu")
        self._pending: list[_Pending] = []
        adaptive = [c for c in self.controllers if c is not None]
        for k, c in enumerate(adaptive):  # spread evenly over the cycle
            c.phase = k * c.policy.measure_every // len(adaptive)
        self.active = bool(adaptive)
        self.schedules: list[Schedule] = [s for b in domain.parameters for s in b.schedules]

    def begin_step(self) -> list[int]:
        """Let due measurements take effect; which matrices were decided anew. Sets what this step measures."""
        self.measuring, self.changed = {}, []
        if not self.active:
            return []
        if any(p.is_due(self.controllers) for p in self._pending):
            self.collect()
        decided = []
        for i, c in enumerate(self.controllers):
            if c is None:
                continue
            if c.due():
                if c.decide():
                    self.changed.append(i)
                decided.append(i)
            if (steps := c.measures_with()) is not None:
                self.measuring[i] = steps
        width = max((moment_count(steps) for steps in self.measuring.values()), default=0)
        self._buffer = torch.zeros(len(self.measuring), width, dtype=torch.float64, device=self.domain.device)
        self._places = {i: k for k, i in enumerate(self.measuring)}
        self.schedules = [s if c is None else c.schedule for s, c in zip(self.schedules, self.controllers, strict=True)]
        return decided

    def schedule_now(self, matrix: int) -> Schedule:
        """What a matrix is orthogonalised with at this step."""
        controller, steps = self.controllers[matrix], self.measuring.get(matrix)
        return self.schedules[matrix] if controller is None or steps is None else controller.policy.schedule(steps)

    def record(self, matrix: int, moments: Tensor) -> None:
        """Keep what an owner measured at this step: (3 + 4k,) on the domain's device."""
        self._buffer[self._places[matrix], : len(moments)] = moments

    def end_step(self) -> None:
        """Count the step, and share what was measured."""
        for c in self.controllers:
            if c is not None:
                c.take_step()
        if self.measuring:
            self._pending.append(_Pending(self._buffer, dict(self.measuring), self.controllers, self.domain))

    def collect(self) -> None:
        """Write what has been measured into the rows: the host waits for it, if it has not arrived yet."""
        for pending in self._pending:
            pending.write(self.controllers)
        self._pending = []

    def is_time_for_new_owners(self) -> bool:
        """Whether owners are looked at anew before the coming step: the same answer on all ranks."""
        active = [c for c in self.controllers if c is not None]
        if not active or self.domain.process_group is None:
            return False
        since = int(active[0].row[TAKEN]) - min(c.policy.burn_in for c in active)
        return since > 0 and since % (REBALANCE_PERIODS * min(c.policy.measure_every for c in active)) == 0


class _Pending:
    """Moments on their way to all ranks and to the host."""

    def __init__(self, buffer: Tensor, measuring: dict[int, int], controllers: Sequence[Controller | None], domain: Domain) -> None:
        self._measuring = measuring
        self._at = {i: int(c.row[TAKEN]) - 1 for i in measuring if (c := controllers[i]) is not None}
        self._buffer, self._work, self._event = buffer, None, None
        if domain.process_group is not None:
            self._work = dist.all_reduce(buffer, group=domain.process_group, async_op=True)
        if buffer.device.type != "cpu":
            if self._work is not None:
                self._work.wait()  # on the device's stream; the host goes on
            self._host = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu", pin_memory=True)
            self._host.copy_(buffer, non_blocking=True)
            self._event = torch.Event(buffer.device)
            self._event.record()

    def is_due(self, controllers: Sequence[Controller | None]) -> bool:
        return any((c := controllers[i]) is not None and c.is_lag_over(at) for i, at in self._at.items())

    def write(self, controllers: Sequence[Controller | None]) -> None:
        if self._event is not None:
            self._event.synchronize()
            values = self._host.numpy()
        else:
            if self._work is not None:
                self._work.wait()
            values = self._buffer.numpy()
        for row, (i, steps) in zip(values, self._measuring.items(), strict=True):
            if (c := controllers[i]) is not None:
                c.measured(row[: moment_count(steps)], steps, self._at[i])
