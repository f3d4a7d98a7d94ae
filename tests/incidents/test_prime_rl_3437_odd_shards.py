"""prime-rl #3437: Muon under FSDP2 where rows don't divide by the ranks, or a matrix has one row: dion asserts, torch's Muon raises."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist import MuonDist

from ..ranks import run_ranks

SHAPES = [(1, 8), (7, 9), (3, 5), (2, 6)]


def updated(ours: bool) -> float | str:
    """The largest difference to the update of whole matrices, or the error."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in SHAPES))
    plain = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    sharded = list(model.parameters())
    for k, (p, whole) in enumerate(zip(sharded, plain, strict=True)):
        whole.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(k))
        p.grad = torch.distributed.tensor.distribute_tensor(whole.grad, p.device_mesh, p.placements)
    expected = torch.optim.Muon(plain, lr=0.1, adjust_lr_fn="match_rms_adamw")
    expected.step()
    named = [(f"layers.{k}.weight", p) for k, p in enumerate(sharded)]
    try:
        (MuonDist(named, lr=0.1, ns_steps=5, compute_dtype="bf16") if ours else torch.optim.Muon(sharded, lr=0.1)).step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return max(float((p.full_tensor() - whole).detach().abs().max()) for p, whole in zip(sharded, plain, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_odd_shards_are_updated_like_whole_matrices(world: int) -> None:
    assert all(isinstance(told, str) for told in run_ranks(world, updated, False))
    assert max(run_ranks(world, updated, True)) < 0.02  # torch's Muon is in bf16
