"""Matrices of which every rank orthogonalises a slice: the same update, spectrum and decisions as with owners, and what they cost."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dist import MuonDist, ShardLayout
from muon_dist.polar.cost import segments_of, sliced_flops_of
from muon_dist.polar.polynomials import schedule_for
from muon_dist.polar.products import SymmetricProducts
from muon_dist.sharding.layout import Placement
from muon_dist.sharding.plan import Plan, make_plan
from muon_dist.sharding.slicing import Slicing, slicing_of
from muon_dist.sharding.tasks import SLICED, MatrixTask, Piece, SlicedCost

from . import models
from .ranks import run_ranks
from .recording import Collectives
from .test_adaptive import OPTIONS, run_planted
from .test_parity import BOUNDS, PLACEMENTS, updates_against_reference
from .test_plan import rows, task

SHARDED = [case for case in PLACEMENTS if case[0] not in ("replicas", "mixed")]


CASES = [
    pytest.param(*case, dtype, marks=() if dtype == torch.float64 or k % 3 == 0 else pytest.mark.more("product"))
    for k, case in enumerate(SHARDED)
    for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize(("placement", "world", "shapes", "dtype"), CASES, ids=str)
def test_slices_give_the_update_of_whole_matrices(placement: str, world: int, shapes: str, dtype: torch.dtype) -> None:
    worst = run_ranks(world, updates_against_reference, placement, shapes, dtype, {"bucket_mb": 0.008, "placement": "gram"})
    assert max(worst) <= BOUNDS[dtype]


@pytest.mark.parametrize(("placement", "world"), [("rows", 2), pytest.param("rows", 4, marks=pytest.mark.more("repeat")), ("columns", 3)])
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "deflation": 5}], ids=["chosen", "deflated"])
def test_slices_measure_the_whole_spectrum_and_decide_alike(placement: str, world: int, options: dict[str, Any]) -> None:
    """Dominant directions, too: with deflation the passes and the small Gram matrix are sums over slices."""
    owned = run_ranks(world, run_planted, placement, 20, 11, options)
    sliced = run_ranks(world, run_planted, placement, 20, 11, {**options, "placement": "gram"})
    for a, b in zip(owned, sliced, strict=True):
        assert a["used"] == b["used"] and set(b["owners"]) == {SLICED} != set(a["owners"])
        assert b["error"] < 1e-10
        assert torch.allclose(a["rows"], b["rows"], rtol=1e-6, atol=1e-9, equal_nan=True)


def stepped(shapes: list[tuple[int, int]], dim: int, options: dict[str, Any]) -> dict[str, Any]:
    model = models.place(models.make_bank(shapes, torch.float32), "fsdp2" if dim == 0 else "fsdp2_dim1")
    optimizer = MuonDist(model.named_parameters(), ns_steps=5, **options)
    models.backward(model, 0, "fsdp2")
    optimizer.step()
    with Collectives() as collectives:
        optimizer.step()
    plan, me = optimizer.engine.domains[0].plan, optimizer.engine.domains[0].me
    return {"collectives": Counter(collectives.names), "load": plan.loads()[me], "added_up": int(plan.bucket_loads().added_up.sum())}


@pytest.mark.parametrize("world", [2, 3])
def test_a_slice_that_a_rank_stores_stays_and_gram_matrices_are_added_up_once_per_segment(world: int) -> None:
    shapes = [(96, 32)] * 3  # tall, cut along rows
    segments = len(segments_of(schedule_for("jordan", 5).steps, 96, 32, torch.float32, SymmetricProducts("cpu")))
    for rank in run_ranks(world, stepped, shapes, 0, {"placement": "gram"}):
        assert rank["collectives"] == {"allreduce_": 1 + 2 + segments}  # flags, norms before and after, and all three matrices at once
        assert rank["added_up"] == 3 * segments * 32 * 32 * 4
        assert rank["load"].bytes_sent == rank["added_up"] * 2 * (world - 1) // world
    for rank in run_ranks(world, stepped, [(32, 96)] * 3, 0, {"placement": "gram"}):  # wide: columns are worked on, rows are stored
        assert rank["collectives"] == {"allreduce_": 1 + 2 + segments, "alltoall_base_": 2}


def test_slices_cost_each_rank_a_share_of_the_length_and_all_of_the_gram_matrix() -> None:
    fixed, per_row, _ = sliced_flops_of(4096, 32, schedule_for("jordan", 5), torch.float32, SymmetricProducts("cpu"))
    (sliced, *_), owned = (run_ranks(4, stepped, [(4096, 32)], 0, {"placement": placement}) for placement in ("gram", "owner"))
    whole = sum(rank["load"].flops for rank in owned)  # one rank's work
    assert whole == fixed + 4096 * per_row and sliced["load"].flops == fixed + 1024 * per_row < 0.3 * whole


def updates_of_special_parameters(placement: str) -> dict[str, torch.Tensor]:
    """A kernel, a stack of experts and a fused projection, cut along their first dimension."""
    torch.manual_seed(0)
    shapes = {"conv.weight": (8, 6, 3, 3), "experts.weight": (3, 20, 12), "attn.qkv.weight": (36, 12), "mlp.up.weight": (7, 1)}
    values, grads = ({k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()} for _ in range(2))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parameters = {k: nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for k, v in values.items()}
    for k, p in parameters.items():
        p.grad = distribute_tensor(grads[k], mesh, [Shard(0)])
    groups = [
        {"params": [("conv.weight", parameters["conv.weight"])], "kind": "conv"},
        {"params": [("attn.qkv.weight", parameters["attn.qkv.weight"])], "split": (12, 12, 12)},
        {"params": [(k, parameters[k]) for k in ("experts.weight", "mlp.up.weight")]},
    ]
    groups = [{**group, "algorithm": "muon"} for group in groups]
    optimizer = MuonDist(groups, lr=1.0, weight_decay=0.0, ns_steps=5, placement=placement)
    optimizer.step()
    if placement == "gram":
        assert set(optimizer.engine.domains[0].plan.owners) == {SLICED}
    return {k: models.whole(p) - values[k] for k, p in parameters.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_kernels_experts_and_fused_projections_can_be_sliced(world: int) -> None:
    owned, sliced = (run_ranks(world, updates_of_special_parameters, placement)[0] for placement in ("owner", "gram"))
    for name, update in sliced.items():
        assert (update - owned[name]).norm() <= 1e-10 * owned[name].norm(), name


def flat_update(placement: str, matrices: list[tuple[tuple[int, int], int]]) -> torch.Tensor:
    """Matrices that two ranks store flat: the first so many elements of each, the second the rest."""
    rank, local, layouts = torch.distributed.get_rank(), {}, {}
    generator = torch.Generator().manual_seed(3)
    for k, (shape, cut) in enumerate(matrices):
        value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).flatten() for _ in range(2))
        span = (0, cut) if rank == 0 else (cut, len(value))
        local[f"w{k}"] = nn.Parameter(value[slice(*span)].clone())
        local[f"w{k}"].grad = grad[slice(*span)].clone()
        layouts[f"w{k}"] = ShardLayout(global_shape=shape, span=span)
    MuonDist(local.items(), lr=1.0, weight_decay=0.0, layouts=layouts, ns_steps=5, placement=placement).step()
    return torch.cat([p.detach() for p in local.values()])


FLAT = {
    "a buffer cut at an element": [((11, 7), 61), ((5, 9), 0)],
    "one shape cut at several rows": [((10, 3), 18), ((10, 3), 12), ((10, 3), 18), ((10, 3), 30)],
}


@pytest.mark.parametrize("matrices", FLAT.values(), ids=FLAT.keys())
def test_flat_fragments_travel_to_slices_and_back(matrices: list[tuple[tuple[int, int], int]]) -> None:
    for owned, sliced in zip(*(run_ranks(2, flat_update, placement, matrices) for placement in ("owner", "gram")), strict=True):
        assert (owned - sliced).norm() <= 1e-10 * owned.norm()


def refused(placement: str, options: dict[str, Any]) -> str:
    model = models.place(models.make_bank(models.EVEN, torch.float32), placement)
    optimizer = MuonDist(model.named_parameters(), **options)
    try:
        optimizer.bind()
    except ValueError as error:
        return str(error)
    return "bound"


def test_what_can_not_be_sliced_is_refused_and_left_to_owners_by_auto() -> None:
    assert all("it is replicated" in text for text in run_ranks(2, refused, "replicas", {"placement": "gram"}))
    assert run_ranks(2, refused, "fsdp2", {"placement": "gram", "deflation": 2}) == ["bound"] * 2
    assert run_ranks(2, refused, "replicas", {"placement": "auto"}) == ["bound"] * 2
    with pytest.raises(ValueError, match="choose one of owner, gram, auto"):
        MuonDist([nn.Parameter(torch.ones(3, 3))], placement="shard")


def costed(k: int, shape: tuple[int, int], flops: int, sliced: SlicedCost) -> MatrixTask:
    return MatrixTask(**{**vars(task(k, shape)), "flops": flops, "sliced": sliced})


def planned(count: int, n: int, sliced: SlicedCost, placement: str = "auto") -> Plan:
    tasks = [costed(k, (512, 64), 10**12, sliced) for k in range(count)]
    return make_plan([rows(512, 64, n)] * count, tasks, n_ranks=n, bucket_bytes=2**20, placement=placement)


def test_auto_slices_where_matrices_are_fewer_than_ranks_and_adding_up_is_cheap() -> None:
    cheap = SlicedCost(fixed=10**11, per_line=10**12 // 512, added_up=64 * 64 * 4, workspace=0)
    assert set(planned(2, 8, cheap).owners) == {SLICED}  # two ranks would work, six would wait
    assert SLICED not in planned(64, 8, cheap).owners  # every rank has eight of its own
    assert SLICED not in planned(2, 8, SlicedCost(fixed=0, per_line=0, added_up=2**30, workspace=0)).owners  # a long way
    assert planned(2, 8, cheap).imbalance() == 1.0


def test_slices_follow_what_ranks_store_and_are_even_elsewhere() -> None:
    def piece(box: tuple[tuple[int, int], ...], *holders: int) -> Piece:
        return Piece(box, holders[0], holders)

    tall = task(0, (10, 4))
    stored = [piece(((0, 6), (0, 4)), 0), piece(((6, 10), (0, 4)), 2)]
    assert slicing_of(tall, stored, 3) == Slicing(0, 0, (0, 6, 6, 10), 1, stays=True)
    swapped = [piece(((0, 6), (0, 4)), 2), piece(((6, 10), (0, 4)), 0)]
    copies = [piece(((0, 6), (0, 4)), 0, 1), piece(((6, 10), (0, 4)), 2, 3)]
    columns = [piece(((0, 10), (0, 1)), 0), piece(((0, 10), (1, 4)), 1)]
    for pieces, n in ((swapped, 3), (copies, 4), (columns, 2)):
        assert slicing_of(tall, pieces, n) == Slicing(0, 0, tuple(10 * r // n for r in range(n + 1)), 1, stays=False)
    square = task(0, (4, 4))
    by_columns = [piece(((0, 4), (0, 3)), 0), piece(((0, 4), (3, 4)), 1)]
    assert slicing_of(square, by_columns, 2) == Slicing(1, 1, (0, 3, 4), 1, stays=True)
    kernel = MatrixTask(**{**vars(task(0, (4, 18))), "box": ((0, 4), (0, 2), (0, 3), (0, 3))})
    assert slicing_of(kernel, [piece(kernel.box, 0)], 2) == Slicing(1, 1, (0, 1, 2), 9, stays=False)


def test_a_plan_with_slices_says_what_every_rank_does() -> None:
    cost = SlicedCost(fixed=100, per_line=3, added_up=1000, workspace=50)
    placement: Placement = rows(10, 4, 3)  # 4, 4 and 2 rows
    plan = make_plan([placement], [costed(0, (10, 4), 7, cost)], n_ranks=3, bucket_bytes=2**20, placement="gram")
    assert [load.flops for load in plan.loads()] == [112, 112, 106]
    assert [load.bytes_sent for load in plan.loads()] == [1000 * 2 * 2 // 3] * 3 and not plan.gathers(0) and not plan.scatters(0)
    assert [load.peak_bytes for load in plan.loads()] == [2 * 4 * 4 * 4 + 50] * 2 + [2 * 2 * 4 * 4 + 50]
    assert [plan.shape_of_part(0, r) for r in range(3)] == [(4, 4), (4, 4), (2, 4)]
    assert plan.digest() != make_plan([placement], plan.matrices, n_ranks=3, bucket_bytes=2**20).digest()
