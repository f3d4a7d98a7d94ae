"""A parameter as its host gives it to an engine, and as binding leaves it: where its pieces lie, and what its matrices are computed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .polar.matrix_view import Matrix
from .polar.newton_schulz import default_compute_dtype
from .polar.polynomials import Schedule
from .routing import Route
from .rules import MatrixRule, Rule, rule_of
from .sharding.layout import Placement, ShardLayout, box_shape, local_tensor
from .spectrum.policy import Policy


@dataclass(eq=False, kw_only=True)
class Member:
    """A tensor that an engine steps.

    Attributes:
        name: its parameter's, equal on all ranks; "" where it has none.
        tensor: what this rank stores of the parameter: a plain tensor, or a DTensor. A host may put another in its place.
        route: which rule updates it, and how it is read as matrices.
        group: the place of its hyperparameters among those of a step.
        state: the host's dictionary of its state; the engine puts what is missing there. A host may replace it and what it holds.
        layout: where the tensor lies in the parameter; None: as the tensor tells itself.
    """

    name: str
    tensor: Tensor
    route: Route
    group: int
    state: dict[str, Any]
    layout: ShardLayout | None = None

    @property
    def trains(self) -> bool:
        """Whether it is not frozen for now; what is frozen keeps its state."""
        return self.route.algorithm != "frozen"

    @property
    def local(self) -> Tensor:
        """What this rank stores of it, sharing its memory."""
        return local_tensor(self.tensor).detach()  # in this order: to detach a DTensor takes ten times as long


@dataclass(eq=False, kw_only=True)
class BoundParameter:
    """A member with where its pieces lie on the ranks, and what its matrices are computed in."""

    member: Member
    index: int  # among the engine's members
    group: Mapping[str, Any]  # its hyperparameters, as they were at binding
    placement: Placement
    ranks: tuple[int, ...]
    device: torch.device  # where its matrices are orthogonalised and travel
    known_group: dist.ProcessGroup | None = None
    position: int = -1  # in its domain
    matrices: tuple[Matrix, ...] = ()
    fixed: Schedule | None = None  # of all its matrices, where step counts don't adapt
    policy: Policy | None = None  # where they do
    row: int = -1  # of its first matrix, in what its domain's adaptation knows
    spectrum: Tensor | None = None  # its rows there, which its state holds
    depth: float = 1.0  # relative, of its block in the model
    compute_dtype: torch.dtype = torch.float32
    wire_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def state(self) -> dict[str, Any]:
        return self.member.state

    @property
    def rule(self) -> Rule:
        return rule_of(self.group)

    @property
    def travels(self) -> bool:
        """Whether it is updated as whole matrices."""
        return isinstance(self.rule, MatrixRule)

    def compute_dtype_for(self, schedule: Schedule) -> torch.dtype:
        """What a matrix is computed in: as asked, or by the schedule's reach on an accelerator."""
        if self.group["compute_dtype"] is not None or self.compute_dtype != torch.bfloat16:
            return self.compute_dtype
        return default_compute_dtype(self.device, self.member.tensor.dtype, schedule)


def stored_as_box(bound: BoundParameter, me: int) -> bool:
    """Whether a rank's tensor is one box of the whole parameter, and no flat fragment of it."""
    fragment = bound.placement.fragments[me]
    return len(fragment) == 1 and box_shape(fragment[0]) == tuple(bound.member.local.shape)
