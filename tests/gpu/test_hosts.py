"""DeepSpeed engines and a Megatron model on a GPU, where they are installed: every update is the reference's, given the same gradients."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ..ranks import run_ranks

FP32 = 2e-5
EXACT = {"compute_dtype": "fp32", "wire_dtype": "fp32"}


def in_deepspeed(stage: int) -> dict[str, float]:
    from .. import deepspeed_hosts as hosts

    ds_config = hosts.config(stage, dtype="bf16", params=EXACT)
    return hosts.update_errors(hosts.start(ds_config), ds_config["optimizer"]["params"], 2)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_in_deepspeed(stage: int) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    [errors] = run_ranks(1, in_deepspeed, stage)
    assert max(errors.values()) < FP32


def in_megatron(flat: bool) -> dict[str, float]:
    from .. import megatron_hosts as hosts

    setup = hosts.Setup(dtype="bf16", distributed_optimizer=flat)
    chunks, optimizer = hosts.start(setup, muon_fp32_matmul_prec="highest", muon_wire_dtype="fp32")
    return hosts.update_errors(setup, chunks, optimizer, steps=2, lr=0.05)


@pytest.mark.parametrize("flat", [False, True], ids=["replicas", "distributed_optimizer"])
def test_in_megatron(flat: bool) -> None:
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    [errors] = run_ranks(1, in_megatron, flat)
    assert max(errors.values()) < FP32
