"""The peers that a step is measured against, held to the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..polar.polynomials import JORDAN
from ..polar.scaling import update_scale


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration in the matrix's own dtype: torch's runs in bf16, which a CPU has no fast products for."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


class TorchMuon:
    """torch.optim.Muon with the iteration above; everything else is torch's."""

    name = "torch.optim.Muon (fp32 iteration)"

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._optimizer = torch.optim.Muon(list(parameters), lr=1e-3, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz):
            self._optimizer.step()


class NaiveShardedMuon:
    """What one writes first for sharded parameters: every rank gathers every matrix with `full_tensor()` and orthogonalises it."""

    name = "naive sharded Muon (full_tensor)"

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._momentum = [torch.zeros_like(p) for p in self._parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self._parameters, self._momentum, strict=True):
            assert p.grad is not None and isinstance(p, DTensor)  # the benchmark shards and sets them
            buffer.lerp_(p.grad, 0.05)
            form = p.grad.lerp(buffer, 0.95)
            assert isinstance(form, DTensor)
            update = newton_schulz(form.full_tensor(), JORDAN, 5, 1e-7)
            p.mul_(1 - 1e-3 * 0.1)
            rows, cols = p.shape
            p.add_(
                distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None),
                alpha=-1e-3 * update_scale("match_rms_adamw", rows, cols),
            )
