"""Megatron's own Muon on the model of the other tests, and one update of any optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from muon_dist.example.megatron_host import whole_matrices

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
