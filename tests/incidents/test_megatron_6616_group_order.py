"""Megatron-LM #6616: ranks that met in collectives by the order of their parameter groups hung, or summed different parameters.

The order came from sets and dicts that differ between ranks. Here ranks agree on an order by names, and on the plan before the first step.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks


def met_by_order() -> bool:
    """MARKED BROKEN VARIANT: whether parameters averaged in the groups' order are still those of their names."""
    parameters = {"a": torch.full((2, 2), 1.0), "b": torch.full((2, 2), 5.0)}
    order = list(parameters) if dist.get_rank() == 0 else list(parameters)[::-1]
    for name in order:
        dist.all_reduce(parameters[name])
    return bool((parameters["a"] == 2).all())


def test_the_fault() -> None:
    assert run_ranks(2, met_by_order) == [False, False]


def shuffled(setup: Setup) -> float:
    """The worst error of an update where one rank has its groups, and what is in them, the other way round."""
    chunks, optimizer = hosts.start(setup)
    if dist.get_rank() == 1:
        for inside in optimizer.inside:
            inside.pieces.reverse()
            inside.described = dict(reversed(list(inside.described.items())))
    return max(hosts.update_errors(setup, chunks, optimizer, steps=2, lr=0.05).values())


@pytest.mark.parametrize("setup", [Setup(tp=2), Setup(distributed_optimizer=True)], ids=["tp2", "flat"])
def test_ours(setup: Setup) -> None:
    for error in run_ranks(2, shuffled, setup):
        assert error < 2e-5
