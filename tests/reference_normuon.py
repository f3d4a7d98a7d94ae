"""NorMuon as it is meant: whole matrices, one process. What everything sharded is compared with."""

from typing import Any

import torch
from torch import Tensor

from .reference import ReferenceMuon, orthogonalize, scale

BETA2 = 0.9


class ReferenceNorMuon(ReferenceMuon):
    """Algorithm 1 of arXiv 2510.05491, with the norm of the update kept as in its authors' code."""

    beta2 = BETA2

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.second: dict[str, list[Tensor]] = {}

    def muon_step(self, name: str, g: Tensor) -> None:
        p, buffer = self.parameters[name], self.state[name][0]
        buffer.lerp_(g, 1 - self.momentum)
        form = g.lerp(buffer, self.momentum) if self.nesterov else buffer
        p.mul_(1 - self.lr * self.weight_decay)
        sizes, outputs = self.muon[name], 1 if p.ndim == 3 else 0
        pairs = [
            pair
            for piece, target in zip(form.split(sizes, outputs), p.split(sizes, outputs), strict=True)
            for pair in zip(self.matrices(piece), self.matrices(target), strict=True)
        ]
        second = self.second.setdefault(name, [torch.zeros(len(m), dtype=m.dtype) for m, _ in pairs])
        for (matrix, part), v in zip(pairs, second, strict=True):
            update = orthogonalize(matrix, self.schedule)
            v.mul_(self.beta2).add_((1 - self.beta2) * (update * update).mean(1))
            normed = update / (v.sqrt() + 1e-10)[:, None]
            normed = normed * update.norm() / (normed.norm() + 1e-10)
            part.add_(normed, alpha=-self.lr * scale(self.adjust_lr_fn, *matrix.shape))
