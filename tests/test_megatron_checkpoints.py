"""Checkpoints of Megatron models with MuonDist: a resumed run repeats the uninterrupted one, sharded ones load at another DP, TP and PP."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from . import megatron_hosts as hosts
from .megatron_hosts import Setup
from .ranks import run_ranks

ADAPTIVE = {"muon_num_ns_steps": "adaptive", "muon_coefficient_type": None, "muon_burn_in": 2, "muon_measure_every": 2}
SAVED_STEPS, MORE_STEPS = 5, 3


def start(setup: Setup) -> tuple[list[Any], Any]:
    return hosts.start(setup, **ADAPTIVE)


def train(setup: Setup, chunks: list[Any], optimizer: Any, first: int, count: int) -> None:
    for k in range(first, first + count):
        hosts.set_rates(optimizer, 1e-2)
        hosts.train_step(setup, chunks, optimizer, k)


def everything(chunks: list[Any], optimizer: Any) -> dict[str, Tensor]:
    """Masters, momentum, AdamW's averages, spectra of the whole model and the count of steps."""
    result = {f"{name}: value": t for name, t in hosts.values_of(chunks, optimizer).items()}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        whole = hosts.whole_tensors(chunks, optimizer, lambda inside, piece, key=key: inside.state[piece.tensor].get(key))
        result.update({f"{name}: {key}": t for name, t in whole.items()})
    for told in hosts.everyone([inside.of_matrices() for inside in optimizer.inside]):
        for key, by_name in (pair for known in told for pair in known.items()):
            result.update({f"{name}: {key}": value.nan_to_num(-1.0) for name, value in by_name.items()})
    steps = {float(state["step"]) for inside in optimizer.inside for state in inside.state.values()}
    assert len(steps) == 1
    result["step"] = torch.tensor(steps.pop())
    return result


def metadata_of(form: str) -> dict[str, Any]:
    """What Megatron keeps beside a sharded checkpoint."""
    told: dict[str, Any] = {"chained_optim_avoid_prefix": True, "non_homogeneous_layers": True}
    return {**told, **({"distrib_optim_sharding_type": form} if form else {})}


def sharded(chunks: list[Any], optimizer: Any, form: str, *, is_loading: bool) -> dict[str, Any]:
    metadata = metadata_of(form)
    model = chunks[0].module.sharded_state_dict(metadata=metadata)
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)}


def save(chunks: list[Any], optimizer: Any, form: str, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if form == "plain":  # what the format "torch" writes: a file per tensor- and pipeline-parallel rank, and the flat buffers
        path = os.path.join(folder, f"rank{dist.get_rank()}")
        torch.save({"model": chunks[0].state_dict_for_save_checkpoint(), "optimizer": optimizer.state_dict()}, path)
        if hasattr(optimizer.chained_optimizers[0], "data_parallel_group"):
            optimizer.save_parameter_state(os.path.join(folder, f"flat{model_parallel_rank()}"))
    else:
        dist_checkpointing.save(sharded(chunks, optimizer, form, is_loading=False), folder)
    dist.barrier()


def load(chunks: list[Any], optimizer: Any, form: str, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if form == "plain":
        state = torch.load(os.path.join(folder, f"rank{dist.get_rank()}"), weights_only=False)
        chunks[0].load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if hasattr(optimizer.chained_optimizers[0], "data_parallel_group"):
            optimizer.load_parameter_state(os.path.join(folder, f"flat{model_parallel_rank()}"))
    else:
        loaded = dist_checkpointing.load(sharded(chunks, optimizer, form, is_loading=True), folder)
        chunks[0].module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    dist.barrier()


def model_parallel_rank() -> int:
    from megatron.core import parallel_state

    return dist.get_rank(parallel_state.get_model_parallel_group())


def uninterrupted(setup: Setup, form: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was saved after five steps, and what became of it after three more."""
    chunks, optimizer = start(setup)
    train(setup, chunks, optimizer, 0, SAVED_STEPS - 2)
    if setup.pp > 1:  # an earlier checkpoint leaves nothing behind: other stages' spectra are those of now
        os.makedirs(os.path.join(folder, "earlier"), exist_ok=True)
        save(chunks, optimizer, form, os.path.join(folder, "earlier"))
    train(setup, chunks, optimizer, SAVED_STEPS - 2, 2)
    save(chunks, optimizer, form, folder)
    saved = everything(chunks, optimizer)
    train(setup, chunks, optimizer, SAVED_STEPS, MORE_STEPS)
    return saved, everything(chunks, optimizer)


def resumed(setup: Setup, form: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    chunks, optimizer = start(setup)
    load(chunks, optimizer, form, folder)
    loaded = everything(chunks, optimizer)
    train(setup, chunks, optimizer, SAVED_STEPS, MORE_STEPS)
    return loaded, everything(chunks, optimizer)


MORE = pytest.mark.more("product")
FLAT = Setup(distributed_optimizer=True)
SAME = [
    pytest.param(2, Setup(tp=2), "", marks=MORE),
    (2, Setup(tp=2, dtype="bf16"), ""),
    pytest.param(2, FLAT, "fully_reshardable", marks=MORE),
    (2, FLAT, "dp_reshardable"),
    pytest.param(4, dataclasses.replace(FLAT, tp=2, dtype="bf16"), "fully_reshardable", marks=MORE),
    pytest.param(2, Setup(tp=2), "plain", marks=MORE),
    (2, dataclasses.replace(FLAT, dtype="bf16"), "plain"),
    (2, Setup(pp=2, micro_batches=2, dtype="bf16"), ""),
    pytest.param(2, Setup(ep=2, experts=4), "", marks=MORE),
    (2, dataclasses.replace(FLAT, ep=2, experts=4), "fully_reshardable"),
]


@pytest.mark.parametrize(("ranks", "setup", "form"), SAME)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(ranks: int, setup: Setup, form: str, tmp_path: Path) -> None:
    for (saved, end), (loaded, again) in zip(
        run_ranks(ranks, uninterrupted, setup, form, str(tmp_path), fresh=True),
        run_ranks(ranks, resumed, setup, form, str(tmp_path), fresh=True),
        strict=True,
    ):
        assert float(saved["step"]) == SAVED_STEPS and float(end["step"]) == SAVED_STEPS + MORE_STEPS
        for a, b in ((saved, loaded), (end, again)):
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]), name


ELSEWHERE = [
    pytest.param(2, Setup(tp=2), 1, Setup(), "", marks=MORE),
    (1, Setup(dtype="bf16"), 4, Setup(tp=4, dtype="bf16"), ""),
    (2, FLAT, 4, dataclasses.replace(FLAT, tp=2), "fully_reshardable"),
    pytest.param(
        4, dataclasses.replace(FLAT, tp=2, dtype="bf16"), 2, dataclasses.replace(FLAT, dtype="bf16"), "fully_reshardable", marks=MORE
    ),
    (2, FLAT, 3, FLAT, "dp_reshardable"),
    (2, Setup(pp=2, micro_batches=2), 2, Setup(tp=2), ""),
    (2, Setup(ep=2, experts=4), 4, Setup(ep=4, experts=4), ""),
]


@pytest.mark.parametrize(("ranks", "setup", "new_ranks", "new_setup", "form"), ELSEWHERE)
def test_sharded_checkpoints_load_at_another_world_size(
    ranks: int, setup: Setup, new_ranks: int, new_setup: Setup, form: str, tmp_path: Path
) -> None:
    saved, _ = run_ranks(ranks, uninterrupted, setup, form, str(tmp_path))[0]
    loaded, _ = run_ranks(new_ranks, resumed, new_setup, form, str(tmp_path))[0]
    assert saved.keys() == loaded.keys()
    assert sum("spectrum" in name for name in saved) >= 8
    for name in saved:
        assert torch.equal(saved[name], loaded[name]), name


def rerouted(folder: str) -> str:
    chunks, optimizer = start(FLAT)
    train(FLAT, chunks, optimizer, 0, 1)
    save(chunks, optimizer, "fully_reshardable", folder)
    chunks, optimizer = hosts.start(FLAT, **ADAPTIVE, muon_adamw_params=["linear_fc2"])
    try:
        load(chunks, optimizer, "fully_reshardable", folder)
    except ValueError as error:
        return str(error)
    return ""


def test_momentum_is_not_taken_for_adamws_average(tmp_path: Path) -> None:
    for message in run_ranks(2, rerouted, str(tmp_path)):
        assert "linear_fc2.weight was trained by muon when this checkpoint was saved, and goes to adamw now" in message


def load_adams(folder: str) -> str:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    setup = Setup()
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    adam = get_megatron_optimizer(hosts.optimizer_config(setup, OptimizerConfig), chunks)
    hosts.train_step(setup, chunks, adam, 0)
    state = adam.state_dict()
    chunks, optimizer = start(setup)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_the_state_of_another_optimizer_is_not_taken_for_ours(tmp_path: Path) -> None:
    assert "not MuonDist's" in run_ranks(1, load_adams, str(tmp_path))[0]


# ----------------------------------------------------------------------------------------------------------- experts, words

EXPERTS = Setup(pp=2, ep=2, experts=4, dense_layers=1, micro_batches=2)  # the first stage has none


def steps_of_wrappers(setup: Setup, form: str, folder: str, loads: bool) -> list[list[float]]:
    """The step counts that each wrapper's tensors have on this rank, and MuonDist's own of what lies elsewhere."""
    chunks, optimizer = start(setup)
    if loads:
        load(chunks, optimizer, form, folder)
    else:
        train(setup, chunks, optimizer, 0, SAVED_STEPS)
        save(chunks, optimizer, form, folder)
    return [sorted({float(state["step"]) for state in inside.state.values()}) for inside in optimizer.inside]


def test_step_counts_of_experts_survive_where_the_first_stage_has_none(tmp_path: Path) -> None:
    """(With the distributed optimizer Megatron itself can't save such a stage, of Adam neither, where Transformer Engine is missing.)"""
    saved = run_ranks(4, steps_of_wrappers, EXPERTS, "", str(tmp_path), False)
    loaded = run_ranks(4, steps_of_wrappers, EXPERTS, "", str(tmp_path), True)
    assert saved == loaded and [SAVED_STEPS] in saved[3] and any(not steps for steps in saved[0])
    assert {step for rank in loaded for steps in rank for step in steps} == {SAVED_STEPS}


def load_unlike(kind: str, folder: str) -> str:
    """What a run is told that loads a checkpoint which Megatron can't read for it."""
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    saved = FLAT if kind in ("flat into whole", "another lr") else Setup()
    hosts.initialize(saved)
    chunks = hosts.make_model(saved)
    form = "fully_reshardable" if saved.distributed_optimizer else ""
    if kind == "Adam's":
        optimizer = get_megatron_optimizer(hosts.optimizer_config(saved, OptimizerConfig), chunks)
        hosts.train_step(saved, chunks, optimizer, 0)
    else:
        chunks, optimizer = start(saved)
        train(saved, chunks, optimizer, 0, 1)
    save(chunks, optimizer, form, folder)
    setup = FLAT if kind == "whole into flat" else Setup() if kind == "flat into whole" else saved
    chunks, optimizer = hosts.start(setup, **ADAPTIVE, **({"lr": 7e-3, "min_lr": 1e-4} if kind == "another lr" else {}))
    metadata = metadata_of(form)  # the checkpoint's
    try:
        model = chunks[0].module.sharded_state_dict(metadata=metadata)
        wanted = {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)}
        loaded = dist_checkpointing.load(wanted, folder)
        optimizer.load_state_dict(loaded["optimizer"])
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Adam's", "this checkpoint's optimizer state is not MuonDist's in this form"),
        ("flat into whole", "was saved with --use-distributed-optimizer and is loaded without --use-distributed-optimizer"),
        pytest.param(
            "whole into flat", "was saved without --use-distributed-optimizer and is loaded with --use-distributed-optimizer", marks=MORE
        ),
    ],
)
def test_a_checkpoint_that_megatron_cannot_read_is_refused_in_words(kind: str, words: str, tmp_path: Path) -> None:
    for told in run_ranks(2, load_unlike, kind, str(tmp_path)):
        assert words in told and "--no-load-optim" in told


def test_another_learning_rate_is_loaded_or_refused_in_words(tmp_path: Path) -> None:
    """megatron-core 0.19 finds groups by their learning rates, 0.16 doesn't."""
    for told in run_ranks(2, load_unlike, "another lr", str(tmp_path)):
        assert told == "loaded" or "finds a checkpoint's parameter groups by their learning rates" in told
