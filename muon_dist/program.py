"""A domain's step, compiled: which tensors each bucket reads and writes, by which rule, as plain lists that the step goes through.

Binding makes a program once. It is made anew, in part or as a whole, where what it holds has changed: a host has put other tensors
behind parameters or into their state, step counts have moved matrices to other batches, or owners were chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .adaptation import Adaptation
from .agreement import Consensus
from .bound import BoundParameter, stored_as_box
from .domain import Domain
from .matrix_state import MatrixState
from .metrics import REPORT_EVERY, Metrics
from .polar.matrix_view import Matrix
from .polar.newton_schulz import Slices
from .rules import ElementwiseRule, MatrixRule
from .sharding.exchange import BucketRoute, Exchange, Leg, route_bucket
from .sharding.layout import local_tensor
from .sharding.state import is_absent
from .sharding.tasks import SLICED


@dataclass(eq=False, kw_only=True)
class FragmentRun:
    """Fragments of one group on one device, which a rule changes in one go. The lists are parallel.

    Attributes:
        positions: their parameters' in the domain.
        members: and in the engine, where gradients and the mask have them.
    """

    rule: Any
    group: int
    positions: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class PieceRun:
    """Pieces of weights that updates are applied to in one go, of matrices of one group, shape and device.

    Attributes:
        members: the parameters', in the engine.
        places: of their updates among those that arrive together.
        targets: views of the weights.
        counted: places of those that this rank counts in reports, here in `targets`.
        matrices: (counted,) int64 on the domain's device: the matrices they are of.
    """

    rule: MatrixRule
    group: int
    rows: int
    cols: int
    members: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    matrices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))


@dataclass(eq=False, kw_only=True)
class Batch:
    """Matrices of one shape, or slices of them, that this rank orthogonalises together.

    Attributes:
        matrices: their numbers in the domain.
        members: their parameters', in the engine.
        first, shape: the parameter of the first, and it; in what matters here the others are like it.
        slices: the part that this rank works on; None: whole matrices.
        state: what the rule keeps of each matrix, by name.
        rank: the smaller side of a whole one.
        counts: whether this rank counts and records what all ranks know of them.
    """

    matrices: tuple[int, ...]
    members: list[int]
    first: BoundParameter
    slices: Slices | None
    state: dict[str, list[Tensor]]
    shape: Matrix
    rank: int
    counts: bool


@dataclass(eq=False, kw_only=True)
class Bucket:
    """What travels together.

    Attributes:
        route: what this rank sends and receives.
        prepared: fragments whose first matrix is in this bucket.
        batches: what this rank orthogonalises.
        home, arriving: where the updates of `route.stay` and of what arrives go.
        done: positions of parameters whose last matrix is in this bucket.
    """

    route: BucketRoute
    prepared: list[FragmentRun]
    batches: list[Batch]
    home: list[PieceRun]
    arriving: list[PieceRun]
    done: list[int]


class Program:
    """One domain's step.

    Args:
        domain: as bound.
        adaptation: what is known of its matrices.
        everywhere: every rank keeps the momentum of plain replicas, not their owners alone.
        reports: what steps do to matrices is reported.
    """

    def __init__(self, domain: Domain, adaptation: Adaptation, *, everywhere: bool, reports: bool = False) -> None:
        self.domain, self.adaptation, self.everywhere = domain, adaptation, everywhere
        self.consensus = Consensus(domain)
        self.matrix_state = MatrixState(domain)
        periods = [b.policy.measure_every for b in domain.parameters if b.policy is not None]
        self.metrics = Metrics(domain, min(periods, default=REPORT_EVERY)) if reports and domain.matrices else None
        self.exchange = Exchange(group=domain.process_group, device=domain.device)
        self.buckets: list[Bucket] = []
        self.elementwise: list[FragmentRun] = []
        self._batch_keys: list[Hashable] = []
        self._keys = [
            (*b.rule.keys, *(v.name for v in b.rule.of_matrices), *(("spectrum",) if b.policy is not None else ()))
            for b in domain.parameters
        ]
        self._places: list[int] = []  # of the weights in memory, for which this was compiled
        self._state: list[Any] = []  # the state that was, and what it is in

    def keeps(self, bound: BoundParameter) -> bool:
        """Whether this rank keeps the state of a parameter: its owner does where replicas could, every holder elsewhere."""
        if not bound.placement.replicated or not bound.travels or self.everywhere:
            return True
        return self.domain.owner_of(bound) == self.domain.me

    @property
    def batch_keys(self) -> list[Hashable]:
        """Of each matrix: those with equal keys and shapes are orthogonalised together."""
        return self._batch_keys

    # ------------------------------------------------------------------------------------------------------- compiling

    def compile(self) -> None:
        """Look everything up anew. State is allocated by then."""
        domain, plan = self.domain, self.domain.plan
        self._batch_keys = [(t.batch_key, s) for t, s in zip(plan.matrices, self.adaptation.schedules, strict=True)]
        local = [b.member.local for b in domain.parameters]
        meets = [[plan.matrices[i].parameter for i in bucket] for bucket in plan.buckets]
        begun: set[int] = set()
        self.buckets = []
        for k, met in enumerate(meets):
            fresh, later = sorted(set(met) - begun), {q for rest in meets[k + 1 :] for q in rest}
            begun.update(met)
            route = self._route(k)
            self.buckets.append(
                Bucket(
                    route=route,
                    prepared=self._fragments(fresh, local, lambda b: b.travels and self.keeps(b)),
                    batches=self._batches(route),
                    home=self._pieces(route.stay, local),
                    arriving=self._pieces(route.scatter.arriving, local),
                    done=sorted(set(met) - later),
                )
            )
        every = range(len(domain.parameters))  # empty shards too: their step count is saved by whichever rank writes it
        self.elementwise = self._fragments(every, local, lambda b: isinstance(b.rule, ElementwiseRule))
        self.consensus.look_up()
        self._places, self._state = self._places_now(), self._state_now()

    def regroup(self, changed: Collection[int]) -> None:
        """Put those matrices whose schedules changed into other batches, in the buckets where they are this rank's. What travels stays
        as it is.
        """
        plan = self.domain.plan
        for i in changed:
            self._batch_keys[i] = (plan.matrices[i].batch_key, self.adaptation.schedules[i])
        mine = {i for i in changed if plan.owners[i] in (self.domain.me, SLICED)}
        for k, bucket in enumerate(self.buckets):
            if mine.intersection(plan.buckets[k]):
                bucket.route = self._route(k)
                bucket.batches = self._batches(bucket.route)

    def move_to(self, domain: Domain) -> None:
        """Go on with other owners. The next `compile` takes them up."""
        self.matrix_state.receive()
        self.domain = self.consensus.domain = domain
        self.matrix_state = MatrixState(domain)

    def _route(self, bucket: int) -> BucketRoute:
        domain = self.domain
        return route_bucket(
            domain.plan, bucket, domain.me, lambda position: stored_as_box(domain.parameters[position], domain.me), self._batch_keys
        )

    def _fragments(self, positions: Iterable[int], local: Sequence[Tensor], takes: Callable[[BoundParameter], bool]) -> list[FragmentRun]:
        runs: dict[tuple[int, torch.device], FragmentRun] = {}
        for position in positions:
            b = self.domain.parameters[position]
            if not takes(b):
                continue
            key = (b.member.group, local[position].device)
            if key not in runs:
                runs[key] = FragmentRun(rule=b.rule, group=b.member.group, state={name: [] for name in b.rule.keys})
            run = runs[key]
            run.positions.append(position)
            run.members.append(b.index)
            run.weights.append(local[position])
            for name, values in run.state.items():
                values.append(local_tensor(b.state[name]))
        return list(runs.values())

    def _batches(self, route: BucketRoute) -> list[Batch]:
        domain, result = self.domain, []
        for indices, slicing in zip(route.batches, route.slicings, strict=True):
            shape, slices = domain.plan.matrices[indices[0]].shape, None
            if slicing is not None:
                start, stop = ((bound - slicing.bounds[0]) * slicing.lines for bound in slicing.bounds[domain.me : domain.me + 2])
                slices = Slices(shape, slicing.dim, start, stop, self.exchange.add_up)
            bound = [domain.parameters[domain.plan.matrices[i].parameter] for i in indices]
            result.append(
                Batch(
                    matrices=indices,
                    members=[b.index for b in bound],
                    first=bound[0],
                    slices=slices,
                    state={v.name: [self.matrix_state.of(i, v.name) for i in indices] for v in bound[0].rule.of_matrices},
                    shape=domain.matrices[indices[0]],
                    rank=min(shape),
                    counts=slicing is None or domain.me == 0,  # all ranks have the moments of what is sliced
                )
            )
        return result

    def _pieces(self, legs: Sequence[Leg], local: Sequence[Tensor]) -> list[PieceRun]:
        runs: dict[Hashable, PieceRun] = {}
        counted: dict[Hashable, list[int]] = {}
        for place, leg in enumerate(legs):
            b, matrix = self.domain.parameters[leg.parameter], self.domain.matrices[leg.matrix]
            assert leg.view is not None and isinstance(b.rule, MatrixRule)  # updates are for holders
            weight = local[leg.parameter]
            key = (b.member.group, matrix.rows, matrix.cols, weight.device)
            if key not in runs:
                runs[key] = PieceRun(rule=b.rule, group=b.member.group, rows=matrix.rows, cols=matrix.cols)
            runs[key].members.append(b.index)
            runs[key].places.append(place)
            if leg.counts:
                counted.setdefault(key, []).append(leg.matrix)
                runs[key].counted.append(len(runs[key].targets))
            runs[key].targets.append(leg.view.of(weight))
        for made, run in runs.items() if self.metrics is not None else ():
            run.matrices = torch.tensor(counted.get(made, []), dtype=torch.int64, device=self.domain.device)
        return list(runs.values())

    # ------------------------------------------------------------------------------------------------------ what changed

    @property
    def is_current(self) -> bool:
        """Whether the weights and their state are those for which this was compiled."""
        return self._places == self._places_now() and self._same_state()

    def _places_now(self) -> list[int]:
        tensors = [b.member.tensor for b in self.domain.parameters]
        return [(t._local_tensor if isinstance(t, DTensor) else t).data_ptr() for t in tensors]

    def _state_now(self) -> list[Any]:
        return [value for b in self.domain.parameters for value in (b.state, *map(b.state.get, self._keys[b.position]))]

    def _same_state(self) -> bool:
        now = self._state_now()
        return len(now) == len(self._state) and all(map(is_, now, self._state))

    @property
    def missing(self) -> list[BoundParameter]:
        """Parameters whose state has gone, or holds no values where this rank keeps it."""
        return [b for b in self.domain.parameters if self._lacks(b)]

    def _lacks(self, b: BoundParameter) -> bool:
        if not b.state.keys() >= set(self._keys[b.position]):
            return True
        return self.keeps(b) and any(is_absent(b.state[key]) for key in b.rule.keys)
