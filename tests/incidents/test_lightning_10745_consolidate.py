"""Lightning #10745: "Optimizer state has not been consolidated on this rank". A sharded optimizer's state dict needs a collective first,
which a host calls by the name `consolidate_state_dict`, if it finds that; #6387: it is then complete on one rank only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from muon_dist import MuonDist

from ..ranks import run_ranks


def saved(ours: bool) -> tuple[str, str]:
    """What every rank's state dict says before `consolidate_state_dict()` and after it, as Lightning's strategies call it."""
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False))
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)
        p.grad = torch.ones_like(p)
    optimizer: Any = MuonDist(model.named_parameters(), ns_steps=5)
    if not ours:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam)
    optimizer.step()
    told = []
    for _ in range(2):
        try:
            told.append(f"{len(optimizer.state_dict()['state'])} complete")
        except RuntimeError as error:
            told.append(str(error))
        optimizer.consolidate_state_dict()
    return told[0], told[1]


def test_there_one_rank_can_save() -> None:
    first, second = run_ranks(2, saved, False)
    assert "has not been consolidated" in first[0] and first[1] == "2 complete"
    assert "has not been consolidated" in second[1]


def test_here_every_rank_can() -> None:
    for before, after in run_ranks(2, saved, True):
        assert "Call optimizer.consolidate() on all ranks first" in before and after == "2 complete"
