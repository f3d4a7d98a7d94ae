"""NorMuon: Muon whose updates have rows of like size (Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .muon import Muon
from .rule import Hyperparameters, MatrixBatch, MatrixValue

TINY = 1e-10  # added to what is divided by, as in the paper's code


class NorMuon(Muon):
    """Each neuron's part of the orthogonalised momentum (a row, for weights stored as outputs × inputs) is divided by the root of a
    running mean of its squares; then the whole is brought back to the norm that it had.
    """

    name = "normuon"
    of_matrices = (MatrixValue(name="second_momentum", shape=lambda outputs, inputs: (outputs,)),)
    hyperparameters: ClassVar[Mapping[str, Any]] = {"beta2": 0.95}

    def check(self, group: Hyperparameters) -> None:
        beta2 = group["beta2"]
        if isinstance(beta2, bool) or not isinstance(beta2, (int, float)) or not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must be a number in [0, 1), got {beta2!r}")

    def compute(self, batch: MatrixBatch, group: Hyperparameters) -> Tensor:
        update = super().compute(batch, group)  # (B, m, n)
        precise = update.to(torch.promote_types(update.dtype, torch.float32))
        squares = batch.sum_over_inputs(precise.square())  # (B, outputs)
        kept = batch.state["second_momentum"]  # B of (outputs,)
        before = torch.stack(kept)
        after = before.lerp(squares.to(before.dtype) / batch.inputs, 1 - group["beta2"])
        after = torch.where(batch.happens.unsqueeze(-1), after, before)
        torch._foreach_copy_(kept, list(after.unbind()))
        scale = 1 / (after.sqrt() + TINY)
        norm, scaled = squares.sum(-1).sqrt(), (squares * scale.square()).sum(-1).sqrt()
        scale = scale * (norm / (scaled + TINY)).unsqueeze(-1)
        return (precise * batch.over_outputs(scale)).to(update.dtype)
