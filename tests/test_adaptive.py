"""Adaptive schedules on real ranks: the same decisions and updates under every placement, in checkpoints, and what they cost."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dist import MuonDist, ShardLayout, choose_schedule, orthogonalize
from muon_dist.adaptation import LAG, SHARED
from muon_dist.measure import measure_spectra
from muon_dist.polar.polynomials import Schedule, schedule_for
from muon_dist.polar.products import products_on
from muon_dist.polar.recorder import moment_count
from muon_dist.polar.scaling import update_scale
from muon_dist.spectrum.policy import FIVE, Work
from muon_dist.spectrum.record import MEASUREMENTS, WIDTH_OF_DECISION
from muon_dist.telemetry import read_run

from . import models
from .ranks import run_ranks
from .recording import Collectives
from .test_policy import error_of
from .test_spectrum import falling, planted

MILD, STEEP = falling(48, 0.6), falling(48, 2.6)
FOUR = schedule_for("jordan", 4)


def planted_gradients(shapes: list[tuple[int, int]], swapped: bool) -> list[torch.Tensor]:
    """Even parameters have a mild spectrum and odd ones a steep one, two decades lower at its end; or the other way round."""
    return [planted((MILD, STEEP)[(k + swapped) % 2][: min(shape)], *shape, seed=k) for k, shape in enumerate(shapes)]


def place_parameter(value: torch.Tensor, placement: str) -> nn.Parameter:
    if placement == "replicas" or not dist.is_initialized():
        return nn.Parameter(value.clone())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(distribute_tensor(value, mesh, [Shard({"rows": 0, "columns": 1}[placement])]))


def run_planted(placement: str, steps: int, swap_at: int, options: dict) -> dict:
    """Plain momentum 0, so that what is orthogonalised is the gradient; steps used per matrix and step, and the last update."""
    shapes = [(48, 64), (48, 64), (48, 48), (48, 50), (48, 64)]
    torch.manual_seed(0)
    parameters = [place_parameter(torch.randn(s, dtype=torch.float64), placement) for s in shapes]
    named = [(f"blocks.{k}.attn.q.weight", p) for k, p in enumerate(parameters)]
    optimizer = MuonDist(named, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **{"ns_steps": "adaptive", **options})
    used, before, errors, seen = [], None, [], set()
    for step in range(steps):
        gradients = planted_gradients(shapes, swapped=step >= swap_at)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = place_parameter(g, placement).detach()
        before = [models.whole(p) for p in parameters]
        optimizer.step()
        schedules = list(optimizer.schedules.values())
        seen.update(s for _, s in schedules)
        used.append([(len(s), s.deflation) for _, s in schedules])
        for p, b, g, (_, schedule) in zip(parameters, before, gradients, schedules, strict=True):
            if not optimizer.engine.programs[0].adaptation.measuring:  # what is measured takes a step more than its schedule
                expected = -orthogonalize(g, schedule=schedule) * update_scale("match_rms_adamw", *g.shape)
                errors.append(float(((models.whole(p) - b) - expected).norm() / expected.norm()))
    rows = torch.cat([optimizer.state[p]["spectrum"] for p in parameters])
    (program,) = optimizer.engine.programs
    for bucket in program.buckets:  # a batch for each shape and schedule that this rank owns, as they stand
        known = [(task.shape, schedule) for task, schedule in zip(program.domain.plan.matrices, program.adaptation.schedules, strict=True)]
        kinds = [{known[i] for i in batch.matrices} for batch in bucket.batches]
        assert all(len(kind) == 1 for kind in kinds) and len(set(map(frozenset, kinds))) == len(kinds)
    return {
        "used": used,
        "error": max(errors),
        "rows": rows,
        "schedules": seen,
        "last": [s for _, s in optimizer.schedules.values()],
        "owners": program.domain.plan.owners,
    }


MORE = pytest.mark.more("repeat")
OPTIONS = {"burn_in": 3, "measure_every": 6}


@pytest.mark.parametrize(
    ("placement", "world"),
    [("replicas", 1), ("replicas", 2), pytest.param("rows", 2, marks=MORE), ("rows", 4), pytest.param("columns", 3, marks=MORE)],
)
def test_layers_get_what_they_need_and_swap_when_their_spectra_swap(placement: str, world: int) -> None:
    options = {**OPTIONS, "coverage": 0.9, "deflation": 0}
    expected = [
        [(len(choose_schedule(g, coverage=0.9, deflation=0)), 0) for g in planted_gradients([(48, 64)] * 2, swapped)]
        for swapped in (False, True)
    ]
    assert expected[0][0] < expected[0][1] and expected[0] == expected[1][::-1]
    ranks = run_ranks(world, run_planted, placement, 80, 30, options)
    alone = run_planted("replicas", 80, 30, options)
    for rank in ranks:
        assert rank["error"] < 1e-10
        assert rank["used"] == alone["used"], "decisions depend on the world size"
        before, after = rank["used"][29], rank["used"][-1]
        assert before[:2] == expected[0] and after[:2] == expected[1]
        assert rank["used"][3 + LAG + SHARED - 1][0] == rank["used"][0][0]  # the prior until then
        assert torch.equal(rank["rows"].nan_to_num(), ranks[0]["rows"].nan_to_num())


@pytest.mark.parametrize("polynomial", ["minimax", "jordan"])
def test_deflation_and_the_jordan_family_adapt_too(polynomial: str) -> None:
    result = run_planted("replicas", 30, 99, {**OPTIONS, "polynomial": polynomial, "deflation": 2, "coverage": 0.9, "tol": 0.35})
    assert result["used"][-1][0] < result["used"][-1][1] and result["error"] < 1e-9
    assert {deflation for _, deflation in result["used"][-1]} == {2}


@pytest.mark.parametrize(
    ("placement", "world", "options", "reference"),
    [
        ("replicas", 2, {}, FOUR),
        ("rows", 2, {"accuracy": "jordan5"}, FIVE),
        pytest.param("rows", 4, {}, FOUR, marks=MORE),
        ("columns", 3, {}, FOUR),
    ],
)
def test_no_matrix_is_left_further_from_its_polar_factor_than_by_the_jordan_steps(
    placement: str, world: int, options: dict, reference: Schedule
) -> None:
    """Steps and deflated directions are chosen together, alike at every world size, and never dearer than five steps. Four by default."""
    alone = run_planted("replicas", 40, 20, options)
    for rank in run_ranks(world, run_planted, placement, 40, 20, options):
        assert rank["error"] < 1e-10 and rank["used"] == alone["used"]
        assert torch.equal(rank["rows"].nan_to_num(), alone["rows"].nan_to_num())
    shapes = [(48, 64), (48, 64), (48, 48), (48, 50), (48, 64)]
    for used in alone["used"]:
        for (steps, deflation), shape in zip(used, shapes, strict=True):
            work = Work(*shape, torch.float64, products_on("cpu"))
            assert any(work.flops(s) <= work.flops(FIVE) for s in alone["schedules"] if (len(s), s.deflation) == (steps, deflation))
    for g, schedule in zip(planted_gradients(shapes, swapped=True), alone["last"], strict=True):
        assert error_of(g, schedule) <= 1.1 * error_of(g, reference)


def run_cost(steps: int) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = [nn.Parameter(distribute_tensor(torch.randn(32, 32), mesh, [Shard(0)])) for _ in range(8)]
    named = [(f"layers.{k}.up.weight", p) for k, p in enumerate(parameters)]
    optimizer = MuonDist(named, ns_steps="adaptive", burn_in=2, measure_every=16, wire_dtype="fp32")
    counts, sizes = [], []
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: object, **options: object) -> object:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        for _ in range(steps):
            for p in parameters:
                p.grad = distribute_tensor(torch.randn(32, 32), mesh, [Shard(0)])
            sizes.clear()
            with Collectives() as collectives:
                optimizer.step()
            counts.append((Counter(collectives.names), list(sizes), dict(optimizer.engine.programs[0].adaptation.measuring)))
    finally:
        dist.all_reduce = real
    return {"counts": counts}


def test_a_measured_step_adds_one_small_all_reduce_and_others_nothing() -> None:
    for rank in run_ranks(2, run_cost, 50):
        steps = rank["counts"]
        late = steps[20:]
        measured = [c for c in late if c[2]]
        assert 0.3 < len(measured) / len(late) < 0.6  # 8 matrices every 16 steps, staggered: one at every other step or so
        assert len(steps[2][2]) == 8 and sum(len(c[2]) for c in steps[18:50]) == 16
        for k, (names, sizes, measuring) in enumerate(steps[1:], 1):
            decided = len(steps[k - LAG][2]) if k >= LAG else 0  # that was measured LAG steps before
            assert names["alltoall_base_"] == 2
            assert names["allreduce_"] == 1 + bool(measuring) + bool(decided)
            if measuring:
                assert sizes[-1] == 8 * len(measuring) * max(moment_count(len(s), s.deflation) for s in measuring.values())
            if decided:
                assert 8 * decided * WIDTH_OF_DECISION in sizes


def run_counted(steps: int) -> int:
    """How often this rank fits a spectrum and decides."""
    from muon_dist import adaptation

    own, decided = adaptation.spectrum_from_moments, []
    adaptation.spectrum_from_moments = lambda *args: decided.append(1) or own(*args)
    try:
        torch.manual_seed(0)
        parameters = [place_parameter(torch.randn(24, 32), "rows") for _ in range(12)]
        optimizer = MuonDist([(f"layers.{k}.up.weight", p) for k, p in enumerate(parameters)])
        for _ in range(steps):
            for p in parameters:
                p.grad = place_parameter(torch.randn(24, 32), "rows").detach()
            optimizer.step()
    finally:
        adaptation.spectrum_from_moments = own
    return len(decided)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_measurement_is_decided_on_once_and_ranks_share_the_work(world: int) -> None:
    (alone,) = run_ranks(1, run_counted, 12)
    counts = run_ranks(world, run_counted, 12)
    assert alone > 24 and sum(counts) == alone
    assert max(counts) <= alone / world + 6  # ranks take turns in each of the steps that decide


def resume(placement: str, cut: int, steps: int) -> dict:
    """Train, once without and once with a stop at `cut`; the parameters and rows of both."""
    result = {}
    for name, stop in (("through", None), ("resumed", cut)):
        torch.manual_seed(3)
        shapes = [(24, 40), (40, 24), (24, 24)]
        parameters = [place_parameter(torch.randn(s), placement) for s in shapes]
        named = [(f"blocks.{k}.mlp.up.weight", p) for k, p in enumerate(parameters)]
        options = {"ns_steps": "adaptive", "burn_in": 2, "measure_every": 5, "lr": 1e-2}
        optimizer = MuonDist(named, **options)
        for step in range(steps):
            if step == stop:
                optimizer.consolidate()
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = MuonDist(named, **options)
                optimizer.load_state_dict(state)
            for k, p in enumerate(parameters):
                generator = torch.Generator().manual_seed(100 * step + k)
                p.grad = place_parameter(torch.randn(shapes[k], generator=generator), placement).detach()
            optimizer.step()
        state = optimizer.state
        result[name] = [models.whole(p) for p in parameters], [state[p]["spectrum"].clone() for p in parameters]
    return result


@pytest.mark.parametrize(("placement", "world"), [("replicas", 1), ("replicas", 2), ("rows", 2)])
@pytest.mark.parametrize("cut", [3, 4, 5, 9, 12])  # with a measurement under way, with a decision, and without
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(placement: str, world: int, cut: int) -> None:
    for rank in run_ranks(world, resume, placement, cut, 16):
        (through, rows), (resumed, rows_again) = rank["through"], rank["resumed"]
        assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(rows, rows_again, strict=True))


def test_bf16_parameters_keep_their_measurements_exact_in_checkpoints() -> None:
    p = nn.Parameter(torch.randn(20, 30).bfloat16())
    optimizer = MuonDist([("blocks.0.up.weight", p)], ns_steps="adaptive", burn_in=0, measure_every=4)
    for _ in range(6):
        p.grad = torch.randn(20, 30).bfloat16()
        optimizer.step()
    state = optimizer.state_dict()
    again = MuonDist([("blocks.0.up.weight", p)], ns_steps="adaptive", burn_in=0, measure_every=4)
    again.load_state_dict(state)
    rows = again.state[p]["spectrum"]
    assert rows.dtype == torch.float64 and torch.equal(rows.nan_to_num(), state["state"][0]["spectrum"].nan_to_num())


def run_rebalanced() -> dict:
    torch.manual_seed(0)
    shapes = [(48, 48)] * 4
    parameters = [nn.Parameter(torch.randn(s)) for s in shapes]
    named = [(f"blocks.{k}.attn.q.weight", p) for k, p in enumerate(parameters)]
    optimizer = MuonDist(named, lr=1.0, weight_decay=0.0, ns_steps="adaptive", burn_in=0, measure_every=4, momentum=0.5)
    optimizer.bind()
    costly = [i for i, owner in enumerate(optimizer.engine.domains[0].plan.owners) if owner == 0]  # all that rank 0 owns becomes costly
    owners, moved = [], []
    buffers = [torch.zeros(s) for s in shapes]
    for step in range(36):
        for k, p in enumerate(parameters):
            sigma = STEEP if k in costly else MILD
            p.grad = planted(sigma, 48, 48, seed=10 * k + step % 3, dtype=torch.float32)
            buffers[k].lerp_(p.grad, 0.5)
        optimizer.step()
        owners.append(optimizer.engine.domains[0].plan.owners)
    optimizer.consolidate()
    for k, p in enumerate(parameters):
        moved.append(float((optimizer.state[p]["momentum_buffer"] - buffers[k]).norm()))
    counts = [int(optimizer.state[p]["spectrum"][0, MEASUREMENTS]) for p in parameters]
    steps = [len(s) for _, s in optimizer.schedules.values()]
    return {"owners": owners, "moved": moved, "steps": steps, "costly": costly, "measurements": counts}


def test_owners_are_chosen_anew_when_step_counts_have_moved_and_momentum_moves_along() -> None:
    alone = run_rebalanced()
    first, second = run_ranks(2, run_rebalanced)
    assert first["owners"] == second["owners"]
    assert len(set(first["owners"])) == 2, "owners were never chosen anew"
    a, b = first["costly"]
    assert first["owners"][-1][a] != first["owners"][-1][b] and first["steps"][a] > min(first["steps"])
    assert max(first["moved"] + second["moved"]) < 1e-5
    assert first["measurements"] == second["measurements"] == alone["measurements"], "measurements under way were lost"


def run_telemetry(folder: str) -> int:
    parameters = [nn.Parameter(torch.randn(24, 24)) for _ in range(3)]
    named = [(f"blocks.{k}.attn.o_proj.weight", p) for k, p in enumerate(parameters)]
    optimizer = MuonDist(named, ns_steps="adaptive", accuracy="jordan5", burn_in=0, measure_every=3, telemetry_dir=folder)
    for step in range(14):
        for p in parameters:
            p.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return dist.get_rank()


def test_telemetry_is_written_by_one_rank(tmp_path: Path) -> None:
    run_ranks(2, run_telemetry, str(tmp_path / "run"))
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["spectrum.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "spectrum.jsonl").read_text().splitlines()]
    assert lines[0]["type"] == "run" and lines[0]["params"] == 3 * 24 * 24
    measured = read_run(tmp_path / "run")
    assert Counter(m["name"] for m in measured) == {f"blocks.{k}.attn.o_proj.weight": 3 + (k > 0) for k in range(3)}
    assert {m["kind"] for m in measured} == {"o"} and {m["depth"] for m in measured} == {1 / 3, 2 / 3, 1.0}
    for m in measured:
        assert 1 <= m["ns_steps"] <= 5 and 0 <= m["deflation"] <= 3 and 0 < m["coverage"] <= 1
        assert 0 < m["error"] <= m["error_of_five_steps"] and m["flops"] <= m["flops_of_five_steps"] == 5 * 6 * 24**3
    with pytest.raises(ValueError, match="has no measurements"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": 0.0}, "coverage"),
        ({"coverage": 1.5}, "coverage"),
        ({"min_ns_steps": 5, "max_ns_steps": 3}, "above"),
        ({"polynomial": [(2, -1.5, 0.5)] * 5}, "generates its polynomials"),
        ({"polynomial": "polar_express"}, "generates its polynomials"),
        ({"ns_steps": 5, "coverage": 0.9}, "only work with"),
        ({"ns_steps": 5, "accuracy": "jordan5"}, "only work with"),
        ({"accuracy": "jordan5", "coverage": 0.9}, "two ways"),
        ({"accuracy": "jordan9"}, "choose one of jordan3"),
        ({"tol": 0.2}, "give coverage as well"),
        ({"ns_steps": "many"}, "steps must be"),
        ({"telemetry_sinks": ["tensorboard"]}, "telemetry_dir"),
        ({"telemetry_dir": "x", "telemetry_sinks": ["printer"]}, "telemetry_sinks"),
    ],
)
def test_adaptive_options_that_make_no_sense_raise_at_construction(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MuonDist([("layers.0.up.weight", nn.Parameter(torch.zeros(4, 4)))], **{"ns_steps": "adaptive", **options})


def test_a_telemetry_directory_that_cannot_be_written_raises_at_construction(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        MuonDist([("layers.0.up.weight", nn.Parameter(torch.zeros(4, 4)))], ns_steps="adaptive", telemetry_dir=tmp_path / "file" / "run")


def run_golub_kahan(placement: str) -> dict:
    x = {"a": planted(STEEP, 48, 70), "b": planted(MILD, 70, 48, seed=2)}
    world, rank = dist.get_world_size(), dist.get_rank()
    if placement == "flat":
        tensors, layouts = {}, {}
        for name, m in x.items():
            size = -(-m.numel() // world)
            span = (min(rank * size, m.numel()), min((rank + 1) * size, m.numel()))
            tensors[name] = m.flatten()[span[0] : span[1]].clone()
            layouts[name] = ShardLayout(global_shape=tuple(m.shape), span=span)
        found = measure_spectra(tensors, layouts=layouts, iterations=6, probes=3)
    else:
        mesh = init_device_mesh("cpu", (world,))
        tensors = {name: distribute_tensor(m, mesh, [Shard({"rows": 0, "columns": 1}[placement])]) for name, m in x.items()}
        with Collectives() as collectives:
            found = measure_spectra(tensors, iterations=6, probes=3)
        assert collectives.names == (["allreduce_"] * (6 + 2) if world > 1 else [])
    alone = measure_spectra(x, iterations=6, probes=3, process_group=dist.new_group([rank], use_local_synchronization=True))
    return {name: (found[name].quantiles, alone[name].quantiles) for name in x}


@pytest.mark.parametrize("placement", ["rows", "columns", "flat"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_golub_kahan_gives_the_same_quantiles_on_sharded_matrices(placement: str, world: int) -> None:
    for rank in run_ranks(world, run_golub_kahan, placement):
        for sharded, alone in rank.values():
            np.testing.assert_allclose(list(sharded.values()), list(alone.values()), rtol=1e-7)
