"""The same update, whatever the sharding: every placement's updates equal the reference's on whole matrices.

The reference is fed the gradients that the host reduced. Updates are compared (no decay, learning rate 1), not parameters.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dist import MuonDist

from . import models
from .ranks import run_ranks
from .reference import ReferenceMuon

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}

PLACEMENTS = [
    *[("replicas", n, "odd") for n in (1, 2, 3, 4)],
    *[("fsdp2", n, "odd") for n in (1, 2, 3, 4)],
    *[("fsdp2_dim1", n, "even") for n in (2, 4)],
    ("hsdp", 4, "odd"),
    *[("tp", n, "even") for n in (2, 4)],
    ("tp", 3, "odd"),
    ("fsdp2_tp", 4, "even"),
    ("fsdp2_tp", 4, "wide"),  # FSDP2 itself refuses a tensor-parallel shard with nothing in it
    *[("mixed", n, "odd") for n in (2, 3, 4)],
]


def updates_against_reference(placement: str, shapes: str, dtype: torch.dtype, options: dict) -> float:
    model = models.place(models.make_bank(models.SHAPES[shapes], dtype), placement)
    parameters = models.whole_parameters(model)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, **options, ns_steps=5)
    reference = ReferenceMuon(parameters, models.muon_names(parameters), lr=1.0, weight_decay=0.0)
    return worst_update(model, optimizer, reference, placement)


def worst_update(model: torch.nn.Module, optimizer: MuonDist, reference: ReferenceMuon, placement: str) -> float:
    """The largest relative error of an update in three steps, each from the same whole gradients."""
    worst = 0.0
    for seed in range(3):
        models.backward(model, seed, placement)
        before = models.whole_parameters(model)
        reference.parameters = {name: p.clone() for name, p in before.items()}
        reference.step(models.whole_gradients(model))
        optimizer.step()
        errors = models.relative_errors(before, models.whole_parameters(model), reference.parameters)
        worst = max(worst, *errors.values())
    return worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("placement", "world", "shapes"), PLACEMENTS, ids=lambda v: str(v))
def test_updates_equal_the_reference(placement: str, world: int, shapes: str, dtype: torch.dtype) -> None:
    # buckets of 8 KiB, so that several travel at once
    worst = run_ranks(world, updates_against_reference, placement, shapes, dtype, {"bucket_mb": 0.008})
    assert max(worst) <= BOUNDS[dtype]


def bf16_wire(placement: str) -> dict[str, torch.Tensor]:
    """One update with an fp32 iteration and bf16 on the wire, from gradients that don't depend on the world size."""
    model = models.place(models.make_bank(models.ODD, torch.float32), placement)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, wire_dtype="bf16", ns_steps=5)
    model(0).backward()
    before = models.whole_parameters(model)
    optimizer.step()
    after = models.whole_parameters(model)
    return {name: after[name] - before[name] for name in after if after[name].ndim == 2}


def test_what_stays_at_home_is_rounded_like_what_travels() -> None:
    """With bf16 on the wire the update is the same at every world size, although other pieces travel at each."""
    alone = run_ranks(1, bf16_wire, "replicas")[0]
    exact = run_ranks(1, exact_update)[0]
    for world in (2, 3):
        for placement in ("replicas", "fsdp2"):
            updates = run_ranks(world, bf16_wire, placement)[0]
            for name, update in updates.items():
                # a rounding to bf16 is 1.7e-3 of a value on average; here only values on the edge between two may differ
                assert (update - alone[name]).norm() <= 3e-4 * alone[name].norm(), (world, placement, name)
    roundings = [float((alone[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert min(roundings) > 1e-3  # the rounding is there


def exact_update() -> dict[str, torch.Tensor]:
    model = models.make_bank(models.ODD, torch.float32)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, ns_steps=5)
    model(0).backward()
    before = models.whole_parameters(model)
    optimizer.step()
    return {name: value - before[name] for name, value in models.whole_parameters(model).items() if value.ndim == 2}


def experts(placement: str) -> tuple[int, float]:
    """In how many buckets the matrices of one parameter travel, and the largest error of an update."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(value: torch.Tensor) -> torch.Tensor:
        return value if placement == "replicas" else distribute_tensor(value, mesh, [Shard(int(placement[-1]))])

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 24, 16, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(placed(start))
    optimizer = MuonDist([{"params": [("experts", p)], "algorithm": "muon"}], lr=1.0, weight_decay=0.1, bucket_mb=0.001, ns_steps=5)
    reference = ReferenceMuon({"experts": start}, {"experts": [24]}, lr=1.0, weight_decay=0.1)
    worst = 0.0
    for _ in range(3):
        gradient = torch.randn(5, 24, 16, generator=generator, dtype=torch.float64)
        p.grad = placed(gradient)
        before = models.whole(p)
        reference.parameters = {"experts": before.clone()}
        reference.step({"experts": gradient})
        optimizer.step()
        expected = reference.parameters["experts"] - before
        worst = max(worst, float((models.whole(p) - before - expected).norm() / expected.norm()))
    return len(optimizer.plans[0][1].buckets), worst


@pytest.mark.parametrize(("placement", "world"), [("replicas", 1), ("shard 0", 2), ("shard 1", 2), ("shard 2", 3)])
def test_a_parameter_whose_matrices_travel_in_several_buckets(placement: str, world: int) -> None:
    for buckets, error in run_ranks(world, experts, placement):
        assert buckets > 1 and error <= BOUNDS[torch.float64]
