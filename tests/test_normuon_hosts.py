"""NorMuon under DeepSpeed and Megatron: its update, and what it keeps of matrices in their checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from . import deepspeed_hosts, megatron_hosts
from . import test_deepspeed_checkpoints as deepspeed
from . import test_megatron_checkpoints as megatron
from .megatron_hosts import Setup
from .ranks import run_ranks
from .reference_normuon import BETA2, ReferenceNorMuon

FP32 = 2e-5
PARAMS = {"rule": "normuon", "rule_options": {"beta2": BETA2}}
MEGATRON = {f"muon_{key}": value for key, value in PARAMS.items()}
FLAT = Setup(distributed_optimizer=True)


def under_deepspeed(stage: int, dtype: str) -> dict[str, float]:
    config = deepspeed_hosts.config(stage, dtype=dtype, params=PARAMS, zero={"sub_group_size": 150} if stage == 3 else {})
    engine = deepspeed_hosts.start(config)
    return deepspeed_hosts.update_errors(engine, config["optimizer"]["params"], 3, kind=ReferenceNorMuon)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 3), (3, 2)])
def test_updates_under_deepspeed_equal_the_reference(stage: int, world: int) -> None:
    for errors in run_ranks(world, under_deepspeed, stage, "fp32"):
        assert max(errors.values()) <= FP32


def under_megatron(setup: Setup) -> dict[str, float]:
    chunks, optimizer = megatron_hosts.start(setup, **MEGATRON)
    return megatron_hosts.update_errors(setup, chunks, optimizer, steps=3, lr=1e-2, kind=ReferenceNorMuon)


@pytest.mark.parametrize(("ranks", "setup"), [(2, Setup(tp=2)), (4, dataclasses.replace(FLAT, tp=2)), (2, Setup(pp=2, micro_batches=2))])
def test_updates_under_megatron_equal_the_reference(ranks: int, setup: Setup) -> None:
    for errors in run_ranks(ranks, under_megatron, setup):
        assert max(errors.values()) <= FP32


# ------------------------------------------------------------------------------------------------------------- checkpoints


def with_rule(
    module: ModuleType, own: dict[str, Any], function: Callable[..., Any], *args: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run of another file's tests with this rule."""
    before = module.ADAPTIVE
    module.ADAPTIVE = {**before, **own}  # type: ignore[attr-defined]
    try:
        result: tuple[dict[str, Tensor], dict[str, Tensor]] = function(*args)
        return result
    finally:
        module.ADAPTIVE = before  # type: ignore[attr-defined]


def saved_by_deepspeed(*args: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_rule(deepspeed, PARAMS, deepspeed.uninterrupted, *args)


def loaded_by_deepspeed(*args: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_rule(deepspeed, PARAMS, deepspeed.resumed, *args)


def saved_by_megatron(*args: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_rule(megatron, MEGATRON, megatron.uninterrupted, *args)


def loaded_by_megatron(*args: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_rule(megatron, MEGATRON, megatron.resumed, *args)


def same(saved: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    assert saved.keys() == loaded.keys()
    kept = [name for name in saved if name.endswith("second_momentum")]
    assert len(kept) >= 4 and all(saved[name].min() > 0 for name in kept)
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_deepspeed_checkpoint_is_resumed(stage: int, dtype: str, tmp_path: Path) -> None:
    saved = run_ranks(2, saved_by_deepspeed, stage, dtype, 1, str(tmp_path), fresh=True)
    loaded = run_ranks(2, loaded_by_deepspeed, stage, dtype, 1, str(tmp_path), False, fresh=True)
    for then, now in zip(saved, loaded, strict=True):
        same(then[0], now[0])
        same(then[1], now[1])


@pytest.mark.parametrize(("stage", "world"), [(1, 3), (3, 1)])
def test_a_universal_checkpoint_is_loaded_at_another_world_size(stage: int, world: int, tmp_path: Path) -> None:
    saved, _ = run_ranks(2, saved_by_deepspeed, stage, "fp32", 1, str(tmp_path))[0]
    done = deepspeed.convert(tmp_path, *(["--inject_missing_state"] if stage < 3 else []))
    assert done.returncode == 0, done.stderr
    same(saved, run_ranks(world, loaded_by_deepspeed, stage, "fp32", 1, str(tmp_path), True)[0][0])


@pytest.mark.parametrize(
    ("ranks", "setup", "new_ranks", "new_setup", "form"),
    [(2, FLAT, 4, dataclasses.replace(FLAT, tp=2), "fully_reshardable"), (2, Setup(pp=2, micro_batches=2), 2, Setup(tp=2), "")],
)
def test_a_megatron_checkpoint_is_loaded_at_another_world_size(
    ranks: int, setup: Setup, new_ranks: int, new_setup: Setup, form: str, tmp_path: Path
) -> None:
    saved, _ = run_ranks(ranks, saved_by_megatron, setup, form, str(tmp_path))[0]
    same(saved, run_ranks(new_ranks, loaded_by_megatron, new_setup, form, str(tmp_path))[0][0])


def with_another_rule(folder: str) -> str:
    try:
        megatron.resumed(FLAT, "fully_reshardable", folder)
    except ValueError as error:
        return str(error)
    return ""


def test_megatron_refuses_the_state_of_another_rule(tmp_path: Path) -> None:
    run_ranks(1, saved_by_megatron, FLAT, "fully_reshardable", str(tmp_path))
    assert "saved with --muon-rule normuon, and this run has muon" in run_ranks(1, with_another_rule, str(tmp_path))[0]
