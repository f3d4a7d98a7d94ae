"""DeepSpeed #8609: a Muon checkpoint could not be converted to a universal one: KeyError 'exp_avg'.

The converter looks for Adam's averages by name. Still so in 0.19.8 for DeepSpeed's own Muon. Ours saves momentum under that name, too.
"""

from pathlib import Path

import pytest

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from ..test_deepspeed_checkpoints import convert
from . import theirs


def saved(stage: int, folder: str) -> None:
    for name, make in (("theirs", theirs.config), ("ours", hosts.config)):
        engine = hosts.start(make(stage))
        hosts.train_step(engine, 0)
        engine.save_checkpoint(f"{folder}/{name}", tag="saved")


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_convert(stage: int, tmp_path: Path) -> None:
    run_ranks(2, saved, stage, str(tmp_path))
    options = ["--inject_missing_state"] if stage < 3 else []
    fault = convert(tmp_path / "theirs", *options)
    assert fault.returncode != 0 and "KeyError: 'exp_avg'" in fault.stderr
    ours = convert(tmp_path / "ours", *options)
    assert ours.returncode == 0, ours.stderr
    assert {path.parent.name for path in (tmp_path / "ours" / "universal" / "zero").rglob("exp_avg.pt")} >= hosts.MATRICES
