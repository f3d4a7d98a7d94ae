"""MuonDist in Megatron models on CPU ranks: every update is that of the reference, which knows whole matrices only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from . import megatron_hosts as hosts
from .megatron_hosts import Setup, everyone
from .ranks import run_ranks
from .recording import Collectives, Recorder

FP32 = 2e-5


def errors(setup: Setup, given: dict[str, Any], steps: int = 3, **options: Any) -> tuple[dict[str, float], bool, list[str]]:
    chunks, optimizer = hosts.start(setup, **given)
    worst = hosts.update_errors(setup, chunks, optimizer, steps=steps, lr=0.05, weight_decay=0.01, **options)
    told = everyone([route.name for route in optimizer.routes if route.algorithm == "muon"])
    return worst, hosts.model_equals_masters(chunks, optimizer), sorted({name for names in told for name in names})


def check(ranks: int, setup: Setup, given: dict[str, Any] | None = None, muon: int = 8, **options: Any) -> None:
    for worst, rounded, names in run_ranks(ranks, errors, setup, given or {}, **options):
        assert len(names) == muon
        assert {name: error for name, error in worst.items() if not error < FP32} == {}
        assert rounded, "the model is not its masters, rounded"


def products() -> list[Any]:
    """Every size with either dtype, and with replicas or flat buffers, so that all pairs are met; all products with --all."""
    cases = []
    for k, (tp, dp) in enumerate([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1)]):
        for flat in (False, True):
            for dtype in ("fp32", "bf16"):
                marks = () if (k + flat + (dtype == "bf16")) % 2 == 0 else pytest.mark.more("product")
                name = f"{tp}-{dp}-{'distributed_optimizer' if flat else 'replicas'}-{dtype}"
                cases.append(pytest.param(tp, dp, flat, dtype, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("tp", "dp", "flat", "dtype"), products())
def test_every_update_equals_the_reference(tp: int, dp: int, flat: bool, dtype: str) -> None:
    """TP 4 is above the two query groups, which it cuts in the middle; flat buffers cut matrices at arbitrary elements."""
    check(tp * dp, Setup(tp=tp, dtype=dtype, distributed_optimizer=flat))


FLAT = Setup(distributed_optimizer=True)
MORE = {
    "pipeline": (2, Setup(pp=2, micro_batches=2), 8),
    "pipeline, tied embeddings": (4, dataclasses.replace(FLAT, pp=2, micro_batches=2, tied=True, dtype="bf16"), 8),
    "two micro-batches": (2, dataclasses.replace(FLAT, micro_batches=2), 8),
    "overlap": (2, dataclasses.replace(FLAT, overlap=True, dtype="bf16"), 8),
    "sequence parallel": (2, Setup(tp=2, sequence_parallel=True), 8),
    "without a gate": (2, Setup(tp=2, gated=False), 8),
    "a query group for every head": (4, Setup(tp=2, groups=4), 8),
    "multi-latent attention": (4, dataclasses.replace(FLAT, tp=2, mla=True), 14),
    "experts": (2, Setup(ep=2, experts=4), 2 * (2 + 1 + 4 * 2)),
    "experts in flat buffers": (4, dataclasses.replace(FLAT, ep=2, experts=4, dtype="bf16"), 22),
    "experts with tensor parallelism of their own": (
        4,
        dataclasses.replace(FLAT, tp=2, ep=2, etp=1, experts=4, sequence_parallel=True),
        22,
    ),
    "experts that tensor parallelism cuts": (2, Setup(tp=2, experts=4, sequence_parallel=True), 22),
    "experts on one pipeline stage only": (2, Setup(pp=2, ep=1, experts=4, dense_layers=1, micro_batches=2), 4 + 2 + 1 + 4 * 2),
    "experts on one of two stages, flat": (
        4,
        dataclasses.replace(FLAT, pp=2, ep=2, experts=4, dense_layers=1, micro_batches=2),
        4 + 2 + 1 + 4 * 2,
    ),
    "several optimizer instances": (4, dataclasses.replace(FLAT, instances=2), 8),
}


@pytest.mark.parametrize(("ranks", "setup", "muon"), MORE.values(), ids=MORE)
def test_every_update_equals_the_reference_with(ranks: int, setup: Setup, muon: int) -> None:
    check(ranks, setup, muon=muon)


@pytest.mark.parametrize(
    ("ranks", "setup"), [(2, Setup(tp=2)), (4, dataclasses.replace(FLAT, tp=2)), (3, FLAT)], ids=["tp", "tp, flat", "flat"]
)
def test_every_update_equals_the_reference_where_all_ranks_work_on_slices(ranks: int, setup: Setup) -> None:
    check(ranks, setup, {"muon_placement": "gram"})
    for collectives in run_ranks(ranks, collectives_of_slices, setup):
        assert "allreduce_" in collectives  # Gram matrices


def collectives_of_slices(setup: Setup) -> list[str]:
    return recorded(setup, muon_placement="gram")[3]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fused_projections_as_one_matrix(tp: int) -> None:
    """As Megatron's own Muon takes gate and up, and with --muon-no-split-qkv q, k and v; at any tensor-parallel size."""
    worst, _, _ = run_ranks(tp, fused, Setup(tp=tp))[0]
    assert max(worst.values()) < FP32


def fused(setup: Setup) -> tuple[dict[str, float], bool, list[str]]:
    return errors(setup, {"muon_split_qkv": False, "muon_split_fc1": False}, separate=False)


SCALES = [("unit_rms_norm", "spectral", 1.0), ("shape_scaling", "original", 1.0), ("spectral", "match_rms_adamw", 5.0)]


@pytest.mark.parametrize(("mode", "adjust", "factor"), SCALES)
def test_scales_have_megatrons_meaning(mode: str, adjust: str, factor: float) -> None:
    given = {"muon_scale_mode": mode, "muon_extra_scale_factor": 0.2, "muon_nesterov": False, "muon_momentum": 0.9}
    worst, _, _ = run_ranks(2, scaled, Setup(tp=2), given, adjust, 0.2 * factor)[0]
    assert max(worst.values()) < FP32


def scaled(setup: Setup, given: dict[str, Any], adjust: str, scale: float) -> tuple[dict[str, float], bool, list[str]]:
    reference = {"adjust_lr_fn": adjust, "nesterov": False, "momentum": 0.9}
    return errors(setup, given, scale=scale, reference=reference)


def whole_update(setup: Setup) -> dict[str, Tensor]:
    chunks, optimizer = hosts.start(setup)
    before = hosts.values_of(chunks, optimizer)
    hosts.set_rates(optimizer, 0.05)
    hosts.train_step(setup, chunks, optimizer, 0)
    after = hosts.values_of(chunks, optimizer)
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("flat", [False, True], ids=["replicas", "distributed_optimizer"])
def test_the_update_is_the_same_at_tp_1_2_4(flat: bool) -> None:
    """Gradients differ by the rounding of other sums, which Newton–Schulz magnifies: the bound is ten times that of equal gradients."""
    alone = run_ranks(1, whole_update, Setup(distributed_optimizer=flat))[0]
    for tp in (2, 4):
        update = run_ranks(tp, whole_update, Setup(tp=tp, distributed_optimizer=flat))[0]
        assert update.keys() == alone.keys()
        for name in (name for name, t in alone.items() if t.ndim == 2 and "embedding" not in name and "output" not in name):
            assert (update[name] - alone[name]).norm() < 10 * FP32 * alone[name].norm(), (tp, name)


# ------------------------------------------------------------------------------------------------------ cost


def recorded(setup: Setup, **given: Any) -> tuple[list[tuple[int, ...]], int, int, list[str], int]:
    """Of the second step on this rank: orthogonalised shapes, launches, bytes sent, collectives by name; and momentum's elements."""
    chunks, optimizer = hosts.start(setup, **given)
    hosts.train_step(setup, chunks, optimizer, 0)
    (inside,) = optimizer.inside
    for piece in inside.pieces:
        piece.tensor.grad = torch.randn(piece.tensor.shape, generator=torch.Generator().manual_seed(5 * dist.get_rank()))
    with Recorder() as recorder, Collectives() as collectives:
        inside.step()
    launches = sum(kind == "launch" for kind, _ in recorder.events)
    held = sum(state["momentum_buffer"].numel() for state in inside.state.values() if "momentum_buffer" in state)
    return recorder.matrices, launches, recorder.bytes_sent, collectives.names, held


# q, k, v, proj, gate, up, fc2 of every layer
SHAPES = [(24, 24), (12, 24), (12, 24), (24, 24), (40, 24), (40, 24), (24, 40)]
NUMEL = sum(m * n for m, n in SHAPES)


@pytest.mark.parametrize(
    ("ranks", "setup"),
    [(2, Setup(tp=2)), (2, dataclasses.replace(FLAT, layers=3)), (4, dataclasses.replace(FLAT, tp=2)), (4, Setup(tp=2)), (4, Setup(tp=4))],
    ids=["tp2", "dp2 flat", "tp2 dp2 flat", "tp2 dp2", "tp4"],
)
def test_every_matrix_is_orthogonalised_once_and_only_pieces_travel(ranks: int, setup: Setup) -> None:
    found = run_ranks(ranks, recorded, setup)
    matrices = [shape for shapes, *_ in found for shape in shapes]
    assert sorted(matrices) == sorted(SHAPES * setup.layers)
    for _, launches, _, names, _ in found:
        assert launches == 2  # one bucket: to the owners and back
        # nothing is gathered; what is reduced is the count of updates that were left out
        assert sorted(names) == ["allreduce_", "alltoall_base_", "alltoall_base_"]
    numel = setup.layers * NUMEL
    copies = 1 if setup.distributed_optimizer else ranks // setup.tp
    # there, from one copy of a piece each; back, to all of them; fp32. What an owner already has doesn't travel
    assert sum(sent for _, _, sent, _, _ in found) < 4 * numel * (1 + copies)
    assert sum(held for *_, held in found) == numel * copies
    if setup.distributed_optimizer:  # momentum is cut like the buffers: evenly, but for padding
        assert max(held for *_, held in found) < 1.2 * numel / ranks


def kernels_on_a_cpu() -> str:
    try:
        recorded(Setup(tp=1), muon_symmetric_kernels=16)
    except ValueError as error:
        return str(error)
    return "trained"


def test_kernels_reach_the_step_and_are_refused_on_a_cpu() -> None:
    assert "symmetric_kernels needs a CUDA device" in run_ranks(1, kernels_on_a_cpu)[0]


def launches_in_small_buckets() -> int:
    return recorded(Setup(tp=2), muon_bucket_mb=0.01)[1]


def test_the_bucket_size_is_what_was_asked_for() -> None:
    for launches in run_ranks(2, launches_in_small_buckets):
        assert launches > 4


def traffic(setup: Setup) -> int:
    return recorded(setup)[2]


def test_flat_buffers_send_cut_matrices_only() -> None:
    """The owner of a matrix is the rank that has most of it; most matrices lie whole on one rank and don't travel."""
    sent = sum(run_ranks(2, traffic, dataclasses.replace(FLAT, layers=5)))
    assert 0 < sent <= 4 * 2 * 40 * 24  # one is cut; less than half of it goes to the owner, and as much comes back


# ------------------------------------------------------------------------------------------------ steps left out


def poisoned(setup: Setup, culprit: int) -> tuple[bool, Any, int, bool, Any]:
    """A step with a gradient that is not finite on one rank, and the next one."""
    chunks, optimizer = hosts.start(setup)
    hosts.train_step(setup, chunks, optimizer, 0)
    held = [inside.state_dict()["state"] for inside in optimizer.inside]
    kept = [{k: {key: v.clone() for key, v in state.items()} for k, state in each.items()} for each in held]
    before = hosts.values_of(chunks, optimizer)
    prepare = optimizer.prepare_grads

    def with_nan() -> bool:
        found = prepare()
        if dist.get_rank() == culprit:
            optimizer.inside[-1].pieces[0].tensor.grad.view(-1)[0] = float("nan")
        return bool(found)

    optimizer.prepare_grads = with_nan
    _, (stepped, _, _) = hosts.train_step(setup, chunks, optimizer, 1)
    optimizer.prepare_grads = prepare
    after = hosts.values_of(chunks, optimizer)
    untouched = all(torch.equal(before[name], after[name]) for name in before) and all(
        torch.equal(value, inside.state_dict()["state"][k][key])
        for inside, each in zip(optimizer.inside, kept, strict=True)
        for k, state in each.items()
        for key, value in state.items()
    )
    _, again = hosts.train_step(setup, chunks, optimizer, 2)
    return untouched, stepped, optimizer.skipped_steps, bool(again[0]), again[1]


@pytest.mark.parametrize(
    ("ranks", "setup", "culprit"),
    [(2, Setup(tp=2), 1), (2, FLAT, 0), (2, Setup(pp=2, micro_batches=2), 0), (2, Setup(ep=2, experts=4), 1)],
    ids=["tp2", "flat", "pp2", "experts"],
)
def test_a_gradient_that_is_not_finite_leaves_the_step_out_everywhere(ranks: int, setup: Setup, culprit: int) -> None:
    for untouched, stepped, skipped, again, norm in run_ranks(ranks, poisoned, setup, culprit):
        assert untouched and not stepped and skipped == 1
        assert again and norm > 0


def overflowed() -> tuple[list[bool], float, bool]:
    setup = Setup(dtype="fp16", tp=2)
    chunks, optimizer = hosts.start(setup, initial_loss_scale=2.0**40, min_loss_scale=1.0, hysteresis=1, loss_scale_window=1000)
    before = hosts.values_of(chunks, optimizer)
    stepped, moved = [], []
    for k in range(40):
        hosts.set_rates(optimizer, 1e-3)
        stepped.append(bool(hosts.train_step(setup, chunks, optimizer, k)[1][0]))
        after = hosts.values_of(chunks, optimizer)
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
        before = after
    momentum = [s["momentum_buffer"] for i in optimizer.inside for s in i.state.values() if "momentum_buffer" in s]
    return [a == b for a, b in zip(stepped, moved, strict=True)], sum(stepped) / len(stepped), all(t.isfinite().all() for t in momentum)


def test_a_loss_scale_that_overflows_never_reaches_the_momentum() -> None:
    for agree, share, finite in run_ranks(2, overflowed):
        assert all(agree) and finite
        assert 0 < share < 1  # some steps overflowed, later ones did not


# ------------------------------------------------------------------------------------------------------- Megatron's ways


def as_megatron_does() -> dict[str, Any]:
    import muon_dist.integrations.megatron as ours
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    setup = dataclasses.replace(FLAT, dtype="bf16")
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    adam = megatron_optimizer.get_megatron_optimizer(hosts.optimizer_config(setup, OptimizerConfig), chunks)
    config = hosts.optimizer_config(setup, OptimizerConfig, optimizer="muon_dist", log_num_zeros_in_grad=True)
    optimizer = megatron_optimizer.get_megatron_optimizer(config, chunks)
    provided = hosts.optimizer_config(setup, ours.MuonDistConfig).provide(chunks, config_overrides={}, use_gloo_process_groups=True)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3e-3,
        min_lr=0.0,
        lr_warmup_steps=4,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    rates, zeros = [], None
    for k in range(4):
        zeros = hosts.train_step(setup, chunks, optimizer, k)[1][2]
        scheduler.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
    return {
        "adam": type(adam).__name__,
        "ours": [type(optimizer).__name__, type(provided).__name__],
        "wrappers": [[type(o).__name__ for o in each.chained_optimizers] for each in (adam, optimizer)],
        "groups": [[sorted(set(g) - {"params"}) for g in each.param_groups] for each in (adam, optimizer)],
        "rates": rates,
        "decays": sorted({g["weight_decay"] for g in optimizer.param_groups}),
        "zeros": zeros,
    }


def test_it_is_what_megatron_expects_of_an_optimizer() -> None:
    for told in run_ranks(2, as_megatron_does):
        assert told["adam"] == "ChainedOptimizer" and told["ours"] == ["MuonDistOptimizer"] * 2
        assert told["wrappers"] == [["DistributedOptimizer"], ["FlatBuffers"]]
        assert told["groups"][0] == told["groups"][1]
        assert told["rates"] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3])
        assert told["decays"] == [0.0, 0.1]
        assert isinstance(told["zeros"], (int, float)) and told["zeros"] >= 0


def two_rates() -> tuple[float, float]:
    """The largest update of a matrix, over what it is with the common rate; and of a norm."""
    sizes = []
    for given in ({}, {"muon_lr": 6e-3}):
        setup = Setup()
        chunks, optimizer = hosts.start(setup, **given)  # lr is 3e-3
        before = hosts.values_of(chunks, optimizer)
        hosts.set_rates(optimizer, 1.5e-3)  # half way through the schedule
        hosts.train_step(setup, chunks, optimizer, 0)
        after = hosts.values_of(chunks, optimizer)
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        sizes.append([(after[n] - before[n]).norm().item() for n in (name, "decoder.final_layernorm.weight")])
    return sizes[1][0] / sizes[0][0], sizes[1][1] / sizes[0][1]


def test_muon_lr_is_the_peak_rate_of_matrices_only() -> None:
    matrix, norm = run_ranks(1, two_rates)[0]
    assert matrix == pytest.approx(2, rel=1e-4) and norm == 1


def changed_by_hand(reload: bool) -> str:
    setup = dataclasses.replace(FLAT, dtype="bf16")
    chunks, optimizer = hosts.start(setup)
    with torch.no_grad():
        for p in chunks[0].parameters():
            p.mul_(1.5)
    if reload:
        optimizer.reload_model_params()
    try:
        hosts.train_step(setup, chunks, optimizer, 0)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_that_the_masters_do_not_have_are_refused_by_name() -> None:
    for message in run_ranks(2, changed_by_hand, False):
        assert "weight has other values" in message and "reload_model_params()" in message
    assert run_ranks(2, changed_by_hand, True) == ["", ""]
