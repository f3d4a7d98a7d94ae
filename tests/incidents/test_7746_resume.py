"""DeepSpeed #7746, #8433: a resumed run got its momentum in another dtype than it was saved in.

It failed at the first step after loading, or went on in another precision. The failure is repaired in 0.19.8; at stage 3 with bf16 a run
still keeps momentum in bf16 until it is resumed and in fp32 afterwards.
"""

from pathlib import Path

import pytest
import torch

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def dtypes(stage: int, folder: str) -> list[tuple[set[torch.dtype], set[torch.dtype]]]:
    """Of momentum after a step and after another one in a resumed run: theirs, ours."""
    result = []
    for name, make in (("theirs", theirs.config), ("ours", hosts.config)):
        seen = []
        for resume in (False, True):
            engine = hosts.start(make(stage, dtype="bf16"))
            if resume:
                engine.load_checkpoint(f"{folder}/{name}")
            hosts.train_step(engine, 0)
            state = engine.basic_optimizer.state.values()
            seen.append({entry["momentum_buffer"].dtype for entry in state if "momentum_buffer" in entry})
            if not resume:
                engine.save_checkpoint(f"{folder}/{name}")
        result.append((seen[0], seen[1]))
    return result


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_momentum_is_fp32_before_and_after(stage: int, tmp_path: Path) -> None:
    for fault, ours in run_ranks(2, dtypes, stage, str(tmp_path)):
        if stage == 3:
            assert fault == ({torch.bfloat16}, {torch.float32})
        assert ours == ({torch.float32}, {torch.float32})
