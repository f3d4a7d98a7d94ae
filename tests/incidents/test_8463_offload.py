"""DeepSpeed #8463: with the optimizer on the CPU, training took another way than without.

First nothing was orthogonalised there. In 0.19.8 that is repaired, but with bf16 stages 1 and 2 keep momentum in bf16 on the accelerator
and in fp32 on the CPU, so a run still depends on where its optimizer lives.
"""

import pytest

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs

CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def masters(engine: object) -> dict[str, object]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}  # type: ignore[attr-defined]


def differences(stage: int) -> tuple[float, float]:
    """How far the masters' change with offload is from that without, after three steps: theirs and ours."""
    result = []
    for make in (theirs.config, hosts.config):
        changes = []
        for zero in ({}, CPU):
            engine = hosts.start(make(stage, dtype="bf16", zero=zero))
            before = masters(engine)
            for k in range(3):
                hosts.train_step(engine, k)
            after = masters(engine)
            changes.append({name: after[name] - before[name] for name in sorted(hosts.MATRICES)})
        result.append(theirs.differs(changes[1], changes[0]))
    return result[0], result[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_changes_nothing(stage: int) -> None:
    for fault, ours in run_ranks(2, differences, stage):
        assert fault > 1e-2
        assert ours < 1e-5
