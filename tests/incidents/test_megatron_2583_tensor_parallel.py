"""Megatron-LM #2583: the update depended on the tensor-parallel size.

`blockwise`, still the default of --muon-tp-mode in 0.19.2, orthogonalises the shard that a rank holds as if it were the matrix.
"""

from __future__ import annotations

from torch import Tensor

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks
from . import megatron_theirs as theirs


def first_update(setup: Setup, ours: bool) -> dict[str, Tensor]:
    return theirs.update(setup, hosts.start if ours else theirs.start)


@theirs.needs_theirs
def test_the_fault() -> None:
    alone, cut = (run_ranks(tp, first_update, Setup(tp=tp, gated=False), False)[0] for tp in (1, 2))
    assert theirs.differs(cut, alone) > 0.2


def test_ours() -> None:
    alone = run_ranks(1, first_update, Setup(), True)[0]
    for tp in (2, 4):
        assert theirs.differs(run_ranks(tp, first_update, Setup(tp=tp), True)[0], alone) < 2e-4
