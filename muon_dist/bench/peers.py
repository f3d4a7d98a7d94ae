"""The peers that a step is measured against, held to the same arithmetic: five Jordan steps, in fp32 or in bf16."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ..polar.coefficients import JORDAN
from ..polar.scaling import update_scale

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.95, 0.1


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration in the dtype of the matrix or of a batch of them: torch's own runs in bf16."""
    a, b, c = coefficients
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        if x.ndim == 2:
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class TorchMuon:
    """torch.optim.Muon, in fp32 with the iteration above; everything else is torch's."""

    def __init__(self, parameters: Iterable[Tensor], *, half: bool = False) -> None:
        self.name = "torch.optim.Muon" if half else "torch.optim.Muon (fp32 iteration)"
        self._optimizer = torch.optim.Muon(list(parameters), lr=LR, adjust_lr_fn="match_rms_adamw")
        self._half = half

    def step(self) -> None:
        iteration = mock.patch("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
        with contextlib.nullcontext() if self._half else iteration:
            self._optimizer.step()


class NaiveShardedMuon:
    """What one writes first for sharded parameters: every rank gathers every matrix with `full_tensor()` and orthogonalises it."""

    name = "naive sharded Muon (full_tensor)"

    def __init__(self, parameters: Iterable[Tensor], *, half: bool = False) -> None:
        self._parameters = list(parameters)
        self._momentum = [torch.zeros_like(p) for p in self._parameters]
        self._dtype = torch.bfloat16 if half else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self._parameters, self._momentum, strict=True):
            assert p.grad is not None and isinstance(p, DTensor)  # the benchmark shards and sets them
            buffer.lerp_(p.grad, 1 - MOMENTUM)
            form = p.grad.lerp(buffer, MOMENTUM).to(self._dtype)
            assert isinstance(form, DTensor)
            update = newton_schulz(form.full_tensor(), JORDAN, 5, 1e-7)
            p.mul_(1 - LR * WEIGHT_DECAY)
            rows, cols = p.shape
            p.add_(
                distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None),
                alpha=-LR * update_scale("match_rms_adamw", rows, cols),
            )


class DionMuon:
    """dion's Muon on sharded parameters: matrices go to owners in all-to-alls, as many at once as there are ranks.

    It rounds momentum to bf16 before it travels; for a comparison in fp32 that line is replaced by the same without the cast. Its
    torch.compile stays as it is.
    """

    def __init__(self, parameters: Iterable[Tensor], mesh: DeviceMesh, *, half: bool = False) -> None:
        dion, muon = self.check()
        self.name = f"dion {getattr(dion, '__version__', '')}".rstrip() + ("" if half else " (fp32)")
        if not half:
            muon.muon_update_pre_orthogonalize = torch.compile(_momentum_in_fp32, fullgraph=True)

        def iteration(x: Tensor, epsilon: Any = None) -> Tensor:
            return newton_schulz(x, JORDAN, 5, 1e-7)

        self._optimizer = dion.Muon(
            list(parameters),
            distributed_mesh=mesh,
            lr=LR,
            mu=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            nesterov=True,
            adjust_lr="rms_norm",
            newton_schulz_func=iteration,
        )

    @staticmethod
    def check() -> tuple[Any, Any]:
        """dion's package and its module of Muon.

        Raises:
            ValueError: it is not installed.
        """
        try:
            return importlib.import_module("dion"), importlib.import_module("dion.muon")
        except ImportError as error:
            raise ValueError(f"this bench needs dion (github.com/microsoft/dion, pip install git+… or PYTHONPATH): {error}") from error

    def step(self) -> None:
        self._optimizer.step()


def _momentum_in_fp32(G: list[Tensor], M: list[Tensor], momentum: Tensor, nesterov: bool) -> list[Tensor]:
    """What dion does before its all-to-all, in the momentum's own dtype."""
    torch._foreach_mul_(M, momentum)
    torch._foreach_add_(M, G)
    if not nesterov:
        return list(M)
    forms = torch._foreach_mul(M, momentum)
    torch._foreach_add_(forms, G)
    return list(forms)
