"""Ranks that differ in state, lag behind, or don't come: named within a time limit, before anything diverges."""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from muon_dist import MuonDist, ShardLayout, build_param_groups, comparison, rendezvous

from . import models
from .ranks import run_ranks
from .reference import ReferenceMuon

ADAPTIVE = {"lr": 0.01, "burn_in": 1, "measure_every": 2}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def gradients(model: nn.Module, k: int) -> None:
    for i, p in enumerate(model.parameters()):
        whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * k + i))
        p.grad = whole if not hasattr(p, "device_mesh") else torch.distributed.tensor.distribute_tensor(whole, p.device_mesh, p.placements)


def spread(model: nn.Module) -> float:
    """The largest difference of weights between ranks."""
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return max(float((t - mine).abs().max()) for t in all_of_them)


def loaded_unlike(kind: str, compared: bool = True) -> dict[str, Any]:
    """Ranks that load unlike checkpoints, or none on one of them; without the comparison they go on."""
    if not compared:
        comparison.compare_state = lambda *_: None
    model = network()
    sharded = kind.startswith("fsdp2")
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    options = ADAPTIVE if kind.endswith("adaptive") else {"lr": 0.01, "ns_steps": 5}
    first, saved = MuonDist(model.named_parameters(), **options), []
    for k in range(5):
        gradients(model, k)
        first.step()
        first.consolidate()
        saved.append(copy.deepcopy(first.state_dict()))
    second, rank = MuonDist(model.named_parameters(), **options), dist.get_rank()
    if kind.startswith("only one") and rank == 0:
        second.load_state_dict(saved[1])
    elif sharded:
        second.load_state_dict(saved[4 if rank else 2])
    elif kind == "other values":
        state = copy.deepcopy(saved[1])
        if rank:
            for entry in state["state"].values():
                if "momentum_buffer" in entry:
                    entry["momentum_buffer"] *= 1.01
        second.load_state_dict(state)
    error = ""
    try:
        for k in range(6):
            gradients(model, 50 + k)
            second.step()
    except ValueError as raised:
        error = str(raised)
    return {"error": error, "spread": 0.0 if sharded or error else spread(model)}


def test_ranks_that_load_unlike_state_drift_apart() -> None:
    """The fault, where nothing compares."""
    assert min(rank["spread"] for rank in run_ranks(2, loaded_unlike, "only one", False)) > 1e-4


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("only one", "rank 0 has some for 0.bias, rank 1 has none"),
        ("only one, adaptive", "rank 0 has some for 0.bias, rank 1 has none"),
        ("fsdp2", "0.bias is at step 3 on rank 0 and at step 5 on rank 1"),
        ("fsdp2, adaptive", "0.bias is at step 3 on rank 0 and at step 5 on rank 1"),
        ("other values", "0.weight has other values of optimizer state on rank 1 than on rank 0"),
    ],
)
def test_state_that_differs_between_ranks_is_named(kind: str, words: str) -> None:
    for rank in run_ranks(2, loaded_unlike, kind):
        assert words in rank["error"] and "Load the same checkpoint on all of them, or on none" in rank["error"]


def frozen_on_one() -> str:
    model = network()
    model[2].weight.requires_grad_(dist.get_rank() == 0)
    try:
        MuonDist(model.named_parameters(), ns_steps=5).bind()
    except ValueError as error:
        return str(error)
    return ""


def test_a_parameter_that_is_frozen_on_one_rank_only_is_named() -> None:
    for told in run_ranks(2, frozen_on_one):
        assert "only rank 0 trains 2.weight. Freeze it on all ranks, or on none" in told


def alone_first() -> float:
    """A step before there are process groups, on equal models, and more after it."""
    model = network()
    optimizer = MuonDist(model.named_parameters(), lr=0.01, ns_steps=5)
    there, dist.is_initialized = dist.is_initialized, lambda: False
    gradients(model, 0)
    optimizer.step()
    dist.is_initialized = there
    assert [len(ranks) for ranks, _ in optimizer.plans] == [1]
    for k in range(1, 4):
        gradients(model, k)
        optimizer.step()
    assert [len(ranks) for ranks, _ in optimizer.plans] == [2]
    other = network()
    expected = MuonDist(other.named_parameters(), lr=0.01, ns_steps=5)
    for k in range(4):
        gradients(other, k)
        expected.step()
    return spread(model) + max(float((a - b).abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_ranks_that_step_together_are_those_of_the_step() -> None:
    assert max(run_ranks(2, alone_first)) < 1e-6


# ------------------------------------------------------------------------------------------------------- late and missing


def leaves_one_out() -> str:
    model = network()
    optimizer = MuonDist(model.named_parameters(), lr=0.01, ns_steps=5)
    try:
        for k in range(6):
            optimizer.zero_grad()
            gradients(model, k)
            if k != 3 or dist.get_rank() != 1:
                optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_leaves_out_a_step_is_found_at_the_next() -> None:
    for told in run_ranks(2, leaves_one_out):
        assert "zero_grad() was called rank 0 3 times, rank 1 4 times" in told or "rank 0 4 times, rank 1 5 times" in told


def never_comes(where: str) -> tuple[str, float]:
    rendezvous.TIMEOUT, rendezvous.PATIENCE = timedelta(seconds=2), 1.0
    group = dist.new_group(timeout=timedelta(seconds=3))
    rank = dist.get_rank()
    model = network()
    layouts = {}
    if where == "layouts":
        model = nn.Linear(6, 2, bias=False)
        layouts = {"weight": ShardLayout(global_shape=(2 * dist.get_world_size(), 6), blocks=(((2 * rank, 2 * rank + 2), (0, 6)),))}
    optimizer = MuonDist(model.named_parameters(), lr=0.01, ns_steps=5, layouts=layouts, process_group=group)
    if where == "step":
        gradients(model, 0)
        optimizer.step()
    began = time.monotonic()
    try:
        if rank != 1:
            gradients(model, 1)
            optimizer.step()
        else:
            time.sleep(6)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("layouts", "rank 1 did not come to bind the optimizer within 2 s; the ranks [0, 1, 2] were expected"),
        ("step", "rank 1 did not come to step 2 in time; the ranks [0, 1, 2] were expected"),
    ],
)
def test_the_message_names_who_is_missing_and_from_what(where: str, words: str) -> None:
    told = run_ranks(3, never_comes, where, fresh=True)
    for rank in (0, 2):
        assert words in told[rank][0] and told[rank][1] < 8


def overflow_in_one_stage() -> dict[str, Any]:
    """Two pipeline stages of FSDP2 over two ranks each; a GradScaler sees an overflow in the first only."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    torch.manual_seed(stage)
    plain = nn.Sequential(nn.Linear(6, 6))
    model = fully_shard(copy.deepcopy(plain), mesh=mesh["dp"])
    optimizer = MuonDist(model.named_parameters(), lr=0.1, ns_steps=5)
    expected = MuonDist(
        plain.named_parameters(), lr=0.1, ns_steps=5, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    moved = []
    for k in range(4):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 6)).sum()).backward()
        if k == 2 and stage == 0:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        before = model[0].weight.full_tensor().detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved.append(float((model[0].weight.full_tensor() - before).detach().abs().max()))
        if k != 2:
            plain.zero_grad()
            plain(torch.ones(3, 6)).sum().backward()
            expected.step()
    error = float((model[0].weight.full_tensor() - plain[0].weight).detach().abs().max())
    return {"moved": moved, "skipped": optimizer.skipped_steps, "error": error, "scale": scaler.get_scale()}


def test_a_loss_scaler_that_overflows_in_one_pipeline_stage_skips_the_step_in_all() -> None:
    for rank in run_ranks(4, overflow_in_one_stage):
        assert rank["moved"][2] == 0.0 and min(rank["moved"][k] for k in (0, 1, 3)) > 0.005
        assert rank["skipped"] == 1 and rank["error"] < 2e-5


# ------------------------------------------------------------------------------------------------------ sequence parallel


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return h + self.mlp(self.norm(h))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def sequence_parallel() -> float:
    """PyTorch's tutorial plan, in which gradients of norms are sums that nobody has added up yet."""
    torch.manual_seed(0)
    plain = Block().double()
    model = copy.deepcopy(plain)
    plan = {
        "inp": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    }
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(model, mesh, plan)
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))})
    optimizer = MuonDist(build_param_groups(model), lr=0.1, ns_steps=5)
    whole = models.whole_parameters(plain)
    reference = ReferenceMuon(whole, {name: [p.shape[0]] for name, p in whole.items() if name in ("up.weight", "down.weight")}, lr=0.1)
    for k in range(2):
        tokens = torch.randint(12, (2, 4), generator=torch.Generator().manual_seed(k))
        model.zero_grad()
        model(tokens).square().sum().backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p.copy_(reference.parameters[name])
        plain.zero_grad()
        plain(tokens).square().sum().backward()
        assert any(p.grad.placements[0].is_partial() for p in model.parameters() if hasattr(p.grad, "placements"))  # what was refused
        optimizer.step()
        reference.step(models.whole_gradients(plain))
    after = models.whole_parameters(model)
    return max(float((after[name] - p).abs().max()) for name, p in reference.parameters.items())


def test_sequence_parallel_norms_are_trained() -> None:
    assert max(run_ranks(2, sequence_parallel)) < 1e-10
