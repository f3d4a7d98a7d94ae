"""Adaptive schedules across ranks: what is measured at a step, who decides, and when it takes effect.

At a measured step owners write the moments of that orthogonalisation into one small tensor, which an all-reduce shares: every
rank's state then holds the measurement. LAG steps later each measured matrix is decided on by one rank, in turns, and a second small
all-reduce shares the decisions, which take effect at the next step. So every rank has the same state because it received it; nothing is
decided twice, and the more ranks, the less each has to do. Nobody waits for either all-reduce before it is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .bound import BoundParameter
from .domain import Ranks
from .groups import policy_of
from .polar.polynomials import Schedule
from .polar.products import SymmetricProducts
from .polar.recorder import moment_count
from .rendezvous import wait_in_time
from .shared import Shared
from .spectrum import record as columns
from .spectrum.moments import spectrum_from_moments
from .spectrum.policy import Policy, Work
from .spectrum.record import Choice, Decision, blank_rows, read_rows
from .spectrum.scaling_law import relative_depths
from .spectrum.timetable import are_due, turn_of

# Steps between a measurement and the decision, while moments are shared and copied to the host; a decision takes effect SHARED steps later
LAG, SHARED = 2, 1
# Every so many measurements one takes as many steps as see the noise floor, where a coverage is asked for: it counts what lies above
PROBE_EVERY = 8
# Owners are looked at anew this many measuring periods apart
REBALANCE_PERIODS = 2


def blank_state(count: int) -> Tensor:
    """The state of a parameter's `count` matrices before anything is known."""
    return torch.from_numpy(blank_rows(count))


def assign_policies(parameters: Sequence[BoundParameter], all_names: Sequence[str] = ()) -> None:
    """Give parameters of adaptive groups their policy, and where their block stands in the model."""
    adaptive = [(b, policy) for b in parameters if b.travels and (policy := policy_of(b.group)) is not None]
    depths = relative_depths([*(b.name for b, _ in adaptive), *all_names])
    for (b, policy), depth in zip(adaptive, depths, strict=False):  # the depths of other names are left over
        b.depth, b.policy = depth, policy


class Adaptation:
    """What is known of the matrices of one domain, what is measured at this step, and what is under way.

    Args:
        parameters: the domain's, in its order; those that adapt have a policy. Matrices are numbered through all of them. In their
            state "spectrum" becomes a view of `rows`.
        shared: the ranks among which measurements and decisions are shared.
    """

    def __init__(self, parameters: Sequence[BoundParameter], shared: Ranks, products: SymmetricProducts) -> None:
        self.shared = shared
        self.measuring: dict[int, Schedule] = {}  # matrix -> what it is orthogonalised with at this step, where it is measured
        self.changed: list[int] = []  # matrices that have another schedule at this step than at the last
        self.schedules: list[Schedule] = []
        self._matrices: list[int] = []  # of each row
        self._policies: list[Policy] = []  # of each row
        self._works: list[Work] = []
        self._moments: list[_Sharing] = []
        self._decisions: list[_Sharing] = []
        adapting, turns, matrix = [], [], 0
        for position, b in enumerate(parameters):
            if b.policy is not None and b.matrices:
                adapting.append(b)
                b.row = len(self._works)
                self._matrices += range(matrix, matrix + len(b.matrices))
                self._policies += [b.policy] * len(b.matrices)
                self._works += [Work(m.rows, m.cols, b.compute_dtype, products) for m in b.matrices]
                turns += [turn_of(f"{b.name or position}/{part}") for part in range(len(b.matrices))]
            matrix += len(b.matrices)
        self.rows = blank_rows(len(self._works))  # (rows, ROW_WIDTH) fp64
        self._tensor = torch.from_numpy(self.rows)
        self._fresh: list[int] = []  # rows that have the prior
        for b in adapting:
            self.take_over(b)
        self._share_priors()
        self._row_of = {matrix: row for row, matrix in enumerate(self._matrices)}
        self._turns = np.array(turns)
        self._every = np.array([p.measure_every for p in self._policies], np.int64)
        self._burn_in = np.array([p.burn_in for p in self._policies], np.int64)
        at = 0
        for b in parameters:
            self.schedules += [self.schedule_of(at + k) for k in range(len(b.matrices))] if b.fixed is None else [b.fixed] * len(b.matrices)
            at += len(b.matrices)
        self._buffer = torch.empty(0, device="cpu")

    def take_over(self, b: BoundParameter) -> None:
        """Go on from the "spectrum" of a parameter's state, which a host may have replaced, and put a view of `rows` in its place.

        Raises:
            ValueError: rows of another form.
        """
        count, policy = len(b.matrices), b.policy
        assert policy is not None
        mine = self.rows[b.row : b.row + count]
        if (given := b.state.get("spectrum")) is not None:
            tol = policy.probe.tol
            rows = read_rows(given, b.name or str(b.placement.shape), deflation=policy.deflation or 0, tol=tol)
            if len(rows) == count:
                mine[:] = rows
            else:
                warnings.warn(
                    f"{b.name}: its state has measured spectra of {len(rows)} matrices, and it is split into {count} now: measured anew",
                    stacklevel=2,
                )
        for part, row in enumerate(mine):
            if math.isnan(row[columns.STEPS]):
                prior = policy.prior(b.name, part, count, b.depth, self._works[b.row + part])
                row[columns.IN_FORCE] = Decision(choice=prior).numbers()
                self._fresh.append(b.row + part)
        b.spectrum = b.state["spectrum"] = self._tensor[b.row : b.row + count]

    def _share_priors(self) -> None:
        """Take the first rank's priors: logarithms differ between CPUs in their last bits, and a law may lie at a threshold. Collective."""
        if self.shared.process_group is None or not self.active:
            return
        chosen = torch.from_numpy(self.rows[:, columns.DEFLATION : columns.TOL + 1].copy()).to(self.shared.device)
        first = self.shared.ranks[0]
        wait_in_time(dist.broadcast(chosen, first, group=self.shared.process_group, async_op=True), self.shared.ranks)
        self.rows[self._fresh, columns.DEFLATION : columns.TOL + 1] = chosen.cpu().numpy()[self._fresh]

    def taken_over(self, b: BoundParameter) -> bool:
        """Whether the state of a parameter still holds its view of `rows`."""
        return b.spectrum is None or b.state.get("spectrum") is b.spectrum

    @property
    def active(self) -> bool:
        return bool(self._policies)

    def decision_of(self, matrix: int) -> Decision:
        """What is in force for a matrix that adapts."""
        return Decision.of(self.rows[self._row_of[matrix], columns.IN_FORCE])

    def taken(self, matrix: int) -> int:
        """Steps that a matrix has taken."""
        return int(self.rows[self._row_of[matrix], columns.TAKEN])

    def work_of(self, matrix: int) -> Work:
        return self._works[self._row_of[matrix]]

    def schedule_of(self, matrix: int) -> Schedule:
        """The schedule in force for a matrix that adapts."""
        row = self._row_of[matrix]
        return self._policies[row].schedule(self._choice(row))

    def _choice(self, row: int) -> Choice:
        """What is in force; bounds that have changed since it was chosen hold at once."""
        choice, policy = Choice.of(self.rows[row, columns.DEFLATION : columns.TOL + 1]), self._policies[row]
        return choice._replace(steps=min(max(choice.steps, policy.fewest), policy.max_ns_steps))

    def begin_step(self) -> list[int]:
        """Let decisions take effect, decide on what was measured, and set what this step measures; which matrices were decided anew."""
        self.measuring, self.changed = {}, []
        if not self.active:
            return []
        taken = self.rows[:, columns.TAKEN]
        self._receive(taken)
        decided = self._put_in_force(taken)
        self._decide(taken)
        due = are_due(taken, self._turns, self._every, self._burn_in)
        due &= (self.rows[:, columns.MEASURED_AT] < 0) & (self.rows[:, columns.DECIDED_AT] < 0)
        for row in np.flatnonzero(due).tolist():
            choice = self._measured_with(row)
            self.rows[row, columns.MEASURED_WITH] = choice
            self.measuring[self._matrices[row]] = self._policies[row].schedule(choice)
        width = max((moment_count(len(s), s.deflation) for s in self.measuring.values()), default=0)
        self._buffer = torch.zeros(len(self.measuring), width, dtype=torch.float64, device=self.shared.device)
        self._line_of = {matrix: k for k, matrix in enumerate(self.measuring)}
        return decided

    def _measured_with(self, row: int) -> Choice:
        policy = self._policies[row]
        floor = policy.reference is None and self.rows[row, columns.MEASUREMENTS] % PROBE_EVERY == 1
        return policy.to_measure(self._choice(row), self._works[row], floor=floor)

    def _put_in_force(self, taken: np.ndarray) -> list[int]:
        decided_at = self.rows[:, columns.DECIDED_AT]
        decided = []
        for row in np.flatnonzero((decided_at >= 0) & (taken >= decided_at + SHARED)).tolist():
            matrix, known = self._matrices[row], self.rows[row]
            known[columns.IN_FORCE], known[columns.DECIDED_AT], known[columns.NEXT] = known[columns.NEXT], -1, math.nan
            if (schedule := self.schedule_of(matrix)) != self.schedules[matrix]:
                self.schedules[matrix] = schedule
                self.changed.append(matrix)
            decided.append(matrix)
        return decided

    def _decide(self, taken: np.ndarray) -> None:
        """Decide on this rank's share of what was measured LAG steps ago, and share that."""
        measured_at = self.rows[:, columns.MEASURED_AT]
        due = np.flatnonzero((measured_at >= 0) & (taken >= measured_at + LAG))
        if not len(due):
            return
        results = np.zeros((len(due), columns.WIDTH_OF_DECISION))
        for k, row in enumerate(due.tolist()):
            if k % len(self.shared.ranks) == self.shared.me:
                results[k] = self._decision(row).numbers()
        self.rows[due, columns.MEASURED_AT], self.rows[due, columns.MOMENTS], self.rows[due, columns.DECIDED_AT] = -1, math.nan, taken[due]
        self._decisions.append(_Sharing(torch.from_numpy(results), due, taken[due].copy(), self.shared))

    def _decision(self, row: int) -> Decision:
        """What a measurement makes of the decision in force. A matrix that was zero then, or whose step was skipped, tells nothing."""
        policy, work, known = self._policies[row], self._works[row], self.rows[row]
        before = Decision.of(known[columns.IN_FORCE])
        schedule = policy.schedule(Choice.of(known[columns.MEASURED_WITH]))
        moments = known[columns.MOMENTS][: moment_count(len(schedule), schedule.deflation)]
        spectrum = spectrum_from_moments(moments, schedule, work.rank)
        if spectrum is None:
            return before
        return policy.decide(spectrum, work, before, reaches_floor=spectrum.resolution <= policy.floor)

    def schedule_now(self, matrix: int) -> Schedule:
        """What a matrix is orthogonalised with at this step."""
        return self.measuring.get(matrix) or self.schedules[matrix]

    def record(self, matrix: int, moments: Tensor) -> None:
        """Keep what an owner measured at this step, on the domain's device."""
        self._buffer[self._line_of[matrix], : len(moments)] = moments

    def end_step(self) -> None:
        """Count the step, and share what was measured."""
        if not self.active:
            return
        taken = self.rows[:, columns.TAKEN]
        if self.measuring:
            rows = np.array([self._row_of[matrix] for matrix in self.measuring])
            self.rows[rows, columns.MEASURED_AT] = taken[rows]
            self._moments.append(_Sharing(self._buffer, rows, taken[rows].copy(), self.shared))
        taken += 1

    def _receive(self, taken: np.ndarray, *, all_of_it: bool = False) -> None:
        """Write what has arrived, or is due, into the rows; the host waits for it, if it has not arrived yet."""
        for sharing in [s for s in self._moments if all_of_it or bool((taken[s.rows] >= s.at + LAG).any())]:
            values = sharing.wait()
            self.rows[sharing.rows, columns.MOMENTS.start : columns.MOMENTS.start + values.shape[1]] = values
            self._moments.remove(sharing)
        for sharing in [s for s in self._decisions if all_of_it or bool((taken[s.rows] >= s.at + SHARED).any())]:
            self.rows[sharing.rows, columns.NEXT] = sharing.wait()
            self._decisions.remove(sharing)

    def collect(self) -> None:
        """Write all that is under way into the rows."""
        if self.active:
            self._receive(self.rows[:, columns.TAKEN], all_of_it=True)

    def is_time_for_new_owners(self) -> bool:
        """Whether owners are looked at anew before the coming step: the same answer on all ranks."""
        if not self.active or self.shared.process_group is None:
            return False
        since = int(self.rows[0, columns.TAKEN]) - int(self._burn_in.min())
        return since > 0 and since % (REBALANCE_PERIODS * int(self._every.min())) == 0


class _Sharing(Shared):
    """Numbers of some rows on their way, and the steps at which these were."""

    def __init__(self, numbers: Tensor, rows: np.ndarray, at: np.ndarray, ranks: Ranks) -> None:
        super().__init__(numbers, ranks)
        self.rows, self.at = rows, at
