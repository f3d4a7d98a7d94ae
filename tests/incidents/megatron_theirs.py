"""Megatron's own Muon on the model of the other tests, and one update of any optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup

WHY = "Megatron's own Muon needs emerging-optimizers (Python 3.12)"
needs_theirs = pytest.mark.skipif(importlib.util.find_spec("emerging_optimizers") is None, reason=WHY)

SETTINGS = {"muon_momentum": 0.95, "muon_nesterov": True, "muon_fp32_matmul_prec": "highest"}


def start(setup: Setup, **given: Any) -> tuple[list[Any], Any]:
    """A model's chunks and Megatron's Muon for them, in fp32 and with the same polynomials as ours in these tests."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    given = {"optimizer": "muon", "muon_coefficient_type": "simple", **SETTINGS, **given}
    return chunks, get_megatron_optimizer(hosts.optimizer_config(setup, OptimizerConfig, **given), chunks)


def whole_matrices(chunks: list[Any]) -> dict[str, Tensor]:
    """The weights of linear layers, whole and as at TP 1, from the model."""
    from megatron.core import parallel_state

    group, result = parallel_state.get_tensor_model_parallel_group(), {}
    for name, p in chunks[0].named_parameters():
        if p.ndim == 2 and ".layers." in name:
            shards = [torch.empty_like(p) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, p.detach().contiguous(), group=group)
            if "linear_fc1" in name and chunks[0].config.gated_linear_unit:
                shards = [shard.chunk(2)[k] for k in (0, 1) for shard in shards]
            cut = getattr(p, "tensor_model_parallel", False) and len(shards) > 1
            result[name.removeprefix("module.")] = torch.cat(shards, dim=p.partition_dim) if cut else shards[0]
    return result


def update(
    setup: Setup, start: Callable[..., Any], gradients: Callable[[str, Tensor], Tensor] | None = None, **given: Any
) -> dict[str, Tensor]:
    """The first update of every matrix: by the gradients of a backward pass, or by those that `gradients(name, parameter)` gives."""
    chunks, optimizer = start(setup, **given)
    before = whole_matrices(chunks)
    hosts.set_rates(optimizer, 0.05)
    if gradients is None:
        hosts.train_step(setup, chunks, optimizer, 0)
    else:
        for name, p in chunks[0].named_parameters():
            p.main_grad.copy_(gradients(name.removeprefix("module."), p))
        optimizer.step()
    return {name: value - before[name] for name, value in whole_matrices(chunks).items()}


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The worst relative difference of any matrix."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)
