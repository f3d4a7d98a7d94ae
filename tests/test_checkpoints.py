"""State dicts that load at another world size, resume bit for bit at the same one, and never hang."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from muon_dist import MuonDist

from . import models
from .ranks import run_ranks


def make(placement: str, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, MuonDist]:
    model = models.place(models.make_bank(models.ODD, dtype), placement)
    return model, MuonDist(model.named_parameters(), lr=0.05, weight_decay=0.1, bucket_mb=0.008, ns_steps=5)


def train(model: torch.nn.Module, optimizer: MuonDist, placement: str, seeds: range) -> None:
    """Steps on data that doesn't depend on the world size."""
    for seed in seeds:
        model.zero_grad()
        model(seed).backward()
        if placement == "mixed":
            models.average_replicas(model)
        optimizer.step()


def save(placement: str, folder: str, after: int, total: int) -> dict[str, torch.Tensor]:
    """Trains, saves after some steps, trains on; the parameters at the end."""
    model, optimizer = make(placement)
    train(model, optimizer, placement, range(after))
    if placement in ("replicas", "mixed"):
        optimizer.consolidate()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    train(model, optimizer, placement, range(after, total))
    return models.whole_parameters(model)


def load(placement: str, folder: str, after: int, total: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    model, optimizer = make(placement)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    keys = sorted(f"{name}.{key}" for name, entry in state["optimizer"]["state"].items() for key in entry)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, placement, range(after, total))
    return models.whole_parameters(model), keys


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_saved_at_four_ranks_loads_at_any_number(tmp_path, world: int) -> None:
    uninterrupted = run_ranks(4, save, "fsdp2", str(tmp_path), 2, 4)[0]
    results = run_ranks(world, load, "fsdp2", str(tmp_path), 2, 4)
    for parameters, keys in results:
        assert keys == results[0][1] and "layers.0.weight.momentum_buffer" in keys and "layers.0.bias.exp_avg" in keys
        for name, expected in uninterrupted.items():
            if world == 4:
                assert torch.equal(parameters[name], expected), name
            else:
                torch.testing.assert_close(parameters[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), [("fsdp2", "replicas"), ("replicas", "fsdp2"), ("mixed", "fsdp2"), ("replicas", "replicas")])
def test_fsdp2_and_ddp_load_each_other(tmp_path, source: str, target: str) -> None:
    uninterrupted = run_ranks(2, save, source, str(tmp_path), 2, 4)[0]
    for parameters, _ in run_ranks(2, load, target, str(tmp_path), 2, 4):
        for name, expected in uninterrupted.items():
            if source == target:
                assert torch.equal(parameters[name], expected), name
            else:
                torch.testing.assert_close(parameters[name], expected, rtol=1e-9, atol=1e-9)


def torch_save_resume(placement: str) -> bool:
    """Plain torch.save of state_dict() on every rank: resumed and uninterrupted runs are the same bits."""
    model, optimizer = make(placement, torch.float32)
    train(model, optimizer, placement, range(2))
    if placement == "replicas":
        optimizer.consolidate()
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    train(model, optimizer, placement, range(2, 5))
    expected = models.whole_parameters(model)

    model, optimizer = make(placement, torch.float32)
    stream.seek(0)
    with torch.serialization.safe_globals([DTensor]):
        saved = torch.load(stream, weights_only=placement == "replicas")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, placement, range(2, 5))
    return all(torch.equal(a, b) for a, b in zip(expected.values(), models.whole_parameters(model).values(), strict=True))


@pytest.mark.parametrize(("placement", "world"), [("replicas", 1), ("replicas", 3), ("fsdp2", 3), ("hsdp", 4)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(placement: str, world: int) -> None:
    assert all(run_ranks(world, torch_save_resume, placement))


def lonely_state_dicts() -> dict:
    """state_dict() and torch's initialisation on rank 0 only: nobody else answers, so a collective would hang."""
    model, optimizer = make("replicas")
    result = {"changed": False, "error": "", "keys": []}
    before = models.whole_parameters(model)
    if dist.get_rank() == 0:
        fresh = optimizer.state_dict()
        result["keys"] = sorted({key for entry in fresh["state"].values() for key in entry})
        assert all(not value.any() for entry in fresh["state"].values() for value in entry.values())
        get_optimizer_state_dict(model, optimizer)
        result["changed"] = any((a != b).any() for a, b in zip(before.values(), models.whole_parameters(model).values(), strict=True))
    dist.barrier()
    train(model, optimizer, "replicas", range(1))
    if dist.get_rank() == 1:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            result["error"] = str(error)
    dist.barrier()
    optimizer.consolidate()
    everyone = [None] * dist.get_world_size()
    momentum = [models.whole(s["momentum_buffer"]) for s in optimizer.state_dict()["state"].values() if "momentum_buffer" in s]
    dist.all_gather_object(everyone, momentum)
    result["same"] = all(torch.equal(a, b) for other in everyone for a, b in zip(other, momentum, strict=True))
    held = sum(v["momentum_buffer"].numel() for v in optimizer.state.values() if "momentum_buffer" in v)
    train(model, optimizer, "replicas", range(1, 2))
    result["freed"] = sum(v["momentum_buffer"].numel() for v in optimizer.state.values() if "momentum_buffer" in v) < held
    return result


def test_state_dict_alone_never_communicates_and_says_consolidate() -> None:
    ranks = run_ranks(2, lonely_state_dicts, timeout=60)
    assert ranks[0]["keys"] == ["exp_avg", "exp_avg_sq", "momentum_buffer", "step"] and not ranks[0]["changed"]
    assert "consolidate()" in ranks[1]["error"]
    assert all(rank["same"] and rank["freed"] for rank in ranks)


def initialise_like_torch(placement: str) -> dict[str, bool]:
    """torch's own initialisation, and a step as it would take it: at lr 0 with zero gradients."""
    (model, optimizer), (twin, untouched) = make(placement), make(placement)
    torch.distributed.checkpoint.state_dict._init_optim_state(optimizer)
    state = optimizer.state_dict()["state"]
    result = {"dry": all(not v.any() for entry in state.values() for v in entry.values())}
    for m, o in ((model, optimizer), (twin, untouched)):
        train(m, o, placement, range(2))
    pairs = list(zip(models.whole_parameters(model).values(), models.whole_parameters(twin).values(), strict=True))
    result["same"] = all(torch.equal(a, b) for a, b in pairs)

    model, optimizer = make(placement)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = models.whole_parameters(model)
    optimizer.step()
    result["unchanged"] = all(torch.equal(a, b) for a, b in zip(before.values(), models.whole_parameters(model).values(), strict=True))
    result["no momentum"] = all(not s["momentum_buffer"].any() for s in optimizer.state.values() if "momentum_buffer" in s)
    return result


@pytest.mark.parametrize(("placement", "world"), [("replicas", 2), ("fsdp2", 3)])
def test_initialising_state_for_a_checkpoint_changes_nothing(placement: str, world: int) -> None:
    for rank in run_ranks(world, initialise_like_torch, placement):
        assert rank == dict.fromkeys(rank, True)


def flattened_and_full() -> bool:
    model, optimizer = make("fsdp2")
    train(model, optimizer, "fsdp2", range(2))
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert "state.layers.0.weight.momentum_buffer" in flat
    again, other = make("fsdp2")
    set_model_state_dict(again, get_model_state_dict(model))
    full = copy.deepcopy(full)  # load_state_dict keeps the tensors it is given, as everywhere in torch
    set_optimizer_state_dict(again, other, full, options=StateDictOptions(full_state_dict=True))
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, "fsdp2", range(2, 4))
    return all(
        torch.equal(a, b) for a, b in zip(models.whole_parameters(model).values(), models.whole_parameters(again).values(), strict=True)
    )


def test_full_and_flattened_state_dicts_of_torch_work() -> None:
    assert all(run_ranks(2, flattened_and_full))


def added_group_moves_owners() -> float:
    """add_param_group in mid-training changes the plan: momentum follows its parameters to their new owners."""
    from .reference import ReferenceMuon

    shapes = [(8, 8), (16, 8), (64, 8)]
    torch.manual_seed(1)
    tensors = {f"w{k}": torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for k, shape in enumerate(shapes)}
    optimizer = MuonDist([{"params": [(n, tensors[n]) for n in ("w0", "w1")], "algorithm": "muon"}], lr=1.0, weight_decay=0.0, ns_steps=5)
    reference = ReferenceMuon(
        {n: p.detach() for n, p in tensors.items()}, {n: [p.shape[0]] for n, p in tensors.items()}, lr=1.0, weight_decay=0.0
    )
    owners = []
    for k in range(4):
        if k == 2:
            optimizer.add_param_group({"params": [("w2", tensors["w2"])], "algorithm": "muon"})
        for p in tensors.values():
            p.grad = torch.randn(p.shape, dtype=torch.float64)
        reference.step({n: p.grad if k >= 2 or n != "w2" else None for n, p in tensors.items()})
        optimizer.step()
        owners.append(
            {t.name: o for t, o in zip(optimizer.engine.domains[0].plan.matrices, optimizer.engine.domains[0].plan.owners, strict=True)}
        )
    assert any(owners[1][n] != owners[2][n] for n in ("w0", "w1")), "the test needs an owner that changes"
    return max(float((tensors[n] - reference.parameters[n]).norm()) for n in tensors)


def test_momentum_follows_its_parameter_to_a_new_owner() -> None:
    assert max(run_ranks(2, added_group_moves_owners)) <= 1e-10


def test_torch_muon_state_dicts_load() -> None:
    torch.manual_seed(0)
    start = torch.randn(12, 20)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = torch.optim.Muon([theirs], lr=0.3, weight_decay=0.0, adjust_lr_fn="original", momentum=0.9)
    for _ in range(3):
        theirs.grad = torch.randn(12, 20)
        muon.step()
    ours.data.copy_(theirs.data)
    optimizer = MuonDist([{"params": [ours], "algorithm": "muon"}], compute_dtype="bf16", ns_steps=5)
    optimizer.load_state_dict(copy.deepcopy(muon.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["adjust_lr_fn"], group["polynomial"]) == (0.3, 0.9, "original", "jordan")
    assert torch.equal(optimizer.state[ours]["momentum_buffer"], muon.state[theirs]["momentum_buffer"])
    before = ours.detach().clone()
    theirs.grad = torch.randn(12, 20)
    ours.grad = theirs.grad.clone()
    muon.step()
    optimizer.step()
    torch.testing.assert_close(ours - before, theirs - before, rtol=0.05, atol=0.005)


def test_a_state_dict_of_other_groups_raises() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 4))
    saved = MuonDist([("w", p)], ns_steps=5).state_dict()
    with pytest.raises(ValueError, match="2 parameter groups, this optimizer 1"):
        MuonDist([("w", p)], ns_steps=5).load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
    with pytest.raises(ValueError, match="'adamw'"):
        MuonDist([("w", p)], ns_steps=5).load_state_dict(MuonDist([{"params": [("w", p)], "algorithm": "adamw"}], ns_steps=5).state_dict())
