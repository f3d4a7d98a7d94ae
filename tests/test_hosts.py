"""What torch itself offers around an optimizer, in real process groups: supported or refused, nothing in between."""

import pickle
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from muon_dist import MuonDist, build_param_groups

from . import models
from .ranks import run_ranks


def grad_scaler(placement: str) -> dict:
    model = models.place(models.make_bank(models.ODD, torch.float32), placement)
    optimizer = MuonDist(model.named_parameters(), lr=0.1, ns_steps=5)
    plain = models.place(models.make_bank(models.ODD, torch.float32), placement)
    unscaled = MuonDist(plain.named_parameters(), lr=0.1, ns_steps=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(model(seed)).backward()
        if seed == 1 and dist.get_rank() == 0:
            models.local(next(model.parameters()).grad).view(-1)[0] = float("inf")
        if seed == 1 and placement == "replicas":  # replicas see the same overflow
            next(model.parameters()).grad.view(-1)[0] = float("inf")
        before = models.whole_parameters(model)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        same = all(torch.equal(a, b) for a, b in zip(before.values(), models.whole_parameters(model).values(), strict=True))
        assert same == (seed == 1)
        if seed != 1:
            plain.zero_grad()
            plain(seed).backward()
            unscaled.step()
    ends = zip(models.whole_parameters(model).values(), models.whole_parameters(plain).values(), strict=True)
    return {"scales": scales, "error": max(float((a - b).abs().max()) for a, b in ends)}


@pytest.mark.parametrize(("placement", "world"), [("replicas", 2), ("fsdp2", 3)])
def test_grad_scaler_unscales_before_momentum_and_skips_on_all_ranks(placement: str, world: int) -> None:
    for rank in run_ranks(world, grad_scaler, placement):
        assert rank["scales"] == [1024.0, 512.0, 512.0] and rank["error"] < 1e-4


def fsdp1(use_orig_params: bool, through: str) -> str:
    model = FullyShardedDataParallel(
        models.make_bank([(8, 8), (4, 8)], torch.float32), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        if through == "build_param_groups":
            build_param_groups(model)
        else:
            MuonDist(model.named_parameters(), ns_steps=5)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("through", ["build_param_groups", "named_parameters"])
def test_fsdp1_is_refused(use_orig_params: bool, through: str) -> None:
    assert all("fully_shard" in error for error in run_ranks(2, fsdp1, use_orig_params, through))


def cpu_offload() -> float:
    plain = fully_shard(models.make_bank(models.ODD, torch.float64), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model = models.make_bank(models.ODD, torch.float64)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizers = [MuonDist(m.named_parameters(), lr=0.1, ns_steps=5) for m in (plain, model)]
    for seed in range(2):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            m.zero_grad()
            m(seed).backward()
            optimizer.step()
    assert all(v.device.type == "cpu" for s in optimizers[1].state.values() for v in s.values())
    ends = zip(models.whole_parameters(plain).values(), models.whole_parameters(model).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in ends)


def test_fsdp2_with_cpu_offload_gives_the_same_update() -> None:
    assert run_ranks(2, cpu_offload) == [0.0, 0.0]


def refused_placements(kind: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    if kind == "partial":
        p = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    elif kind == "strided":
        p = DTensor.from_local(
            torch.ones(2, 4), mesh, [_StridedShard(0, split_factor=3)], run_check=False, shape=torch.Size((4, 4)), stride=(4, 1)
        )
    elif kind == "gradient":
        p = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False)
    p = nn.Parameter(p)
    if kind == "gradient":
        p.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(1)], run_check=False)
    try:
        optimizer = MuonDist([("block.weight", p)], ns_steps=5)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "words"), [("partial", "partial placement"), ("strided", "can't be resolved"), ("gradient", "Redistribute the gradient")]
)
def test_placements_that_cannot_be_supported_raise_and_name_the_parameter(kind: str, words: str) -> None:
    for error in run_ranks(2, refused_placements, kind):
        assert words in error and "block.weight" in error


def disagreement(kind: str) -> tuple[str, float]:
    rank = dist.get_rank()
    shapes = [(8, 8), (4, 6), (8, 8), (8, 8)]
    model = models.make_bank(shapes, torch.float32)
    options = {}
    if kind == "replicas" and rank == 1:
        with torch.no_grad():
            model.layers[1].weight[2, 3] += 1e-3
    if kind == "swapped" and rank == 1:  # the same numbers in another order
        with torch.no_grad():
            model.layers[0].weight.copy_(model.layers[0].weight[[1, 0, 2, 3, 4, 5, 6, 7]])
    if kind == "steps":
        options["ns_steps"] = 5 if rank == 0 else 4
    if kind == "coverage":
        options.update(ns_steps="adaptive", coverage=0.9 if rank == 0 else 0.8)
    if kind == "momentum":
        options["momentum"] = 0.95 if rank == 0 else 0.9
    if kind == "bucket":
        options["bucket_mb"] = 64 if rank == 0 else 0.0001
    parameters = list(model.named_parameters())
    if kind == "parameters" and rank == 1:
        parameters = parameters[:-2]
    if kind == "algorithm":
        parameters = [{"params": parameters[:1], "algorithm": "muon" if rank == 0 else "adamw"}, {"params": parameters[1:]}]
    if kind == "order" and rank == 1:
        parameters = parameters[::-1]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    started = time.monotonic()
    try:
        MuonDist(parameters, **{"ns_steps": 5, **options}).step()
    except ValueError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("replicas", "layers.1.weight has other values"),
        ("swapped", "layers.0.weight has other values"),
        ("steps", "don't agree"),
        ("coverage", "0.8"),
        ("momentum", "0.9"),
        ("bucket", "don't agree"),
        ("parameters", "rank 1 has"),
        ("algorithm", "adamw"),
    ],
)
def test_ranks_that_disagree_raise_within_seconds_on_all_of_them(kind: str, words: str) -> None:
    for error, seconds in run_ranks(2, disagreement, kind, timeout=60):
        assert words in error and seconds < 10


def test_the_order_of_parameters_may_differ_between_ranks() -> None:
    assert [error for error, _ in run_ranks(2, disagreement, "order")] == ["", ""]


def absent_rank() -> None:
    import muon_dist.rendezvous

    muon_dist.rendezvous.TIMEOUT, muon_dist.rendezvous.PATIENCE = timedelta(seconds=2), 1.0
    if dist.get_rank() == 0:
        MuonDist(models.make_bank([(8, 8)], torch.float32).named_parameters(), ns_steps=5).bind()
    time.sleep(60)


def test_a_rank_that_does_not_come_is_reported_instead_of_waited_for() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 did not come to bind the optimizer within 2 s"):
        run_ranks(2, absent_rank, timeout=60)
    assert time.monotonic() - started < 30


def sub_groups() -> list[float]:
    """Two independent pairs of replicas in one job: each optimizer keeps to its process_group."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    model = models.Bank([(6, 5), (4, 9)], torch.float64)
    optimizer = MuonDist(model.named_parameters(), lr=0.1, process_group=pairs[rank // 2], ns_steps=5)
    model(rank // 2).backward()
    optimizer.step()
    return [float(p.detach().sum()) for p in model.parameters()]


def test_replicas_over_a_process_group_keep_to_it() -> None:
    ranks = run_ranks(4, sub_groups)
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3] and ranks[0] != ranks[2]


def two_meshes() -> tuple[int, float]:
    """Experts sharded over half the ranks beside dense parameters over all: several domains, one verdict on a bad gradient."""
    rank = dist.get_rank()
    world = init_device_mesh("cpu", (4,))
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("experts", "shard"))["shard"]
    dense = nn.Parameter(DTensor.from_local(torch.ones(2, 6, dtype=torch.float64), world, [Shard(0)], run_check=False))
    expert = nn.Parameter(DTensor.from_local(torch.full((2, 5), 1.0 + rank // 2, dtype=torch.float64), halves, [Shard(0)], run_check=False))
    optimizer = MuonDist([("dense", dense), ("expert", expert)], lr=1.0, ns_steps=5)
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for p in (dense, expert):
            local = torch.randn(p.to_local().shape, generator=generator, dtype=torch.float64)
            p.grad = DTensor.from_local(local, p.device_mesh, p.placements, run_check=False)
        if step == 1 and rank == 3:
            expert.grad.to_local()[0, 0] = float("nan")  # only ranks 2 and 3 share this expert
        before = dense.to_local().clone()
        optimizer.step()
    assert torch.equal(before, dense.to_local())
    assert len(optimizer.engine.domains) == 2
    return optimizer.skipped_steps, float(dense.to_local().sum())


def test_a_bad_gradient_in_one_domain_skips_the_step_in_all() -> None:
    assert [skipped for skipped, _ in run_ranks(4, two_meshes)] == [1] * 4


def beyond_process_group() -> str:
    mesh = init_device_mesh("cpu", (2,))
    alone = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 6), mesh, [Shard(0)], run_check=False))
    try:
        MuonDist([("dense", p)], process_group=alone, ns_steps=5).bind()
    except ValueError as error:
        return str(error)
    return ""


def test_parameters_beyond_the_process_group_are_refused() -> None:
    assert all("dense" in error and "beyond process_group" in error for error in run_ranks(2, beyond_process_group))


def copied_away() -> list[str]:
    """Momentum that lives elsewhere, a process group and layouts don't survive a copy: using the copy says so."""
    errors = []
    model = models.make_bank([(6, 5), (5, 6)], torch.float32)
    optimizer = MuonDist(model.named_parameters(), ns_steps=5)
    model(0).backward()
    optimizer.step()
    state = pickle.dumps(optimizer)
    everyone = [None, None]
    dist.all_gather_object(everyone, state)
    for pickled in (everyone[0], pickle.dumps(MuonDist(model.named_parameters(), process_group=dist.group.WORLD, ns_steps=5))):
        copy = pickle.loads(pickled)
        try:
            copy.bind()  # both ranks took rank 0's half of the momentum
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_a_copy_that_lacks_state_or_its_group_says_so() -> None:
    for errors in run_ranks(2, copied_away):
        assert "lives with no rank" in errors[0] and "process_group or layouts" in errors[1]


def replicas_in_unlike_memory() -> bool:
    """Consolidated momentum is the same values on ranks that store the parameter in unlike memory layouts."""
    value = torch.arange(24.0).view(4, 6).sin()
    p = nn.Parameter(value.clone() if dist.get_rank() == 0 else value.T.contiguous().T)
    q = nn.Parameter(value.clone() if dist.get_rank() == 1 else value.T.contiguous().T)
    optimizer = MuonDist([("p", p), ("q", q)], lr=0.1, ns_steps=5)
    for x in (p, q):
        x.grad = torch.arange(24.0).view(4, 6).cos()
    optimizer.step()
    optimizer.consolidate()
    return all(torch.allclose(optimizer.state[x]["momentum_buffer"], 0.05 * torch.arange(24.0).view(4, 6).cos()) for x in (p, q))


def test_consolidated_momentum_does_not_depend_on_memory_layout() -> None:
    assert all(run_ranks(2, replicas_in_unlike_memory))


def frozen_replicas_save() -> int:
    model = models.make_bank([(6, 5), (5, 6)], torch.float32)
    optimizer = MuonDist(model.named_parameters(), lr=0.1, ns_steps=5)
    model(0).backward()
    optimizer.step()
    model.layers[0].weight.requires_grad_(False)
    model.layers[0].weight.grad = None
    frozen = model.layers[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(frozen, model.layers[0].weight)
    optimizer.consolidate()
    return sum(1 for entry in optimizer.state_dict()["state"].values() if entry.get("momentum_buffer", torch.zeros(1)).any())


def test_parameters_frozen_in_mid_training_can_still_be_saved() -> None:
    assert run_ranks(2, frozen_replicas_save) == [2, 2]


def replicated_dtensors() -> bool:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.arange(12.0).view(3, 4).sin(), mesh, [Replicate()]))
    q = nn.Parameter(p.to_local().detach().clone())
    for x in (p, q):
        g = torch.arange(12.0).view(3, 4).cos()
        x.grad = DTensor.from_local(g, mesh, [Replicate()]) if x is p else g
        MuonDist([("w", x)], lr=1.0, ns_steps=5).step()
    return torch.equal(p.to_local(), q)


def test_replicated_dtensors_are_replicas() -> None:
    assert run_ranks(2, replicated_dtensors) == [True, True]
