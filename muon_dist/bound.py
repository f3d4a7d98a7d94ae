"""A parameter as binding leaves it: its route, its group, where its pieces lie, and what its matrices are computed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .polar.matrix_view import Matrix
from .polar.newton_schulz import default_compute_dtype
from .polar.polynomials import Schedule
from .routing import Route
from .sharding.layout import Placement, box_shape, local_tensor
from .spectrum.policy import Policy


@dataclass(eq=False, kw_only=True)
class BoundParameter:
    """A trainable parameter with its route, its group's hyperparameters, and where its pieces lie."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    route: Route
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
    def muon(self) -> bool:
        return bool(self.group["algorithm"] == "muon")

    @property
    def local(self) -> Tensor:
        return local_tensor(self.parameter).detach()  # in this order: to detach a DTensor takes ten times as long

    def compute_dtype_for(self, schedule: Schedule) -> torch.dtype:
        """What a matrix is computed in: as asked, or by the schedule's reach on an accelerator."""
        if self.group["compute_dtype"] is not None or self.compute_dtype != torch.bfloat16:
            return self.compute_dtype
        return default_compute_dtype(self.device, self.local.dtype, schedule)


def stored_as_box(bound: BoundParameter, me: int) -> bool:
    """Whether a rank's tensor is one box of the whole parameter, and no flat fragment of it."""
    fragment = bound.placement.fragments[me]
    return len(fragment) == 1 and box_shape(fragment[0]) == tuple(bound.local.shape)
