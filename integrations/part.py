"""What integrations share: the tensors that a host steps in one call, as a MuonDist on views of them.

A host replaces a model's parameters by tensors of its own: flat partitions, shards, fp32 copies. It offloads, saves and loads
them, and their state with them, so both stay the host's; what the optimizer has are views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import muon_dist
from muon_dist.agreement import Agreement, agree_after_host
from muon_dist.bound import BoundParameter
from muon_dist.groups import GROUP_KEYS, STRUCTURE, PlanOptions
from muon_dist.polar.polynomials import Schedule
from muon_dist.rendezvous import gather_objects, meet
from muon_dist.sharding.layout import ShardLayout
from muon_dist.sharding.plan import Plan
from muon_dist.sharding.state import VALUES


@dataclass(frozen=True, kw_only=True)
class View:
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


class _Steps(muon_dist.MuonDist):
    """MuonDist that a host tells whether the step happens, where the host knows; it asks the gradients otherwise."""

    verdict: Tensor | None = None  # a bool, where the host's tensors are

    def _agreement(self, grads: dict[BoundParameter, Tensor | None], what: str) -> Agreement:
        if self.verdict is None:
            return super()._agreement(grads, what)
        return agree_after_host(self._domains, grads, self.verdict, what)

    def _meet(self) -> None:
        """Ranks that hold nothing of this part don't come."""
        if self.verdict is None:
            super()._meet()

    def _agree_on_flag_group(self) -> ProcessGroup | None:
        """Nothing to agree on where the host decides; ranks that hold nothing of this part don't come, and would be waited for."""
        return super()._agree_on_flag_group() if self.verdict is None else None


class Part:
    """Views of what a host steps in one call, and the optimizer that steps them.

    Args:
        views: in an order equal on all ranks that share them, those of which nothing lies here included.
        groups: complete parameter groups (`muon_dist.groups.read_groups`), which hold the hyperparameters.
        state_of: gives the state of one of the host's tensors, laid out as the tensor: "momentum_buffer", or AdamW's, and "step".
        spectra: the rows of measured spectra, by the names of parameters; filled as they are measured.
        options: of the plan, as `MuonDist` takes them one by one.
    """

    def __init__(
        self,
        views: Sequence[View],
        groups: Sequence[Mapping[str, Any]],
        state_of: Callable[[Tensor], dict[str, Any]],
        spectra: dict[str, Tensor],
        *,
        options: PlanOptions,
    ) -> None:
        self._state_of, self._spectra = state_of, spectra
        self._views = [(view, nn.Parameter(view.of(view.tensor.detach()))) for view in views]
        self._order = sorted({view.group for view in views})
        own_groups: dict[int, dict[str, Any]] = {}
        for i in self._order:
            keys = GROUP_KEYS[groups[i]["algorithm"]] - {"params", "param_names"}
            own_groups[i] = {**{key: groups[i][key] for key in keys if key in groups[i]}, "params": [], "reasons": []}
        for view, p in self._views:
            own_groups[view.group]["params"].append((view.name, p))
            own_groups[view.group]["reasons"].append(view.reason)
        layouts = {view.name: view.layout for view in views}
        self.optimizer = _Steps(own_groups.values(), layouts=layouts, ns_steps=5, **dataclasses.asdict(options))
        self._counted = list({id(v.tensor): v.tensor for v in views if groups[v.group]["algorithm"] == "muon"}.values())
        self._link_state()

    def _link_state(self) -> None:
        """Point the views at the host's state, where the host may have put other tensors since."""
        for view, p in self._views:
            kept, ours = self._state_of(view.tensor), self.optimizer.state[p]
            for key in ours.keys() - {"spectrum"}:
                ours[key] = kept[key] if key == "step" else view.of(kept[key])
            if view.name in self._spectra and ours.get("spectrum") is not self._spectra[view.name]:
                ours["spectrum"] = self._spectra[view.name]
                self.optimizer._signature = None  # its adaptation works on other rows

    def step(self, groups: Sequence[Mapping[str, Any]], verdict: Tensor | None) -> None:
        """Step by the gradients of the host's tensors, with the hyperparameters of all `groups` as they are now."""
        self._link_state()
        for i, group in zip(self._order, self.optimizer.param_groups, strict=True):
            group.update({key: groups[i][key] for key in GROUP_KEYS[group["algorithm"]] - STRUCTURE})
        for view, p in self._views:
            p.data = view.of(view.tensor.data)
            p.grad = None if view.tensor.grad is None else view.of(view.tensor.grad)
        self.optimizer.verdict = verdict
        self.optimizer.step()
        for view, p in self._views:
            p.grad = None
            rows = self.optimizer.state[p].get("spectrum")
            if rows is not None:
                self._spectra[view.name] = rows
        if verdict is not None:
            for tensor in self._counted:  # AdamW counts by itself
                self._state_of(tensor)["step"] += verdict

    @property
    def device(self) -> torch.device:
        """Where the host's tensors are."""
        return self._views[0][0].tensor.device

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        return self.optimizer.schedules

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        return self.optimizer.plans

    def collect(self) -> None:
        """Write measurements that are under way into the spectra."""
        self.optimizer._collect_measurements()


def new_state(tensor: Tensor, algorithm: str) -> dict[str, Tensor]:
    """The state of a host's tensor before the first step."""
    state = {key: torch.zeros_like(tensor, requires_grad=False) for key in VALUES[algorithm]}
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
