"""What integrations share: the tensors that a host steps in one call, as an engine's members.

A host replaces a model's parameters by tensors of its own: flat partitions, shards, fp32 copies. It offloads, saves and loads
them, and their state with them, so both stay the host's; what the engine has are views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from muon_dist.bound import Member
from muon_dist.engine import Engine
from muon_dist.groups import PlanOptions, view_of
from muon_dist.rendezvous import gather_objects, meet
from muon_dist.routing import Route
from muon_dist.rules import Rule, rule_of
from muon_dist.sharding.layout import ShardLayout
from muon_dist.telemetry import Telemetry

OfMatrices = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class HostView:
    """A host's tensor, or a range of a flat one, as one parameter.

    Attributes:
        tensor: the host's, which it wants updated by its `.grad`.
        span: the elements (start, stop) of a flat tensor; None: the tensor as it is.
        name: the parameter's.
        layout: where these elements lie in the parameter.
        group: index of the group that holds its hyperparameters.
        reason: why it goes where it goes.
    """

    tensor: Tensor
    span: tuple[int, int] | None
    name: str
    layout: ShardLayout
    group: int
    reason: str

    def of(self, tensor: Tensor) -> Tensor:
        """This view's part of a tensor that is laid out as the host's."""
        return tensor if self.span is None else tensor[self.span[0] : self.span[1]]


class HostViews:
    """What a host steps in one call, and the engine that steps it.

    Args:
        views: in an order equal on all ranks that share them, those of which nothing lies here included.
        groups: complete parameter groups (`muon_dist.groups.read_groups`), which hold the hyperparameters.
        state_of: gives the state of one of the host's tensors, laid out as the tensor: what `new_state` made.
        of_matrices: what is kept of whole matrices, by key ("spectrum", and what rules declare) and name of parameter; filled as it comes.
        options: of the plan.
        host_decides, telemetry, all_names, model_numel: as of `Engine`.
    """

    def __init__(
        self,
        views: Sequence[HostView],
        groups: Sequence[Mapping[str, Any]],
        state_of: Callable[[Tensor], dict[str, Any]],
        of_matrices: OfMatrices,
        *,
        options: PlanOptions,
        host_decides: bool,
        telemetry: Telemetry | None = None,
        all_names: Sequence[str] = (),
        model_numel: int = 0,
    ) -> None:
        self.engine = Engine(options=options, host_decides=host_decides, telemetry=telemetry, all_names=all_names, model_numel=model_numel)
        self._state_of, self._of_matrices = state_of, of_matrices
        self._views = tuple(views)
        self._members = [_member(view, groups[view.group]) for view in views]
        self._rules = [rule_of(groups[view.group]) for view in views]
        self._memory: list[Any] = []  # in which the host's tensors and their state were when members were linked to them
        by_tensor = {id(view.tensor): (view.tensor, rule) for view, rule in zip(views, self._rules, strict=True)}
        self._counted = [tensor for tensor, rule in by_tensor.values() if not rule.counts_steps]

    def _link(self) -> None:
        """Point the members at the host's tensors and their state, where the host may have put others since."""
        kept = [self._state_of(view.tensor) for view in self._views]
        memory: list[Any] = []
        for view, rule, state in zip(self._views, self._rules, kept, strict=True):
            memory.append(view.tensor.data_ptr())
            memory += [state[key].data_ptr() for key in rule.keys]
        if memory != self._memory:
            for view, member, rule, state in zip(self._views, self._members, self._rules, kept, strict=True):
                member.tensor = view.of(view.tensor.detach())
                for key in rule.keys:
                    member.state[key] = state[key] if key == "step" else view.of(state[key])
            self._memory = memory
        for key, by_name in self._of_matrices.items():
            for member in self._members:
                value = by_name.get(member.name)
                if value is not None and member.state.get(key) is not value:
                    member.state[key] = value
                    self.engine.unbind()  # which works on other numbers

    def step(self, groups: Sequence[Mapping[str, Any]], verdict: Tensor | None) -> None:
        """Step by the gradients of the host's tensors, with the hyperparameters of all `groups` as they are now."""
        self._link()
        self.engine.bind(self._members, groups)
        grads = [None if view.tensor.grad is None else view.of(view.tensor.grad) for view in self._views]
        self.engine.step(grads, groups, verdict)
        for member, rule in zip(self._members, self._rules, strict=True):
            for key in ("spectrum", *(value.name for value in rule.of_matrices)):
                if (value := member.state.get(key)) is not None:
                    self._of_matrices.setdefault(key, {})[member.name] = value
        for tensor in self._counted if verdict is not None else ():  # other rules count by themselves
            self._state_of(tensor)["step"] += verdict

    @property
    def device(self) -> torch.device:
        """Where the host's tensors are."""
        return self._views[0].tensor.device


def _member(view: HostView, group: Mapping[str, Any]) -> Member:
    route = Route(name=view.name, algorithm=group["algorithm"], reason=view.reason, view=view_of(group))
    return Member(name=view.name, tensor=view.of(view.tensor.detach()), route=route, group=view.group, state={}, layout=view.layout)


def new_state(tensor: Tensor, rule: Rule) -> dict[str, Tensor]:
    """The state of a host's tensor before the first step."""
    state = {key: torch.zeros_like(tensor, requires_grad=False) for key in rule.values}
    return {**state, "step": torch.zeros((), dtype=torch.float32, device=tensor.device)}


def not_finite(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether any of the gradients is not finite, a 0-d bool on `device`."""
    norms = torch._foreach_norm([g for g in grads if g.numel()], float("inf"))
    largest = [n.to(device, torch.float64) for n in norms]
    return ~torch.stack(largest).isfinite().all() if largest else torch.zeros((), dtype=torch.bool, device=device)


def all_holders(
    data_parallel: ProcessGroup, tensor_parallel: ProcessGroup | None, made: dict[tuple[int, ...], ProcessGroup]
) -> ProcessGroup | None:
    """The group of all ranks that hold pieces of the parameters which `data_parallel` and its tensor-parallel peers share. Collective.

    `made` keeps the groups made here.
    """
    if tensor_parallel is None or dist.get_world_size(tensor_parallel) == 1:
        return data_parallel
    ranks = tuple(sorted({r for each in gather_objects(dist.get_process_group_ranks(data_parallel), tensor_parallel) for r in each}))
    if ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    if ranks not in made:
        meet(ranks)
        made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]
