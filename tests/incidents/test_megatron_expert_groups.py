"""megatron-core 0.16.1: with more than one group of expert parameters, every other one was treated as dense.

`get_megatron_muon_optimizer` moved the experts' groups from a list while it walked over it, which skips the group after each that is
moved: the norm of their gradients was then taken over the wrong ranks. The loop is repeated here on the groups that Megatron makes.
"""

from __future__ import annotations

from typing import Any

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup
from ..ranks import run_ranks

SETUP = Setup(ep=2, experts=4, distributed_optimizer=True)


def overrides() -> dict[Any, Any]:
    """Another weight decay for one of the experts' two weights: two groups of experts."""
    from megatron.core.optimizer.optimizer_config import ParamKey

    return {ParamKey(name="*local_experts*linear_fc2*"): {"wd_mult": 0.5}}


def left_among_dense() -> int:
    """MARKED BROKEN VARIANT: the loop of 0.16.1."""
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups

    hosts.initialize(SETUP)
    chunks = hosts.make_model(SETUP)
    groups = _get_param_groups(chunks, hosts.optimizer_config(SETUP, OptimizerConfig), overrides())
    experts = []
    for group in groups:
        if group["is_expert_parallel"]:
            experts.append(group)
            groups.remove(group)
    return sum(group["is_expert_parallel"] for group in groups)


def test_the_fault() -> None:
    assert run_ranks(2, left_among_dense) == [1, 1]


def ours() -> tuple[list[list[bool]], dict[str, float]]:
    from muon_dist.integrations.megatron import MuonDistConfig, get_muon_dist_optimizer

    hosts.initialize(SETUP)
    chunks = hosts.make_model(SETUP)
    config = hosts.optimizer_config(SETUP, MuonDistConfig, **hosts.PLAIN)
    optimizer = get_muon_dist_optimizer(config, chunks, config_overrides=overrides())
    groups = [[g["is_expert_parallel"] for g in wrapper.param_groups if g["params"]] for wrapper in optimizer.chained_optimizers]
    return groups, hosts.update_errors(SETUP, chunks, optimizer, steps=2, lr=0.05)


def test_ours() -> None:
    for groups, errors in run_ranks(2, ours):
        assert groups == [[False], [True, True]]
        assert max(errors.values()) < 2e-5
