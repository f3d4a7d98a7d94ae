"""Megatron-LM #6688: gate and up of a gated MLP, stored in one weight, were orthogonalised as one matrix.

Each then depends on the other's gradient: where that of up is a hundred times larger, next to nothing is left for gate. Still so in
0.19.2, which splits attention's fused projection only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks
from . import megatron_theirs as theirs

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


def gradient(up: float) -> Callable[[str, Tensor], Tensor]:
    def given(name: str, p: Tensor) -> Tensor:
        result = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name) + p.shape[0]))
        if "linear_fc1" in name:
            result[p.shape[0] // 2 :] *= up
        return result

    return given


def change_of_gate(ours: bool) -> float:
    """How much the update of gate changes when up's gradient is a hundred times larger."""
    start = hosts.start if ours else theirs.start
    usual, larger = (theirs.update(Setup(clip=0.0), start, gradient(up))[FC1].chunk(2)[0] for up in (1.0, 100.0))
    return float((larger - usual).norm() / usual.norm())


@theirs.needs_theirs
def test_the_fault() -> None:
    assert run_ranks(1, change_of_gate, False)[0] > 0.3


def test_ours() -> None:
    assert run_ranks(1, change_of_gate, True)[0] == 0
