"""The split of q, k and v was skipped, silently, where the tensor-parallel size is above the number of query groups.

A rank's rows of the fused weight then hold a part of one group, so its size doesn't divide into q, k and v; 0.19.2 says so in a debug
message and orthogonalises the fused matrix as a whole: another update than at a smaller tensor-parallel size, in every mode.
"""

from __future__ import annotations

from torch import Tensor

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks
from . import megatron_theirs as theirs

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


def first_update(setup: Setup, ours: bool) -> dict[str, Tensor]:
    found = theirs.update(setup, hosts.start) if ours else theirs.update(setup, theirs.start, muon_tp_mode="duplicated")
    return {QKV: found[QKV]}


def two_and_four(ours: bool) -> tuple[float, float]:
    """What TP 2 and TP 4 change, with two query groups."""
    one, two, four = (run_ranks(tp, first_update, Setup(tp=tp, groups=2, gated=False), ours)[0] for tp in (1, 2, 4))
    return theirs.differs(two, one), theirs.differs(four, one)


@theirs.needs_theirs
def test_the_fault() -> None:
    two, four = two_and_four(False)
    assert two > 0.2 or four > 0.2
    assert four > 0.2


def test_ours() -> None:
    assert max(two_and_four(True)) < 2e-4
