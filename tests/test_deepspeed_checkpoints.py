"""Checkpoints of DeepSpeed engines with MuonDist: resumed runs repeat uninterrupted ones, universal checkpoints change the world size."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from . import deepspeed_hosts as hosts
from .ranks import run_ranks

ADAPTIVE = {"ns_steps": "adaptive", "burn_in": 2, "measure_every": 2}


def start(stage: int, dtype: str, tp: int, **more: Any) -> Any:
    parallel = {"tensor_parallel": hosts.tensor_parallel(tp)} if tp > 1 else {}
    zero = {"sub_group_size": 150} if stage == 3 else {}
    return hosts.start(hosts.config(stage, dtype=dtype, params=ADAPTIVE, zero=zero, **parallel, **more))


def everything(engine: Any) -> dict[str, Tensor]:
    """Masters, momentum, AdamW's averages and spectra, whole."""
    optimizer = engine.basic_optimizer
    result = {f"{name}: value": t for name, t in hosts.values_of(engine).items()}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        whole = hosts.gather_whole(engine, lambda s, p, key=key: hosts.piece_of(s, p, optimizer.state[s.tensor].get(key)))
        result.update({f"{name}: {key}": t for name, t in whole.items()})
    for key, by_name in optimizer.of_matrices.items():
        result.update({f"{name}: {key}": value.nan_to_num(-1.0) for name, value in by_name.items()})
    for store in optimizer.stores:
        if optimizer.param_groups[store.group]["algorithm"] == "adamw":
            result["step"] = optimizer.state[store.tensor]["step"]
    return result


def uninterrupted(stage: int, dtype: str, tp: int, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was saved after five steps, and what became of it after three more."""
    engine = start(stage, dtype, tp)
    for k in range(5):
        hosts.train_step(engine, k)
    engine.save_checkpoint(folder, tag="saved")
    saved = everything(engine)
    for k in range(5, 8):
        hosts.train_step(engine, k)
    return saved, everything(engine)


def resumed(stage: int, dtype: str, tp: int, folder: str, universal: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = start(stage, dtype, tp, **({"checkpoint": {"load_universal": True}} if universal else {}))
    engine.load_checkpoint(folder, tag=None if universal else "saved")
    engine.optimizer.state_dict()  # takes over what was loaded
    loaded = everything(engine)
    for k in range(5, 8):
        hosts.train_step(engine, k)
    return loaded, everything(engine)


MORE = pytest.mark.more("product")
WHERE = [
    pytest.param(0, "fp32", 1, marks=MORE),
    (0, "bf16", 1),
    pytest.param(1, "bf16", 1, marks=MORE),
    (1, "bf16_fp32", 1),
    (2, "fp32", 1),
    pytest.param(3, "fp32", 1, marks=MORE),
    pytest.param(3, "bf16", 1, marks=MORE),
    (1, "fp32", 2),
    (3, "bf16", 2),
]


@pytest.mark.parametrize(("stage", "dtype", "tp"), WHERE)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(stage: int, dtype: str, tp: int, tmp_path: Path) -> None:
    for (saved, end), (loaded, again) in zip(
        run_ranks(2, uninterrupted, stage, dtype, tp, str(tmp_path), fresh=True),
        run_ranks(2, resumed, stage, dtype, tp, str(tmp_path), False, fresh=True),
        strict=True,
    ):
        assert saved.keys() == loaded.keys() and end.keys() == again.keys()
        assert len(end) == 12 + 4 + 2 * 8 + 4 + 1  # values, momentum, averages, spectra, count
        for name in saved:
            assert torch.equal(saved[name], loaded[name]), name
        for name in end:
            assert torch.equal(end[name], again[name]), name


def convert(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    folders = ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "universal")]
    done = subprocess.run([*command, *folders, *options], capture_output=True, text=True, env=environment, timeout=120)
    (folder / "latest_universal").write_text("universal")
    return done


# (stage, dtype, ranks, tp) it was saved at, and (stage, ranks, tp) it is loaded at
ELSEWHERE = [
    pytest.param((1, "fp32", 2, 1), (2, 3, 1), marks=MORE),
    pytest.param((2, "bf16", 2, 1), (2, 4, 1), marks=MORE),
    ((1, "bf16_fp32", 2, 1), (1, 1, 1)),
    ((1, "fp32", 2, 1), (1, 4, 2)),
    pytest.param((1, "bf16", 4, 2), (1, 2, 1), marks=MORE),
    pytest.param((3, "bf16", 2, 1), (3, 3, 1), marks=MORE),
    ((3, "fp32", 4, 2), (3, 2, 1)),
]


@pytest.mark.parametrize(("saved_at", "loaded_at"), ELSEWHERE)
def test_universal_checkpoints_load_at_another_world_size(
    saved_at: tuple[int, str, int, int], loaded_at: tuple[int, int, int], tmp_path: Path
) -> None:
    (stage, dtype, n, tp), (new_stage, new_n, new_tp) = saved_at, loaded_at
    saved, end = run_ranks(n, uninterrupted, stage, dtype, tp, str(tmp_path))[0]
    done = convert(tmp_path, *(["--inject_missing_state"] if stage < 3 and tp == 1 else []))
    assert done.returncode == 0, done.stderr
    loaded, again = run_ranks(new_n, resumed, new_stage, dtype, new_tp, str(tmp_path), True)[0]
    assert saved.keys() == loaded.keys()
    for name in saved:
        assert torch.equal(saved[name], loaded[name]), name
    if n // tp == new_n // new_tp and dtype == "fp32":  # the same data, and no rounding of bf16 that grows
        for name in (name for name in end if name.endswith("momentum_buffer")):
            assert (end[name] - again[name]).norm() < 1e-2 * end[name].norm()


def load_another(folder: str) -> str:
    ds_config = hosts.config(0)  # under ZeRO, DeepSpeed finds before us that the groups differ
    ds_config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    other = hosts.start(ds_config)
    hosts.train_step(other, 0)
    other.save_checkpoint(folder, tag="saved")
    engine = hosts.start(hosts.config(0))
    try:
        engine.load_checkpoint(folder, tag="saved")
    except ValueError as error:
        engine.load_checkpoint(folder, tag="saved", load_optimizer_states=False)
        hosts.train_step(engine, 0)
        return str(error)
    return ""


def test_the_state_of_another_optimizer_is_not_taken_for_ours(tmp_path: Path) -> None:
    for message in run_ranks(2, load_another, str(tmp_path)):
        assert "is not MuonDist's" in message and "load_optimizer_states=False" in message


def before_the_first_step(stage: int, folder: str) -> bool:
    engine = start(stage, "fp32", 1)
    engine.save_checkpoint(folder, tag="saved")
    hosts.train_step(engine, 0)
    again = start(stage, "fp32", 1)
    again.load_checkpoint(folder, tag="saved")
    hosts.train_step(again, 0)
    ours, theirs = everything(engine), everything(again)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_of_step_zero(stage: int, tmp_path: Path) -> None:
    assert all(run_ranks(2, before_the_first_step, stage, str(tmp_path)))


def reads_state(stage: int) -> list[tuple[bool, bool]]:
    """DeepSpeed's own access to state shows ours, for every parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = hosts.start(hosts.config(stage))
    hosts.train_step(engine, 0)
    momentum = hosts.gather_whole(engine, lambda s, p: hosts.piece_of(s, p, engine.basic_optimizer.state[s.tensor].get("momentum_buffer")))
    averages = hosts.gather_whole(engine, lambda s, p: hosts.piece_of(s, p, engine.basic_optimizer.state[s.tensor].get("exp_avg")))
    result = []
    for name, p in engine.module.named_parameters():
        ours = momentum[name] if name in momentum else averages[name]
        theirs = safe_get_full_optimizer_state(p, "momentum_buffer" if name in momentum else "exp_avg")
        result.append((torch.equal(ours, theirs), bool(ours.any())))
    return result


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_reads_the_state_of_every_group(stage: int) -> None:
    for checks in run_ranks(2, reads_state, stage):
        assert checks == [(True, True)] * 12


def monitored(folder: str, telemetry: str | None) -> dict[str, Any]:
    params = {**ADAPTIVE, **({"telemetry_dir": telemetry} if telemetry else {})}
    engine = hosts.start(hosts.config(1, params=params, csv_monitor={"enabled": True, "output_path": folder, "job_name": "job"}))
    for k in range(9):
        hosts.train_step(engine, k)
    return {name: (shape, len(schedule)) for name, (shape, schedule) in engine.basic_optimizer.schedules.items()}


@pytest.mark.parametrize("lines", [False, True])
def test_measurements_reach_deepspeeds_monitor(lines: bool, tmp_path: Path) -> None:
    schedules = run_ranks(2, monitored, str(tmp_path), str(tmp_path / "lines") if lines else None)[0]
    for name, (_, steps) in schedules.items():
        [path] = (tmp_path / "job").glob(f"*muon_dist_{name}_ns_steps.csv")
        rows = list(csv.reader(path.open()))[1:]
        assert rows and float(rows[-1][1]) == steps and int(rows[-1][0]) % (3 * 2) == 0  # at a count of samples
    if lines:
        from muon_dist.telemetry import read_run

        found = read_run(tmp_path / "lines")
        assert {line["name"] for line in found} == set(schedules)
        assert {line["params"] for line in found} == {sum(p.numel() for p in hosts.make_net().parameters())}


def names_and_depths() -> set[float]:
    engine = start(3, "fp32", 1)
    hosts.train_step(engine, 0)
    assert len(engine.basic_optimizer.engines) > 3  # sub-groups, which know nothing of each other
    bound = [b for each in engine.basic_optimizer.engines for d in each.domains for b in d.parameters if b.travels]
    dist.barrier()
    return {b.depth for b in bound}


def test_sub_groups_know_how_deep_the_model_is() -> None:
    assert run_ranks(2, names_and_depths)[0] == {0.25, 0.5, 0.75, 1.0}
