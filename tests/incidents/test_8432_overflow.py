"""DeepSpeed #8432: one gradient that was not finite entered the momentum before the step was discarded, and stayed there for ever.

In 0.19.8 momentum is guarded, but where DeepSpeed does not look at gradients (stage 0 in fp32, and bf16 without `check_grad_overflow`)
the step is taken and every weight is lost.
"""

from typing import Any

import pytest
from torch import distributed as dist

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def spoiled(stage: int, dtype: str, bf16: dict[str, Any]) -> tuple[int, int, int]:
    """Weights that are not finite after one bad gradient on one rank and three good steps: theirs, ours; and what ours says."""
    counts, skipped = [], 0
    for make in (theirs.config, hosts.config):
        ds_config = make(stage, dtype=dtype)
        ds_config.get("bf16", {}).update(bf16)
        engine = hosts.start(ds_config)
        for k in range(4):
            loss = engine(hosts.batch(k, dist.get_rank()))
            engine.backward(loss * float("nan") if k == 1 and dist.get_rank() == 0 else loss)
            engine.step()
        counts.append(sum(int((~t.isfinite()).sum()) for t in theirs.whole(engine).values()))
        skipped = getattr(engine.basic_optimizer, "skipped_steps", 0)
    return counts[0], counts[1], skipped


@pytest.mark.parametrize(
    ("stage", "dtype", "bf16"), [(0, "fp32", {}), (1, "bf16", {"check_grad_overflow": False}), (2, "bf16", {"check_grad_overflow": False})]
)
def test_one_bad_gradient_costs_one_step(stage: int, dtype: str, bf16: dict[str, Any]) -> None:
    for fault, ours, skipped in run_ranks(2, spoiled, stage, dtype, bf16):
        assert fault > 1000
        assert (ours, skipped) == (0, 1)


def scaled(stage: int) -> tuple[list[bool], bool, float]:
    """fp16: the loss overflows once; DeepSpeed leaves that step out and lowers its scale."""
    ds_config = hosts.config(stage, dtype="fp16")
    ds_config["fp16"]["hysteresis"] = 1
    engine = hosts.start(ds_config)
    skipped, unchanged = [], False
    for k in range(4):
        before = theirs.whole(engine)
        loss = engine(hosts.batch(k, dist.get_rank()))
        engine.backward(loss * 1e38 if k == 1 and dist.get_rank() == 0 else loss)
        engine.step()
        skipped.append(bool(engine.optimizer.overflow))
        if k == 1:
            unchanged = all(bool((before[name] == t).all()) for name, t in theirs.whole(engine).items())
    state = engine.basic_optimizer.state.values()
    worst = max(float(entry["momentum_buffer"].abs().max()) for entry in state if "momentum_buffer" in entry)
    return skipped, unchanged, worst


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_fp16_overflow_touches_no_state(stage: int) -> None:
    for skipped, unchanged, worst in run_ranks(2, scaled, stage):
        assert skipped == [False, True, False, False] and unchanged
        assert 0 < worst < 10
