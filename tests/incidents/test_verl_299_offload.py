"""verl #299: offload loops run over optimizer state before the first step. `optimizer.state` is a defaultdict, so looking makes
entries, and what initialises lazily takes them for its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from muon_dist import MuonDist


class Lazy(torch.optim.SGD):
    """Momentum that is made where there is no entry, as many optimizers' is."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            p -= self.state[p]["momentum_buffer"].lerp_(p.grad, 0.1)


def train(build: Any, offloads: bool) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    optimizer = build(model)
    for k in range(3):
        if offloads:
            for p in model.parameters():
                for key, value in list(optimizer.state[p].items()):
                    optimizer.state[p][key] = value.to("cpu", copy=True)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i))
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_looking_at_state_before_the_first_step_changes_nothing() -> None:
    try:
        train(lambda model: Lazy(model.parameters(), lr=0.1), True)
    except KeyError as error:
        assert "momentum_buffer" in str(error)  # the fault
    else:
        raise AssertionError("looking did no harm there")
    for options in ({"ns_steps": 5}, {"burn_in": 0, "measure_every": 2}):

        def build(model: nn.Module, options: dict[str, Any] = options) -> MuonDist:
            return MuonDist(model.named_parameters(), lr=0.1, **options)

        assert torch.equal(train(build, True), train(build, False))
