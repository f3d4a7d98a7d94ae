"""accelerate #3855 (and #4142): under FSDP2 it puts sharded parameters into the groups and leaves the state with the old ones, so that an
optimizer which makes state in its constructor ends in a KeyError when a state dict is asked for: at a resume, before the first step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist import MuonDist

from ..ranks import run_ranks


def switched(ours: bool) -> str | float:
    """`fsdp2_switch_optimizer_parameters`; then a state dict, and steps beside those of an optimizer that was built after sharding."""
    ends = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))

        def make(model: nn.Module = model) -> Any:
            return MuonDist(model.named_parameters(), lr=0.1, ns_steps=5) if ours else torch.optim.Adagrad(model.parameters())

        optimizer = make()
        names = {id(p): name for name, p in model.named_parameters()}
        old = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        new = dict(model.named_parameters())
        for group, members in zip(optimizer.param_groups, old, strict=True):
            group["params"] = [new[name] for name in members]
        if late:
            optimizer = make()
        try:
            assert len(optimizer.state_dict()["state"]) == 4
        except KeyError as error:
            return f"KeyError {error}"
        for k in range(2):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + k)
            optimizer.step()
        ends.append(torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()]))
    return float((ends[0] - ends[1]).abs().max())


@pytest.mark.parametrize("ours", [False, True], ids=["Adagrad", "MuonDist"])
def test_parameters_that_are_switched_before_the_first_step(ours: bool) -> None:
    for told in run_ranks(2, switched, ours):
        assert told == 0.0 if ours else str(told).startswith("KeyError")
