"""pytorch #37410 (open): no optimizer has a reset, so people write `optimizer.state = defaultdict(dict)`. An optimizer that makes its
state once ends in a KeyError then.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from muon_dist import MuonDist

from ..ranks import run_ranks


def stepped(make: Any, reset: bool) -> Tensor:
    """The second step's update: after a reset, or of a new optimizer from the same weights."""
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    optimizer = make(model)
    for k in range(2):
        if k and reset:
            optimizer.state = defaultdict(dict)
        elif k:
            optimizer = make(model)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i))
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Once(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= self.state[p]["momentum_buffer"].lerp_(p.grad, 0.1)


def on_all_ranks() -> bool:
    return torch.equal(*(stepped(lambda m: MuonDist(m.named_parameters(), lr=0.1), reset) for reset in (True, False)))


def test_a_reset_gives_a_new_optimizer() -> None:
    try:
        stepped(lambda model: Once(model.parameters()), True)
    except KeyError as error:
        assert "momentum_buffer" in str(error)  # the fault
    else:
        raise AssertionError("it went well there")
    for make in (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1), lambda m: MuonDist(m.named_parameters(), lr=0.1, ns_steps=5)):
        assert torch.equal(stepped(make, True), stepped(make, False))
    assert run_ranks(2, on_all_ranks) == [True, True]
