"""A **domain**: ranks that share parameters. Whatever travels, travels inside one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .adaptation import Adaptation
from .bound import BoundParameter, stored_as_box
from .polar.matrix_view import Matrix
from .polar.products import SymmetricProducts
from .sharding.exchange import BucketRoute, Exchange, route_bucket
from .sharding.plan import Plan
from .sharding.tasks import SLICED


@dataclass(eq=False, kw_only=True)
class Domain:
    """Ranks that share parameters, the parameters in an order equal on all of them, and how their matrices travel."""

    ranks: tuple[int, ...]
    me: int
    process_group: dist.ProcessGroup | None  # None: one rank
    device: torch.device
    products: SymmetricProducts
    parameters: list[BoundParameter]
    adaptation: Adaptation
    plan: Plan
    exchange: Exchange
    matrices: list[Matrix]  # parallel to plan.matrices
    batch_keys: list[Hashable]  # parallel to them: of what is orthogonalised together
    owner_of_parameter: list[int] = field(default_factory=list)
    # per parameter: the ranks that hold some of it, where a piece is held twice; else 0
    whole_count: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    first_bucket: list[list[int]] = field(default_factory=list)  # parameters whose first matrix travels in a bucket
    last_bucket: list[list[int]] = field(default_factory=list)
    replicate_momentum: bool = False  # every rank keeps the momentum of plain replicas, not their owners alone
    left_out: Tensor = field(init=False)  # updates of this rank's matrices that were no polar factors, and that others don't know of
    iteration: Tensor = field(init=False)  # how often gradients were reset since binding; beyond COUNTED from 0 again
    _flags: tuple[list[bool], Tensor] = field(default_factory=lambda: ([], torch.empty(0, device="cpu")))  # the last that were asked for

    def __post_init__(self) -> None:
        self.left_out, self.iteration = torch.zeros(2, dtype=torch.int32, device=self.device).unbind()

    def owns(self, bound: BoundParameter) -> bool:
        """Whether this rank keeps the momentum of a parameter: its owner does where replicas could, every holder elsewhere."""
        if not bound.placement.replicated or self.replicate_momentum:
            return True
        return self.owner_of(bound) == self.me

    def flags(self, present: list[bool]) -> Tensor:
        """Four zeros and `present`, in int32 on the device, a new tensor. They seldom change; a copy from the host would wait."""
        if self._flags[0] != present:
            self._flags = (present, torch.tensor([0, 0, 0, 0, *present], dtype=torch.int32, device=self.device))
        return self._flags[1].clone()

    def reading(self, tensors: Mapping[BoundParameter, Tensor]) -> Callable[[int], Tensor]:
        """Look tensors up by a parameter's position, as the exchange knows it."""
        return lambda position: tensors[self.parameters[position]]

    def regroup(self, changed: Collection[int]) -> None:
        """Put those matrices whose schedules changed into other batches, in the buckets where they are this rank's. What travels stays
        as it is.
        """
        for i in changed:
            self.batch_keys[i] = (self.plan.matrices[i].batch_key, self.adaptation.schedules[i])
        mine = {i for i in changed if self.plan.owners[i] in (self.me, SLICED)}
        self.exchange.routes = tuple(
            route_of(self.plan, bucket, self.parameters, self.me, self.batch_keys)
            if mine.intersection(self.plan.buckets[bucket])
            else route
            for bucket, route in enumerate(self.exchange.routes)
        )

    def owner_of(self, bound: BoundParameter) -> int:
        """The rank that owns a parameter's first matrix (all of them, if it is replicated); rank 0 for an empty or sliced one."""
        return self.owner_of_parameter[bound.position]


def route_of(plan: Plan, bucket: int, members: Sequence[BoundParameter], me: int, keys: Sequence[Hashable]) -> BucketRoute:
    return route_bucket(plan, bucket, me, lambda position: stored_as_box(members[position], me), keys)
