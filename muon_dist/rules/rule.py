"""What an update rule is: the state that it declares, and its share of a step.

A rule works on lists of tensors and knows no ranks. Whether a step happens is a bool on the device, never known to the host: where it
doesn't, nothing may change and no NaN may get further, so values are chosen with `where`, never multiplied by zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Hyperparameters = Mapping[str, Any]  # of a parameter group, as they are at this step


@dataclass(frozen=True, kw_only=True)
class Fragments:
    """What this rank stores of parameters of one group; the lists are parallel.

    Attributes:
        weights: the parameters' own.
        grads: in the weights' shapes; None counts as zero.
        state: by name, each in the shape and dtype of its weight; "step" is 0-d.
    """

    weights: list[Tensor]
    grads: Sequence[Tensor | None]
    state: Mapping[str, list[Tensor]]


class Rule(ABC):
    """An update rule. Everything that allocates, moves, saves or compares state asks these declarations.

    Attributes:
        name: the "algorithm" of its groups.
        values: names of the state that is laid out as its parameter, fragment by fragment, and begins with zeros.
        counts_steps: whether there is a 0-d fp32 "step" beside it.
    """

    name: str
    values: tuple[str, ...]
    counts_steps = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Of a parameter's state."""
        return (*self.values, "step") if self.counts_steps else self.values


class MatrixRule(Rule):
    """A rule that needs whole matrices: fragments are prepared where they lie, travel to an owner, and updates travel back."""

    @abstractmethod
    def prepare(self, fragments: Fragments, group: Hyperparameters, happens: Tensor) -> list[Tensor]:
        """Advance the state and return what travels, in the weights' shapes.

        Args:
            happens: 0-d bool on the fragments' device; where it is false, nothing changes.
        """

    @abstractmethod
    def compute(self, batch: Tensor, orthogonalize: Callable[[Tensor], Tensor], group: Hyperparameters) -> Tensor:
        """The updates of a batch of matrices, (B, m, n) each, at their owner.

        Args:
            batch: what was prepared; may be overwritten.
            orthogonalize: the approximate polar factors of (B, m, n), with the schedules that are in force; zeros for matrices
                whose step doesn't happen.
        """

    @abstractmethod
    def finalize(self, weights: list[Tensor], updates: list[Tensor], rows: int, cols: int, group: Hyperparameters, happens: Tensor) -> None:
        """Change pieces of weights by the updates that arrived for them, of matrices of rows × cols (outputs × inputs).

        Updates are zero where a step doesn't happen, and so is that of a matrix that can't be orthogonalised.
        """


class ElementwiseRule(Rule):
    """A rule that changes every element by itself, so that nothing travels."""

    @abstractmethod
    def update(self, fragments: Fragments, group: Hyperparameters, happens: Tensor) -> None:
        """Change weights and state in place."""


def gradient_or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout of `like`, where torch's fused kernels expect it."""
    if grad is None:
        return torch.zeros_like(like)
    if grad.dtype != like.dtype:
        grad = grad.to(like.dtype)
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def decay(weights: list[Tensor], factor: float, happens: Tensor) -> None:
    """Multiply weights by `factor` where the step happens. As a tensor of half precision, 1 − lr·wd would round to 1."""
    if factor == 1:
        return
    for dtype in {w.dtype for w in weights}:
        same = [w for w in weights if w.dtype == dtype]
        if dtype in (torch.float32, torch.float64):
            one = torch.ones((), dtype=dtype, device=happens.device)
            torch._foreach_mul_(same, torch.where(happens, one * factor, one))
        else:
            torch._foreach_copy_(same, [torch.where(happens, w * factor, w) for w in same])
