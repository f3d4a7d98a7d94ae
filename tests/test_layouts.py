"""Fragments described by ShardLayout: flat partitions, fused tensor-parallel blocks, replicas; and what is refused."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

from muon_dist import MuonDist, ShardLayout, build_param_groups
from muon_dist.sharding.layout import Placement, box_numel, dtensor_fragments, fragment_numel

from . import models
from .ranks import run_ranks
from .reference import ReferenceMuon

SHAPES = {"a.weight": (13, 7), "b.weight": (1, 5), "c.weight": (6, 31), "d.weight": (3, 2, 9), "e.bias": (11,), "f.weight": (2, 3)}


def whole_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def spans(kind: str, rank: int, world: int) -> dict[str, tuple[int, int]]:
    """The flat range of every parameter that a rank stores: each cut evenly (ZeRO-3), or one long buffer cut (ZeRO-1/2)."""
    result, offset = {}, 0
    total = sum(math.prod(shape) for shape in SHAPES.values())
    piece = -(-total // world)
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        if kind == "each":
            chunk = -(-numel // world)
            result[name] = (min(rank * chunk, numel), min((rank + 1) * chunk, numel))
        else:
            start, stop = rank * piece - offset, (rank + 1) * piece - offset
            result[name] = (min(max(start, 0), numel), min(max(stop, 0), numel))
            offset += numel
    return result


def flat_partitions(kind: str) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = spans(kind, rank, world)
    whole = whole_tensors(0)
    local = {name: torch.nn.Parameter(p.flatten()[slice(*mine[name])].clone()) for name, p in whole.items()}
    layouts = {name: ShardLayout(global_shape=SHAPES[name], span=mine[name]) for name in SHAPES}
    optimizer = MuonDist(local.items(), lr=1.0, weight_decay=0.0, layouts=layouts, bucket_mb=0.001, ns_steps=5)
    reference = ReferenceMuon(whole, {n: [s[-2]] for n, s in SHAPES.items() if len(s) > 1}, lr=1.0, weight_decay=0.0)
    worst = 0.0
    for seed in (1, 2, 3):
        gradients = whole_tensors(seed)
        for name, p in local.items():
            p.grad = gradients[name].flatten()[slice(*mine[name])].clone()
        before = {name: p.clone() for name, p in reference.parameters.items()}
        reference.step(gradients)
        optimizer.step()
        for name, p in local.items():
            expected = reference.parameters[name].flatten()[slice(*mine[name])]
            scale = (reference.parameters[name] - before[name]).norm()
            worst = max(worst, float((p.detach() - expected).norm() / scale))
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["each", "buffer"])
def test_flat_partitions_cut_anywhere_give_the_reference_update(kind: str, world: int) -> None:
    assert max(run_ranks(world, flat_partitions, kind)) <= 1e-10


def fused_blocks(data_parallel: int) -> float:
    """[gate; up] over tensor-parallel ranks, each rank [gate_i; up_i]; its flat tensor cut again, or replicated, over data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensor_parallel = world // data_parallel
    tp, dp = rank % tensor_parallel, rank // tensor_parallel
    tp_groups = [dist.new_group(list(range(d * tensor_parallel, (d + 1) * tensor_parallel))) for d in range(data_parallel)]
    dp_groups = [dist.new_group(list(range(t, world, tensor_parallel))) for t in range(tensor_parallel)]
    hidden, width = 8 * tensor_parallel, 10
    generator = torch.Generator().manual_seed(3)
    whole, g = (torch.randn(2 * hidden, width, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = hidden // tensor_parallel
    blocks = tuple(((part * hidden + tp * rows, part * hidden + (tp + 1) * rows), (0, width)) for part in (0, 1))

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[a:b] for (a, b), _ in blocks])

    results = []
    for mode in ("cut", "replicas"):
        if mode == "cut":
            numel = 2 * rows * width
            span = (dp * numel // data_parallel, (dp + 1) * numel // data_parallel)
            layout = ShardLayout(global_shape=(2 * hidden, width), blocks=blocks, span=span)
            mine = torch.nn.Parameter(local(whole).flatten()[slice(*span)].clone())
            mine.grad = local(g).flatten()[slice(*span)].clone()
        else:
            layout = ShardLayout(global_shape=(2 * hidden, width), blocks=blocks, group=tp_groups[dp], replicas=dp_groups[tp])
            mine = torch.nn.Parameter(local(whole))
            mine.grad = local(g)
        group = {"params": [("fc1.weight", mine)], "algorithm": "muon", "split": (hidden, hidden)}
        optimizer = MuonDist([group], lr=1.0, weight_decay=0.0, layouts={"fc1.weight": layout}, ns_steps=5)
        optimizer.step()
        reference = ReferenceMuon({"w": whole}, {"w": [hidden, hidden]}, lr=1.0, weight_decay=0.0)
        reference.step({"w": g})
        expected = local(reference.parameters["w"])
        if mode == "cut":
            expected = expected.flatten()[slice(*span)]
        results.append(float((mine.detach() - expected).norm() / (reference.parameters["w"] - whole).norm()))
        owners = optimizer.engine.domains[0].plan.owners
        assert len(optimizer.engine.domains[0].ranks) == world and len(owners) == 2
    return max(results)


@pytest.mark.parametrize(("world", "data_parallel"), [(2, 1), (2, 2), (4, 2), (3, 1), (4, 1)])
def test_fused_gate_up_is_split_before_it_is_orthogonalised(world: int, data_parallel: int) -> None:
    assert max(run_ranks(world, fused_blocks, data_parallel)) <= 1e-10


def overlapping_layouts(kind: str) -> str:
    rank = dist.get_rank()
    if kind == "hole":
        layout = ShardLayout(global_shape=(8, 4), span=(0, 16) if rank == 0 else (20, 32))
    elif kind == "overlap":
        layout = ShardLayout(global_shape=(8, 4), span=(0, 20) if rank == 0 else (16, 32))
    elif kind == "size":
        layout = ShardLayout(global_shape=(8, 4), span=(0, 16) if rank == 0 else (16, 32))
    elif kind == "shape":
        layout = ShardLayout(global_shape=(8, 4) if rank == 0 else (4, 8), span=(0, 16) if rank == 0 else (16, 32))
    numel = fragment_numel(layout.fragment()) + (kind == "size" and rank == 1)
    p = torch.nn.Parameter(torch.zeros(numel))
    p.grad = torch.ones(numel)
    optimizer = MuonDist([("w", p)], layouts={"w": layout}, ns_steps=5)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "words"), [("hole", "don't tile"), ("overlap", "don't tile"), ("size", "rank 1"), ("shape", "global_shape")]
)
def test_layouts_that_do_not_fit_together_raise_on_every_rank(kind: str, words: str) -> None:
    errors = run_ranks(2, overlapping_layouts, kind, timeout=30)
    assert all(words in error and "w" in error for error in errors), errors


def test_a_layout_outside_its_parameter_raises() -> None:
    with pytest.raises(ValueError, match="does not lie in a parameter"):
        ShardLayout(global_shape=(4, 4), blocks=(((0, 5), (0, 4)),))
    with pytest.raises(ValueError, match=r"span \(3, 17\)"):
        ShardLayout(global_shape=(4, 4), span=(3, 17))
    with pytest.raises(ValueError, match="nothere"):
        MuonDist([("w", torch.nn.Parameter(torch.zeros(2, 2)))], layouts={"nothere": ShardLayout(global_shape=(2, 2))}, ns_steps=5).bind()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    st.lists(st.integers(0, 10**6), min_size=0, max_size=5),
)
def test_every_element_lies_in_exactly_one_fragment_in_storage_order(shape: tuple[int, ...], cuts: list[int]) -> None:
    numel = math.prod(shape)
    bounds = [0, *sorted(c % (numel + 1) for c in cuts), numel]
    values = torch.arange(numel).view(shape)
    fragments = []
    for span in itertools.pairwise(bounds):
        fragment = ShardLayout(global_shape=shape, span=span).fragment()
        stored = [values[tuple(slice(a, b) for a, b in box)].flatten() for box in fragment]
        assert torch.equal(torch.cat([*stored, torch.empty(0, dtype=torch.int64)]), values.flatten()[slice(*span)])
        assert len(fragment) <= 2 * len(shape) - 1
        fragments.append(fragment)
    whole = tuple((0, size) for size in shape)
    pieces = Placement(name="w", shape=shape, fragments=tuple(fragments)).pieces(whole)
    assert sum(box_numel(box) for box, _ in pieces) == numel


def where_values_lie(placement: str, shapes: str) -> int:
    """Every DTensor's fragment against the values that its host put there. Updates alone would not tell: they permute with the rows."""
    original = {name: p.detach().clone() for name, p in models.make_bank(models.SHAPES[shapes], torch.float64).named_parameters()}
    model = models.place(models.make_bank(models.SHAPES[shapes], torch.float64), placement)
    checked = 0
    for name, p in model.named_parameters():
        ranks, fragments = dtensor_fragments(p, name)
        mine = fragments[ranks.index(dist.get_rank())]
        stored = p.to_local().detach()
        assert fragment_numel(mine) == stored.numel()
        for box in mine:
            assert torch.equal(stored, original[name][tuple(slice(a, b) for a, b in box)]), name
            checked += 1
    return checked


@pytest.mark.parametrize(
    ("placement", "world", "shapes"),
    [
        ("fsdp2", 3, "odd"),
        ("fsdp2_dim1", 2, "even"),
        ("hsdp", 4, "odd"),
        ("tp", 3, "wide"),
        ("fsdp2_tp", 4, "wide"),
        ("fsdp2_tp", 4, "even"),
    ],
)
def test_fragments_of_dtensors_are_where_their_hosts_put_them(placement: str, world: int, shapes: str) -> None:
    assert all(run_ranks(world, where_values_lie, placement, shapes))


def fused_rows_under_fsdp2_and_tensor_parallelism() -> float:
    """A fused weight whose rows FSDP2 cuts inside tensor-parallel cuts: its matrices are still its own rows."""
    model = models.place(models.make_bank([(24, 10)], torch.float64), "fsdp2_tp")
    name, sizes = "layers.0.weight", [12, 8, 4]
    optimizer = MuonDist(build_param_groups(model, split={"weight": sizes}), lr=1.0, weight_decay=0.0, ns_steps=5)
    models.backward(model, 0, "fsdp2_tp")
    before = models.whole_parameters(model)
    reference = ReferenceMuon(before, {name: sizes}, lr=1.0, weight_decay=0.0)
    reference.step(models.whole_gradients(model))
    optimizer.step()
    return models.relative_errors(before, models.whole_parameters(model), reference.parameters)[name]


def test_fused_weights_are_split_under_fsdp2_and_tensor_parallelism() -> None:
    assert max(run_ranks(4, fused_rows_under_fsdp2_and_tensor_parallelism)) <= 1e-10
