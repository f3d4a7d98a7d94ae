"""Megatron-LM #5394: small gradients made training stall, silently.

The momentum is divided by its norm before Newton–Schulz, but not by less than 1e-7: where clipping, or a loss that is summed and divided by
many tokens, makes gradients smaller than that, what is iterated is far below 1 and so is the update. Still so in 0.19.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks
from . import megatron_theirs as theirs


def random_gradient(name: str, p: Tensor) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name) + p.shape[0]))


def at_two_scales(ours: bool, scale: float) -> float:
    start, setup = hosts.start if ours else theirs.start, Setup(clip=0.0)
    usual = theirs.update(setup, start, random_gradient)
    tiny = theirs.update(setup, start, lambda name, p: scale * random_gradient(name, p))
    return theirs.differs(tiny, usual)


@theirs.needs_theirs
def test_the_fault() -> None:
    assert run_ranks(1, at_two_scales, False, 1e-14)[0] > 0.9  # next to nothing is left of the update


def test_ours() -> None:
    for scale in (1e-7, 1e-14):
        assert run_ranks(1, at_two_scales, True, scale)[0] < 1e-4


def clipped(ours: bool) -> float:
    """Clipping to 1e-13 may not shorten an update, which has no size of its gradient's."""
    start = hosts.start if ours else theirs.start
    return theirs.differs(theirs.update(Setup(clip=1e-13), start), theirs.update(Setup(clip=0.0), start))


@theirs.needs_theirs
def test_the_fault_by_clipping() -> None:
    assert run_ranks(1, clipped, False)[0] > 0.9


def test_ours_with_clipping() -> None:
    assert run_ranks(1, clipped, True)[0] < 1e-4
