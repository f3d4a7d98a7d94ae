"""Muon as it is meant: whole matrices, one process, nothing clever. What everything sharded is compared with.

Written for reading, after Jordan et al. (2024) and torch.optim.Muon; AdamW after Loshchilov & Hutter (arXiv 1711.05101).
"""

import math

import torch

JORDAN = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, schedule: list[tuple[float, float, float]]) -> torch.Tensor:
    """Newton–Schulz on one matrix in its own dtype: x = aX + (bA + cA²)X, A = XXᵀ, from X/‖X‖_F."""
    norm = matrix.double().norm().to(matrix.dtype)
    if norm == 0:
        return torch.zeros_like(matrix)
    x = matrix / norm
    if x.shape[0] > x.shape[1]:
        return orthogonalize(matrix.T, schedule).T
    for a, b, c in schedule:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def scale(adjust_lr_fn: str, rows: int, cols: int) -> float:
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "original": math.sqrt(max(1, rows / cols)),
        "spectral": math.sqrt(rows / cols),
        "none": 1.0,
    }[adjust_lr_fn]


class ReferenceMuon:
    """Updates whole parameters, by name, from whole gradients.

    `muon[name]` lists the sizes of its pieces along the output dimension (one piece: one size); all others go to AdamW.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        muon: dict[str, list[int]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        schedule: list[tuple[float, float, float]] = [JORDAN] * 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = {name: p.clone() for name, p in parameters.items()}
        self.muon = muon
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
        self.schedule, self.adjust_lr_fn, self.betas, self.eps = schedule, adjust_lr_fn, betas, eps
        self.state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}
        self.steps = dict.fromkeys(parameters, 0)

    def step(self, gradients: dict[str, torch.Tensor | None]) -> None:
        if any(g is not None and not g.isfinite().all() for g in gradients.values()):
            return
        for name, g in gradients.items():
            if g is not None:
                self.steps[name] += 1
                (self.muon_step if name in self.muon else self.adamw_step)(name, g)

    def muon_step(self, name: str, g: torch.Tensor) -> None:
        p, buffer = self.parameters[name], self.state[name][0]
        buffer.lerp_(g, 1 - self.momentum)
        form = g.lerp(buffer, self.momentum) if self.nesterov else buffer
        p.mul_(1 - self.lr * self.weight_decay)
        sizes, outputs = self.muon[name], 1 if p.ndim == 3 else 0
        for piece, target in zip(form.split(sizes, outputs), p.split(sizes, outputs), strict=True):
            for matrix, part in zip(self.matrices(piece), self.matrices(target), strict=True):
                update = orthogonalize(matrix, self.schedule)
                part.add_(update, alpha=-self.lr * scale(self.adjust_lr_fn, *matrix.shape))

    @staticmethod
    def matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
        """(m, n) is a matrix, (e, m, n) a stack of them, (out, in, h, w) a convolution's out × in·h·w matrix."""
        return list(tensor) if tensor.ndim == 3 else [tensor.view(tensor.shape[0], -1)]

    def adamw_step(self, name: str, g: torch.Tensor) -> None:
        p, (mean, square), t = self.parameters[name], self.state[name], self.steps[name]
        mean.lerp_(g, 1 - self.betas[0])
        square.lerp_(g * g, 1 - self.betas[1])
        p.mul_(1 - self.lr * self.weight_decay)
        denominator = (square / (1 - self.betas[1] ** t)).sqrt() + self.eps
        p.addcdiv_(mean / (1 - self.betas[0] ** t), denominator, value=-self.lr)
