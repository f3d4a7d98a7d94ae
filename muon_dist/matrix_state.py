"""State of whole matrices, which their owners compute (`rules.MatrixValue`): every rank of a domain has all of it.

It is small, so it need not move with owners and is complete in every rank's state dict. After a step each rank has computed the values
of its own matrices; one all-reduce, behind the step, tells them to all.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from .bound import BoundParameter
from .domain import Domain
from .rules.rule import Rule
from .sharding.tasks import SLICED


def values_of(rule: Rule, shapes: list[tuple[int, int]]) -> dict[str, int]:
    """How many numbers a rule keeps for matrices of (outputs, inputs), by name."""
    return {value.name: sum(math.prod(value.shape(*shape)) for shape in shapes) for value in rule.of_matrices}


class MatrixState:
    """The values of one domain, in one buffer. What parameters' state has of it are views.

    Attributes:
        flat: (all values,) on the domain's device.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._kept: list[tuple[BoundParameter, str, Tensor]] = []  # a parameter's values of one name
        self._of_matrix: dict[tuple[int, str], Tensor] = {}
        self._arriving: tuple[dist.Work, Tensor] | None = None
        parameters = [b for b in domain.parameters if b.matrices and b.rule.of_matrices]
        precise = any(b.member.tensor.dtype == torch.float64 for b in parameters)
        count = sum(sum(values_of(b.rule, [(m.rows, m.cols) for m in b.matrices]).values()) for b in parameters)
        self.flat = torch.zeros(count, dtype=torch.float64 if precise else torch.float32, device=domain.device)
        owned = torch.zeros(count, dtype=torch.bool, device="cpu")
        first, at = 0, 0
        for b in domain.parameters:
            for value in b.rule.of_matrices if b.matrices else ():
                begin = at
                for i, matrix in enumerate(b.matrices, first):
                    shape = value.shape(matrix.rows, matrix.cols)
                    stop = at + math.prod(shape)
                    self._of_matrix[i, value.name] = self.flat[at:stop].view(shape)
                    owner = domain.plan.owners[i]
                    owned[at:stop] = domain.me == (0 if owner == SLICED else owner)  # of slices all ranks compute the same
                    at = stop
                self._kept.append((b, value.name, self.flat[begin:at]))
            first += len(b.matrices)
        self._owned = owned.to(domain.device)
        self.take_over()

    def of(self, matrix: int, name: str) -> Tensor:
        """A matrix's value, to be changed in place by its owner."""
        return self._of_matrix[matrix, name]

    def take_over(self) -> None:
        """Go on from what is in the parameters' state, which a host may have replaced, and put views there."""
        for b, name, view in self._kept:
            given = b.state.get(name)
            if given is view:
                continue
            if given is not None and given.numel() == view.numel():
                view.copy_(given.reshape(-1))
            else:
                view.zero_()
                if given is not None:
                    warnings.warn(
                        f"{b.name}: its state has {given.numel()} numbers of {name!r} where its matrices need {view.numel()}: begun anew",
                        stacklevel=2,
                    )
            b.state[name] = view

    def share(self) -> None:
        """Tell all ranks what this one has computed. Collective, where there is anything to tell."""
        if self._domain.process_group is not None and self._kept:
            told = torch.where(self._owned, self.flat, 0)
            self._arriving = (dist.all_reduce(told, group=self._domain.process_group, async_op=True), told)

    def receive(self) -> None:
        """Take in what the last `share` has brought."""
        if self._arriving is not None:
            work, told = self._arriving
            work.wait()
            self.flat.copy_(told)
            self._arriving = None
