"""pytorch #1489 (open): optimizer state is loaded by the order of parameters, whatever they are called: a list in another order gives every
parameter another one's momentum.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from muon_dist import MuonDist


@pytest.mark.parametrize("ours", [False, True], ids=["torch.optim.Muon", "MuonDist"])
def test_state_follows_names(ours: bool) -> None:
    named = {name: nn.Parameter(torch.randn(6, 6)) for name in ("a.weight", "b.weight")}

    def make(order: list[str]) -> Any:
        members = [(name, named[name]) for name in order]
        return MuonDist(members, ns_steps=5) if ours else torch.optim.Muon(members)

    optimizer, other = make(list(named)), make(list(named)[::-1])
    for k, p in enumerate(named.values()):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(k))
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    kept = [torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]) for p in named.values()]
    assert kept == ([True, True] if ours else [False, False])
