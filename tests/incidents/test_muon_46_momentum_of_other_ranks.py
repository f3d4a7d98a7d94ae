"""KellerJordan/Muon #46 (open): each rank keeps the momentum of its own parameters and all-gathers weights, so a checkpoint of rank 0's
state dict has the right momentum of rank 0's parameters only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_dist import MuonDist

from ..ranks import run_ranks
from ..reference import JORDAN, orthogonalize


class RoundRobin(torch.optim.Optimizer):
    """Muon as in that repository: parameter k is rank k % world's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for k, p in enumerate(group["params"]):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                owner = k % dist.get_world_size()
                if owner == dist.get_rank():
                    buffer.lerp_(p.grad, 0.05)
                    p -= group["lr"] * orthogonalize(p.grad.lerp(buffer, 0.95), [JORDAN] * 5)
                dist.broadcast(p, owner)


def resumed(ours: bool) -> tuple[float, str]:
    """How far a run resumed from rank 0's state dict ends from the uninterrupted one, and what ours says to rank 0 alone."""

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False))
        return model, MuonDist(model.named_parameters(), lr=0.1, ns_steps=5) if ours else RoundRobin(model.parameters(), 0.1)

    def train(model: nn.Module, optimizer: Any, steps: range) -> Tensor:
        for k in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i))
            optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    model, optimizer = build()
    train(model, optimizer, range(3))
    said = ""
    if ours:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            said = str(error)
        optimizer.consolidate()
    told = [(copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))]
    dist.broadcast_object_list(told, src=0)
    end = train(model, optimizer, range(3, 6))
    model, optimizer = build()
    model.load_state_dict(told[0][0])
    optimizer.load_state_dict(told[0][1])
    return float((train(model, optimizer, range(3, 6)) - end).abs().max()), said


def test_the_momentum_of_other_ranks_is_lost_there() -> None:
    assert max(far for far, _ in run_ranks(2, resumed, False)) > 0.01


def test_it_is_complete_here_or_refused() -> None:
    for far, said in run_ranks(2, resumed, True):
        assert far == 0.0 and "consolidate()" in said
