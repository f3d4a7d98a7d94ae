"""launch/train_gpt.py --engine megatron, with either megatron-core: the same run at any tensor-parallel size, saved and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .jobs import LOGS, SIZE, SMALL, losses, train

FLAGS = [*SMALL, "--engine", "megatron", "--save-every", "4", "--eval-every", "4"]


def test_a_run_does_not_depend_on_tensor_parallelism(tmp_path: Path) -> None:
    for name, ranks, more in (("tp2", 2, ["--tp", "2"]), ("dp2", 2, ["--distributed-optimizer"]), ("one", 1, ["--micro-batch", "4"])):
        train(ranks, [*FLAGS, "--steps", "4", "--adam-lr", "0.002", *more], tmp_path / name)
    one, tp2, dp2 = (losses(tmp_path / name) for name in ("one", "tp2", "dp2"))
    assert sorted(one) == [1, 2, 3, 4] and one[4] < one[1]
    for step, loss in one.items():
        assert tp2[step] == pytest.approx(loss, rel=1e-5) and dp2[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.more("repeat")
@pytest.mark.parametrize("more", [["--optimizer", "adamw"], ["--precision", "bf16", "--ns-steps", "5"]], ids=["adamw", "bf16"])
def test_other_optimizers_and_precisions(more: list[str], tmp_path: Path) -> None:
    flags = [*SIZE, *LOGS, "--batch", "12", "--engine", "megatron", *more]
    train(2, [*flags, "--steps", "4"], tmp_path / "whole")
    train(2, [*flags, "--steps", "6"], tmp_path / "whole")  # goes on
    assert sorted(losses(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6]
