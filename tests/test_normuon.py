"""NorMuon, the rule that has state of whole matrices: its update and its state are those of the reference, wherever the pieces lie."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dist import MuonDist

from . import models
from .ranks import run_ranks
from .recording import Collectives
from .reference_normuon import BETA2, ReferenceNorMuon
from .test_parity import BOUNDS, PLACEMENTS, worst_update

OPTIONS: dict[str, Any] = {"rule": "normuon", "rule_options": {"beta2": BETA2}, "ns_steps": 5}


def against_reference(placement: str, shapes: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[float, float]:
    """The largest error of an update, and of what is kept of a matrix."""
    model = models.place(models.make_bank(models.SHAPES[shapes], dtype), placement)
    parameters = models.whole_parameters(model)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, **OPTIONS, **options)
    reference = ReferenceNorMuon(parameters, models.muon_names(parameters), lr=1.0, weight_decay=0.0)
    worst = worst_update(model, optimizer, reference, placement)
    optimizer.consolidate()
    optimizer.state_dict()  # brings in what is on its way
    kept = {name.removeprefix("module."): optimizer.state[p]["second_momentum"] for name, p in model.named_parameters() if p.ndim == 2}
    assert set(kept) == set(reference.second)
    return worst, max(float((kept[name] - second[0]).abs().max() / second[0].max()) for name, second in reference.second.items())


@pytest.mark.parametrize(("placement", "world", "shapes"), PLACEMENTS, ids=lambda v: str(v))
def test_updates_and_state_equal_the_reference(placement: str, world: int, shapes: str) -> None:
    for update, state in run_ranks(world, against_reference, placement, shapes, torch.float64, {"bucket_mb": 0.008}):
        assert max(update, state) <= BOUNDS[torch.float64]


@pytest.mark.parametrize(("placement", "world"), [("replicas", 1), ("fsdp2", 3)])
def test_in_fp32(placement: str, world: int) -> None:
    for update, state in run_ranks(world, against_reference, placement, "odd", torch.float32, {}):
        assert max(update, state) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("placement", "world", "shapes"), [("fsdp2", 2, "odd"), ("fsdp2", 3, "odd"), ("fsdp2_dim1", 2, "even"), ("tp", 2, "even")]
)
def test_slices(placement: str, world: int, shapes: str) -> None:
    for update, state in run_ranks(world, against_reference, placement, shapes, torch.float64, {"placement": "gram"}):
        assert max(update, state) <= BOUNDS[torch.float64]


def views(placement: str) -> dict[str, Tensor]:
    """The second updates, and what is kept, of parameters that are read as several matrices or transposed."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (36, 12), "experts": (3, 10, 6), "conv": (8, 2, 3, 3), "stored_in_out": (12, 20)}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(value: Tensor) -> Tensor:  # replicas have owners, so only what is sharded can be sliced
        return distribute_tensor(value, mesh, [Shard(0)]) if placement == "gram" else value

    parameters = {k: nn.Parameter(placed(torch.zeros(shape, dtype=torch.float64))) for k, shape in shapes.items()}
    more: dict[str, dict[str, Any]] = {"qkv": {"split": (12, 12, 12)}, "conv": {"kind": "conv"}, "stored_in_out": {"transpose": True}}
    groups = [{"params": [(k, p)], "algorithm": "muon", **more.get(k, {})} for k, p in parameters.items()]
    optimizer = MuonDist(groups, lr=1.0, weight_decay=0.0, placement=placement, **OPTIONS)
    before: dict[str, Tensor] = {}
    for _ in range(2):
        before = {k: models.whole(p) for k, p in parameters.items()}
        for p in parameters.values():
            p.grad = placed(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        optimizer.step()
    optimizer.consolidate()
    optimizer.state_dict()
    kept = {f"{k}: kept": optimizer.state[p]["second_momentum"].clone() for k, p in parameters.items()}
    return {**{k: models.whole(p) - before[k] for k, p in parameters.items()}, **kept}


def test_parameters_of_several_matrices_and_transposed_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (36, 12), "experts": (3, 10, 6), "conv": (8, 2, 3, 3), "stored_in_out": (20, 12)}
    pieces = {"qkv": [12, 12, 12], "experts": [10], "conv": [8], "stored_in_out": [20]}
    zeros = {k: torch.zeros(shape, dtype=torch.float64) for k, shape in shapes.items()}
    reference = ReferenceNorMuon(zeros, pieces, lr=1.0, weight_decay=0.0)
    for _ in range(2):
        before = {k: p.clone() for k, p in reference.parameters.items()}
        gradients: dict[str, Tensor | None] = {}
        for k, shape in shapes.items():
            stored = shape[::-1] if k == "stored_in_out" else shape
            drawn = torch.randn(stored, generator=generator, dtype=torch.float64)
            gradients[k] = drawn.T if k == "stored_in_out" else drawn
        reference.step(gradients)
    expected = {k: p - before[k] for k, p in reference.parameters.items()}
    expected["stored_in_out"] = expected["stored_in_out"].T
    expected.update({f"{k}: kept": torch.cat(second) for k, second in reference.second.items()})
    for world, placement in ((1, "owner"), (2, "owner"), (2, "gram"), (3, "gram")):
        for found in run_ranks(world, views, placement):
            assert found.keys() == expected.keys()
            for k, value in expected.items():
                assert (found[k] - value).norm() <= 1e-10 * value.norm(), (world, placement, k)


# ------------------------------------------------------------------------------------------------------------- checkpoints


def saved(folder: str) -> dict[str, Tensor]:
    model, optimizer = started()
    trained(model, optimizer, range(3))
    dcp.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    trained(model, optimizer, range(3, 5))
    return models.whole_parameters(model)


def resumed(folder: str) -> dict[str, Tensor]:
    model, optimizer = started()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    trained(model, optimizer, range(3, 5))
    return models.whole_parameters(model)


def started() -> tuple[nn.Module, MuonDist]:
    model = models.place(models.make_bank(models.ODD, torch.float64), "fsdp2")
    return model, MuonDist(model.named_parameters(), lr=0.05, **OPTIONS)


def trained(model: nn.Module, optimizer: MuonDist, seeds: range) -> None:
    for seed in seeds:
        model.zero_grad()
        model(seed).backward()
        optimizer.step()


def test_a_run_goes_on_at_another_world_size(tmp_path: Any) -> None:
    expected = run_ranks(2, saved, str(tmp_path))[0]
    for world in (1, 2, 3):
        for found in run_ranks(world, resumed, str(tmp_path)):
            assert all((found[k] - value).norm() <= 1e-10 * value.norm() for k, value in expected.items()), world


def test_state_of_another_rule_is_refused() -> None:
    def optimizer(**options: Any) -> MuonDist:
        return MuonDist([("w", nn.Parameter(torch.zeros(4, 4)))], ns_steps=5, **options)

    with pytest.raises(ValueError, match="group 0 was saved with rule='muon', but this optimizer's is 'normuon'"):
        optimizer(rule="normuon").load_state_dict(optimizer().state_dict())
    with pytest.raises(ValueError, match="group 0 was saved with rule='normuon', but this optimizer's is 'muon'"):
        optimizer().load_state_dict(optimizer(rule="normuon").state_dict())


def half_precision() -> tuple[torch.dtype, bool]:
    p = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer, again = (MuonDist([("w", p)], **OPTIONS) for _ in range(2))
    p.grad = torch.randn(4, 6).bfloat16()
    optimizer.step()
    state = optimizer.state_dict()
    again.load_state_dict(state)
    kept = again.state[p]["second_momentum"]
    return kept.dtype, torch.equal(kept, state["state"][0]["second_momentum"])


def test_what_is_kept_stays_in_fp32_beside_weights_of_half_precision() -> None:
    assert half_precision() == (torch.float32, True)


# ------------------------------------------------------------------------------------------------------------ what happens


def skipped() -> tuple[bool, bool, int]:
    p = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = MuonDist([("w", p)], **OPTIONS)
    kept = []
    for k in range(3):
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        if k == 1:
            p.grad[0, 0] = float("nan")
        optimizer.step()
        optimizer.consolidate()
        optimizer.state_dict()
        kept.append(optimizer.state[p]["second_momentum"].clone())
    return torch.equal(kept[0], kept[1]), torch.equal(kept[1], kept[2]), optimizer.skipped_steps


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_does_not_happen_leaves_the_state(world: int) -> None:
    assert run_ranks(world, skipped) == [(True, False, 1)] * world


def counted(rule: str) -> Counter[str]:
    model = models.place(models.make_bank(models.ODD, torch.float32), "fsdp2")
    optimizer = MuonDist(model.named_parameters(), rule=rule, ns_steps=5)
    for seed in range(2):
        models.backward(model, seed, "fsdp2")
        with Collectives() as seen:
            optimizer.step()
    return Counter(seen.names)


def test_it_costs_one_all_reduce_more() -> None:
    (muon, _), (normuon, _) = (run_ranks(2, counted, rule) for rule in ("muon", "normuon"))
    assert normuon - muon == Counter({"allreduce_": 1}) and not muon - normuon


def reset() -> tuple[float, float]:
    """What is kept after a user has thrown the state away, over what one step leaves of zeros."""
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = MuonDist([("w", p)], lr=0.1, **OPTIONS)
    for k in range(3):
        p.grad = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    optimizer.consolidate()
    optimizer.state_dict()
    fresh_parameter = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    fresh = MuonDist([("w", fresh_parameter)], lr=0.1, **OPTIONS)
    fresh_parameter.grad = p.grad
    fresh.step()
    fresh.consolidate()
    fresh.state_dict()
    kept, expected = optimizer.state[p]["second_momentum"], fresh.state[fresh_parameter]["second_momentum"]
    return float((kept - expected).abs().max()), float(expected.abs().max())


@pytest.mark.parametrize("world", [1, 2])
def test_state_that_was_reset_begins_anew(world: int) -> None:
    for error, size in run_ranks(world, reset):
        assert error <= 1e-12 < size


# ----------------------------------------------------------------------------------------------------------------- settings


def unlike() -> str:
    p = nn.Parameter(torch.ones(4, 4))
    try:
        MuonDist([("w", p)], ns_steps=5, rule="normuon", rule_options={"beta2": 0.9 + 0.01 * dist.get_rank()}).bind()
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_hyperparameters_are_told() -> None:
    assert all("don't agree on what they train" in told for told in run_ranks(2, unlike))


@pytest.mark.parametrize(
    ("options", "group", "message"),
    [
        ({"rule": "soap"}, {}, "rule='soap': choose one of muon, normuon"),
        ({"rule": "adamw"}, {}, "rule='adamw': choose one of muon, normuon"),
        ({"rule": "normuon", "rule_options": {"beta_2": 0.9}}, {}, "'normuon' has beta2"),
        ({"rule_options": {"beta2": 0.9}}, {}, "'muon' has none"),
        ({"rule": "normuon", "rule_options": {"beta2": 1.0}}, {}, r"beta2 must be a number in \[0, 1\), got 1.0"),
        ({}, {"beta2": 0.9}, "does not take 'beta2'"),
        ({"rule": "normuon"}, {"beta_2": 0.9}, "did you mean 'beta2'"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonDist([{"params": [("w", nn.Parameter(torch.zeros(4, 4)))], **group}], **options)


def test_a_group_has_a_rule_of_its_own() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(6, 4)) for _ in range(3)]
    optimizer = MuonDist(
        [
            {"params": [("a.weight", parameters[0])]},
            {"params": [("b.weight", parameters[1])], "rule": "normuon", "beta2": 0.8},
            {"params": [("c.weight", parameters[2])], "rule": "normuon"},
        ],
        ns_steps=5,
    )
    for p in parameters:
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    assert [group.get("beta2") for group in optimizer.param_groups] == [None, 0.8, 0.95]
    assert ["second_momentum" in optimizer.state[p] for p in parameters] == [False, True, True]
    kept = [optimizer.state[p]["second_momentum"] for p in parameters[1:]]
    assert torch.allclose(kept[0], 4 * kept[1])  # .2 and .05 of the same squares
    assert torch.equal(parameters[1], parameters[2]) and not torch.allclose(parameters[0], parameters[1])  # a first step knows no past


def test_a_group_keeps_to_muon_beside_others() -> None:
    """Groups of the default rule carry no key for it: torch.distributed.checkpoint refuses old checkpoints for a key that they lack."""
    given = [
        {"params": [("a.weight", nn.Parameter(torch.zeros(6, 4)))], "rule": "muon"},
        {"params": [("b.weight", nn.Parameter(torch.zeros(6, 4)))]},
    ]
    optimizer = MuonDist(given, rule="normuon")
    assert [group.get("rule") for group in optimizer.param_groups] == [None, "normuon"]
    optimizer.add_param_group({"params": [("c.weight", nn.Parameter(torch.zeros(6, 4)))], "rule": "muon"})
    optimizer.add_param_group({"params": [("d.weight", nn.Parameter(torch.zeros(6, 4)))]})
    assert [group.get("rule") for group in optimizer.param_groups] == [None, "normuon", None, "normuon"]
    assert [group.get("beta2") for group in optimizer.param_groups] == [None, 0.95, None, 0.95]
