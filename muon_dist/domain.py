"""A **domain**: ranks that share parameters. Whatever travels, travels inside one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .bound import BoundParameter
from .polar.matrix_view import Matrix
from .polar.products import SymmetricProducts
from .sharding.plan import Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranks:
    """Ranks that share something, as one of them sees them.

    Attributes:
        ranks: their global ranks.
        me: this one's place among them.
        process_group: of exactly these; None: one rank.
        device: where what they share is, here.
    """

    ranks: tuple[int, ...]
    me: int
    process_group: dist.ProcessGroup | None
    device: torch.device


@dataclass(frozen=True, eq=False, kw_only=True)
class Domain(Ranks):
    """Ranks that share parameters, the parameters in an order equal on all of them, and the plan by which their matrices travel.

    Attributes:
        matrices: parallel to plan.matrices.
        owners: per parameter, the rank that owns its first matrix (all of them, if it is replicated); rank 0 for an empty or sliced one.
    """

    products: SymmetricProducts
    parameters: tuple[BoundParameter, ...]
    matrices: tuple[Matrix, ...]
    plan: Plan
    owners: tuple[int, ...]

    def owner_of(self, bound: BoundParameter) -> int:
        return self.owners[bound.position]
