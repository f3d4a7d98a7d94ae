"""Muon: momentum, orthogonalised, as the update (Jordan et al., "Muon", 2024), with decoupled weight decay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..polar.scaling import update_scale
from .rule import Fragments, Hyperparameters, MatrixBatch, MatrixRule, decay, gradient_or_zero


class Muon(MatrixRule):
    """p ← p·(1 − lr·wd) − lr·scale·polar(g.lerp(buf, momentum)), with buf ← buf.lerp(g, 1 − momentum), as `torch.optim.Muon`."""

    name = "muon"
    values = ("momentum_buffer",)

    def prepare(self, fragments: Fragments, group: Hyperparameters, happens: Tensor) -> list[Tensor]:
        """The Nesterov form of the momentum, or the momentum.

        Where a step doesn't happen the buffer stands in for the gradient: buf.lerp_(buf, …) is buf.
        """
        buffers = fragments.state["momentum_buffer"]
        fresh = [torch.where(happens, gradient_or_zero(g, b), b) for g, b in zip(fragments.grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, fresh, 1 - group["momentum"])
        if not group["nesterov"]:
            return buffers
        torch._foreach_lerp_(fresh, buffers, group["momentum"])
        return fresh

    def compute(self, batch: MatrixBatch, group: Hyperparameters) -> Tensor:
        return batch.orthogonalize(batch.values)

    def rate(self, rows: int, cols: int, group: Hyperparameters) -> float:
        return float(group["lr"]) * (group["extra_scale_factor"] * update_scale(group["adjust_lr_fn"], rows, cols))

    def finalize(self, weights: list[Tensor], updates: list[Tensor], rows: int, cols: int, group: Hyperparameters, happens: Tensor) -> None:
        decay(weights, 1 - float(group["lr"]) * group["weight_decay"], happens)
        torch._foreach_add_(weights, updates, alpha=-self.rate(rows, cols, group))
