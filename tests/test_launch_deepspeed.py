"""launch/train_gpt.py in DeepSpeed, as a user starts it: under torchrun and under the deepspeed launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SMALL = ["--steps", "8", "--layers", "2", "--width", "32", "--context", "32", "--heads", "2"]


def launch(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(BIN / launcher[0]), *launcher[1:], str(ROOT / "launch" / "train_gpt.py"), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    ("launcher", "config"),
    [
        (["torchrun", "--standalone", "--nproc_per_node", "2"], "zero2"),
        (["deepspeed", "--num_gpus", "2", "--master_port", "29611"], "zero3"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_the_script_trains_in_deepspeed(launcher: list[str], config: str, tmp_path: Path) -> None:
    done = launch(launcher, "--engine", "deepspeed", "--deepspeed_config", f"configs/deepspeed/{config}.json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 ranks on cpu, DeepSpeed, configs/deepspeed/{config}.json" in done.stdout
    ours, adamw = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (ours["optimizer"], ours["lr"], adamw["optimizer"]) == ("MuonDist", 0.004, "AdamW")
    assert len(ours["loss"]) == 8 and ours["loss"][-1] < ours["loss"][0]
    assert 0 < ours["state_bytes_per_rank"] < adamw["state_bytes_per_rank"]  # one momentum instead of two averages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "deepspeed"], "needs --deepspeed_config"),
        (["--deepspeed_config", "configs/deepspeed/zero2.json"], "needs --engine deepspeed"),
        (["--engine", "deepspeed", "--deepspeed_config", "x.json", "--batch", "3"], "train_micro_batch_size_per_gpu"),
    ],
)
def test_arguments_that_contradict_each_other(arguments: list[str], message: str) -> None:
    done = launch(["python"], *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_a_config_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adam.json").write_text('{"optimizer": {"type": "AdamW"}}')
    done = launch(
        ["torchrun", "--standalone", "--nproc_per_node", "1"], "--engine", "deepspeed", "--deepspeed_config", str(tmp_path / "adam.json")
    )
    assert done.returncode != 0 and 'must be of type "MuonDist"' in done.stdout + done.stderr
