"""The engine: steps tensors by their rules, under any sharding. It knows no `torch.optim`; optimizers are thin shells over it.

A host gives it **members** (tensors with their layouts, routes and state) and groups of hyperparameters. `bind` learns where everything
lies and compiles; `step` takes gradients. Whatever a host changes in between is noticed at the next call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from . import allocation
from .agreement import COUNTED, Agreement, Lagged, agree_after_host, agree_on_gradients
from .binding import bind_domains, rebalanced
from .bound import Member
from .domain import Domain
from .groups import POLICY_KEYS, PlanOptions, check_group, refuse_duplicates
from .polar.polynomials import Schedule
from .polar.products import fp32_precision
from .program import Program
from .rendezvous import meet, told, wait_in_time
from .sharding.plan import Plan
from .spectrum.record import TAKEN
from .step import take_step
from .telemetry import Telemetry

Groups = Sequence[Mapping[str, Any]]

# A change of these in a group changes the plan or what owners compute, so the next step binds again.
REBIND_KEYS = (
    "algorithm",
    "rule",
    "ns_steps",
    "polynomial",
    "deflation",
    "eps",
    "compute_dtype",
    "wire_dtype",
    "kind",
    "split",
    "transpose",
    *sorted(POLICY_KEYS),
)


class Engine:
    """Steps members. Every rank of every domain makes the same calls, but for those that say they don't communicate.

    Args:
        process_group: the ranks that step together. None: all.
        options: of the plan.
        nonfinite: "skip" or "raise".
        host_decides: whether steps happen is told by the host, on all ranks alike. Ranks that hold nothing then don't come.
        telemetry: where measured spectra are reported, and what steps do to matrices.
        all_names: of the model's parameters, where members are only some of them; they tell how deep the model is.
        model_numel: its elements, for scaling laws. 0: those of the members.
    """

    def __init__(
        self,
        *,
        process_group: dist.ProcessGroup | None = None,
        options: PlanOptions,
        nonfinite: str = "skip",
        host_decides: bool = False,
        telemetry: Telemetry | None = None,
        all_names: Sequence[str] = (),
        model_numel: int = 0,
    ) -> None:
        self._process_group, self._options, self._nonfinite = process_group, options, nonfinite
        self._host_decides = host_decides
        self._telemetry, self._all_names, self._model_numel = telemetry, all_names, model_numel
        self._members: Sequence[Member] = ()
        self._programs: list[Program] = []
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._world: Any = None  # that of the last binding
        self._bound_for: Any = None
        self._flag_group: dist.ProcessGroup | None = None
        self._has_copies = False  # ranks hold state that another owns: after binding, consolidate() or loading
        self._skipped: Tensor | None = None
        self._left_out: Tensor | None = None
        self._resets = 0  # of gradients since binding, for a message
        self._steps = 0  # of this engine
        self._taken = 0  # of the run, as its state tells
        self._apart = Lagged()

    # ------------------------------------------------------------------------------------------------------------ asked

    @property
    def programs(self) -> list[Program]:
        """What each of this rank's domains does in a step. Empty before binding."""
        return list(self._programs)

    @property
    def domains(self) -> list[Domain]:
        """This rank's domains, in the order in which all ranks meet. Empty before binding."""
        return [program.domain for program in self._programs]

    @property
    def options(self) -> PlanOptions:
        return self._options

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        """Every matrix of this rank's domains, by name: its shape and the schedule that it gets now. Empty before binding."""
        return {
            task.name or str(i): (task.shape, schedule)
            for program in self._programs
            for i, (task, schedule) in enumerate(zip(program.domain.plan.matrices, program.adaptation.schedules, strict=True))
        }

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        """For each of this rank's domains its ranks, and the plan they follow, in which ranks are positions among them."""
        return [(domain.ranks, domain.plan) for domain in self.domains]

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    @property
    def skipped_updates(self) -> int:
        """Updates of single matrices that were left out because their norm can't be that of a polar factor: the products in which they
        were orthogonalised lost too many digits. This rank's own at once, those of others from the next step on. Waits for the device.
        """
        own = sum(int(program.consensus.left_out.item()) for program in self._programs)
        return own + (0 if self._left_out is None else int(self._left_out.item()))

    # --------------------------------------------------------------------------------------------------------- binding

    def is_bound(self, members: Sequence[Member], groups: Groups) -> bool:
        """Whether `bind` would find everything as it was. Doesn't communicate."""
        return members is self._members and self._bound_for is not None and self._bound_for == self._depends_on(groups)

    def bind(self, members: Sequence[Member], groups: Groups, *, replicate_momentum: bool = False) -> None:
        """Learn where every member lies, agree on a plan, allocate state, and compile. Collective.

        Nothing happens where `members` is the list of the last call and nothing that matters has changed.

        Args:
            members: whose groups are numbers in `groups`.
            replicate_momentum: every rank keeps the state of plain replicas, not the owners of their matrices alone.

        Raises:
            ValueError: the ranks don't agree, replicas hold other values, or a placement isn't supported.
            RuntimeError: not all ranks came in time.
        """
        if self.is_bound(members, groups):
            return
        self.collect()
        for group in groups:
            check_group(group)
        self._meet()
        if self._world != _world_now():
            self._world, self._made = _world_now(), {}
        refuse_duplicates(member.name for member in members)
        bound = bind_domains(
            members, groups, process_group=self._process_group, options=self._options, made=self._made, all_names=self._all_names
        )
        reports = self._telemetry is not None
        programs = [Program(domain, adaptation, everywhere=replicate_momentum, reports=reports) for domain, adaptation in bound]
        self._members, self._programs = members, programs
        self._flag_group = self._agree_on_flag_group()
        for program in programs:
            for b in program.domain.parameters:
                allocation.declare(b.member, b.group)
            allocation.complete(program, everywhere=replicate_momentum)
            for b in program.domain.parameters:
                allocation.allocate(program, b)
        self._has_copies = True
        self._taken = max(self._taken, self._steps_before())
        self._resets = 0
        asked, *where = self._depends_on(groups)
        self._bound_for = (copy.deepcopy(asked), *where)  # a list may be changed in place

    def _steps_before(self) -> int:
        """Steps that the state has seen, for reports: what one parameter tells is enough."""
        for program in self._programs:
            if program.adaptation.active:
                return int(program.adaptation.rows[0, TAKEN])
            if (counting := next((b for b in program.domain.parameters if b.rule.counts_steps), None)) is not None:
                return int(counting.state["step"])
        return 0

    def unbind(self) -> None:
        """Bind anew at the next step, as after state was loaded, which ranks must compare again."""
        self._bound_for = None

    def _depends_on(self, groups: Groups) -> tuple[Any, ...]:
        """What binding depends on, beside the members: how groups are orthogonalised, and how torch rounds fp32 products."""
        asked = [[group.get(key) for key in REBIND_KEYS] for group in groups]
        kinds = sorted({program.domain.device.type for program in self._programs})
        return (asked, [fp32_precision(kind) for kind in kinds], _world_now())

    def _meet(self) -> None:
        """Wait for all ranks that bind: one that binds alone would meet the others in another collective."""
        if not self._host_decides and (world := _world_now()) is not None:
            meet(sorted(dist.get_process_group_ranks(self._process_group or world)))

    def _agree_on_flag_group(self) -> dist.ProcessGroup | None:
        """The group that shares the finite flag where domains are several; None where one domain holds everything, or the host decides.

        Ranks with unlike parameters must agree on whether there is such a reduction, hence this one over `process_group`.
        """
        if self._host_decides or _world_now() is None or dist.get_world_size(self._process_group) == 1:
            return None
        everyone = tuple(sorted(dist.get_process_group_ranks(self._process_group or dist.group.WORLD)))
        domains = self.domains
        alone = len(domains) == 1 and domains[0].ranks == everyone
        device = domains[0].device if domains else torch.device("cpu")
        several = torch.tensor([not alone], dtype=torch.int32, device=device)
        wait_in_time(dist.all_reduce(several, dist.ReduceOp.MAX, group=self._process_group, async_op=True), everyone)
        return (self._process_group or dist.group.WORLD) if several.item() else None

    # ------------------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], groups: Groups, verdict: Tensor | None = None) -> None:
        """One step of what is bound. Collective.

        Args:
            grads: for every member its gradient, laid out as what this rank stores of it, or None.
            groups: their hyperparameters at this step.
            verdict: 0-d bool where the members are: whether the step happens, where the host decides.

        Raises:
            ValueError: with nonfinite="raise", a gradient that is not finite.
            RuntimeError: the ranks are not at the same step.
        """
        self._steps += 1
        if self._has_copies:
            for program in self._programs:
                allocation.drop_copies(program)
            self._has_copies = False
        self._follow(compile=True)
        for program in self._programs:
            program.matrix_state.receive()
        self._adapt()
        self._taken += 1
        self._report(self._taken)
        agreed = self._agree(grads, verdict)
        take_step(self._programs, grads, agreed.mask, groups)
        for program in self._programs:
            program.adaptation.end_step()
            program.matrix_state.share()
            if program.metrics is not None:
                own = {} if self._host_decides else {"skipped_steps": self._skipped}  # a host that decides counts them itself
                program.metrics.end_step(self._taken, {**own, "skipped_updates": self._left_out})

    def _follow(self, *, compile: bool) -> None:
        """Go on from what a user or host did to weights and state: what is gone begins anew, what was replaced is taken up."""
        for program in self._programs:
            if program.is_current:
                continue
            if missing := program.missing:
                program.matrix_state.receive()  # not what was on its way when it began anew
            for b in missing:
                allocation.declare(b.member, b.group)
                allocation.allocate(program, b)
            program.matrix_state.take_over()
            for b in program.domain.parameters:
                if not program.adaptation.taken_over(b):
                    program.adaptation.take_over(b)
            if compile:
                program.compile()

    @record_function("muon_dist::adapt")
    def _adapt(self) -> None:
        """Let measured spectra take effect, and choose owners anew where step counts have moved the balance."""
        for program in self._programs:
            adaptation, moved = program.adaptation, False
            if adaptation.is_time_for_new_owners() and (better := rebalanced(program.domain, adaptation, self._options)) is not None:
                program.move_to(better)
                allocation.complete(program, everywhere=program.everywhere)
                for b in better.parameters:
                    allocation.allocate(program, b)
                allocation.drop_copies(program)
                moved = True
            decided = adaptation.begin_step()
            if moved:
                program.compile()
            elif adaptation.changed:
                program.regroup(adaptation.changed)
            if decided and self._telemetry is not None:
                self._telemetry.write(program.domain, adaptation, decided, self._numel)

    @property
    def _numel(self) -> int:
        """Elements of the model, for scaling laws."""
        return self._model_numel or sum(math.prod(b.placement.shape) for domain in self.domains for b in domain.parameters)

    def _report(self, step: int | None) -> None:
        """Write reports that have arrived, and begin that of this step; None: write all that are under way."""
        for program in self._programs:
            if program.metrics is not None and self._telemetry is not None:
                if lines := list(program.metrics.arrived(step)):
                    self._telemetry.report(program.domain, lines, self._numel)
                if step is not None:
                    program.metrics.begin_step(step)

    @record_function("muon_dist::agree")
    def _agree(self, grads: Sequence[Tensor | None], verdict: Tensor | None) -> Agreement:
        asked, what = [program.consensus for program in self._programs], f"step {self._steps}"
        if self._host_decides:
            assert verdict is not None  # a host that decides says so
            agreed = agree_after_host(asked, len(grads), verdict, what)
        else:
            agreed = agree_on_gradients(asked, grads, self._flag_group, what)
        if self._apart.seen(agreed.apart):
            self._refuse_apart()
        bad = agreed.bad
        self._left_out = agreed.left_out if self._left_out is None else self._left_out + agreed.left_out
        if self._nonfinite == "raise" and agreed.left_out.item():
            raise ValueError(
                f"at the step before, {int(agreed.left_out)} matrices' updates had norms that no polar factor has, and were left out: "
                "products lose too many digits for the schedule. Give compute_dtype='fp32' with "
                "torch.set_float32_matmul_precision('highest'), fewer steps, or construct with nonfinite='skip'"
            )
        if self._nonfinite == "raise" and bad.item():
            found = [(b, grads[b.index]) for domain in self.domains for b in domain.parameters]
            here = [b.name or str(b.placement.shape) for b, g in found if g is not None and not g.isfinite().all()]
            raise ValueError(
                f"a gradient is not finite, or only some replicas have it: {', '.join(here) or 'on another rank'}; nothing was updated. "
                "Lower the learning rate or the loss scale, or construct with nonfinite='skip' to leave such steps out"
            )
        self._skipped = bad.to(torch.int64) if self._skipped is None else self._skipped + bad
        return agreed

    def count_reset(self) -> None:
        """Gradients were reset. Ranks where that happened unequally often are found at the next step. Doesn't communicate."""
        self._resets += 1
        for program in self._programs:
            program.consensus.iteration.add_(1).remainder_(COUNTED)

    def _refuse_apart(self) -> None:
        ranks = sorted({rank for domain in self.domains for rank in domain.ranks})
        counts = told(ranks, f"iteration/{self._steps}", str(self._resets))
        who = ", ".join(f"rank {rank} {count} times" for rank, count in sorted(counts.items()))
        raise RuntimeError(
            f"the ranks are not at the same iteration: before this step zero_grad() was called {who}. A rank that leaves out a step(), as "
            "a loss that is not a number may make it, would take every later step with the wrong gradients. Leave steps out on all ranks "
            "or on none: MuonDist does so where a gradient is not finite"
        )

    # ----------------------------------------------------------------------------------------------------------- state

    def collect(self) -> None:
        """Write what is under way into the state: measurements, and values of matrices. Starts no communication."""
        self._follow(compile=False)
        self._report(None)
        for program in self._programs:
            program.adaptation.collect()
            program.matrix_state.receive()

    def consolidate(self) -> None:
        """Bring the state of replicated members to every rank; the next step lets the copies go again. Collective."""
        for program in self._programs:
            allocation.complete(program, everywhere=True)
        self._has_copies = True


def _world_now() -> Any:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
