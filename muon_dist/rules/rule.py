"""What an update rule is: the state that it declares, and its share of a step.

A rule works on lists of tensors and knows no ranks. Whether a step happens is a bool on the device, never known to the host: where it
doesn't, nothing may change and no NaN may get further, so values are chosen with `where`, never multiplied by zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..polar.newton_schulz import Slices

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


@dataclass(frozen=True, kw_only=True)
class MatrixValue:
    """State that belongs to a whole matrix, and not to the fragments of one: its owner computes it, and every rank is told it.

    It begins with zeros, in fp32, or fp64 where parameters are. It should be small: a number per row, not per element.

    Attributes:
        name: in the parameter's state, where the values of its matrices stand one after the other, in one dimension.
        shape: of one matrix's value, from its outputs and inputs.
    """

    name: str
    shape: Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class MatrixBatch:
    """Matrices of one shape at their owner, or this rank's slices of them.

    Attributes:
        values: (B, m, n) as stored: what was prepared. May be overwritten.
        happens: (B,) bool; where it is false, the update must be zero and the state stay.
        transpose: the weights are stored (inputs, outputs).
        outputs, inputs: of the whole matrices.
        state: by the names of `MatrixValue`s, a tensor for each matrix, to be changed in place.
        orthogonalize: the approximate polar factors of (B, m, n), with the schedules that are in force: zeros for matrices whose step
            doesn't happen, and for those that can't be orthogonalised.
        slices: the part of whole matrices that `values` is; None: all of it.
    """

    values: Tensor
    happens: Tensor
    transpose: bool
    outputs: int
    inputs: int
    state: Mapping[str, list[Tensor]]
    orthogonalize: Callable[[Tensor], Tensor]
    slices: Slices | None

    def sum_over_inputs(self, values: Tensor) -> Tensor:
        """(B, m, n) -> (B, outputs): sums over the inputs of whole matrices, in fp32 at least. Collective for slices."""
        sums = values.sum(-2 if self.transpose else -1, dtype=torch.promote_types(values.dtype, torch.float32))
        if self.slices is None:
            return sums
        whole = sums.new_zeros(len(sums), self.outputs)
        whole[:, self._stored_outputs] += sums
        self.slices.add_up(whole)
        return whole

    def over_outputs(self, numbers: Tensor) -> Tensor:
        """(B, outputs) -> the shape in which they broadcast to `values`."""
        return numbers[:, self._stored_outputs].unsqueeze(-2 if self.transpose else -1)

    @property
    def _stored_outputs(self) -> slice:
        cut = self.slices is not None and self.slices.dim == (1 if self.transpose else 0)
        return slice(self.slices.start, self.slices.stop) if cut and self.slices is not None else slice(None)


class Rule(ABC):
    """An update rule. Everything that allocates, moves, saves or compares state asks these declarations.

    Attributes:
        name: in `RULES`.
        values: names of the state that is laid out as its parameter, fragment by fragment, and begins with zeros.
        counts_steps: whether there is a 0-d fp32 "step" beside it.
        of_matrices: state that belongs to whole matrices.
        hyperparameters: its own, beside those that all such rules have, with their defaults.
    """

    name: str
    values: tuple[str, ...]
    counts_steps = False
    of_matrices: tuple[MatrixValue, ...] = ()
    hyperparameters: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def check(self, group: Hyperparameters) -> None:
        """Raise a ValueError for one of its own hyperparameters that is outside its range."""
        return None

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
    def compute(self, batch: MatrixBatch, group: Hyperparameters) -> Tensor:
        """The updates of a batch, (B, m, n), at the owner of its matrices, or on every rank for slices."""

    @abstractmethod
    def rate(self, rows: int, cols: int, group: Hyperparameters) -> float:
        """What updates are multiplied by before they are taken off weights of rows × cols matrices (outputs × inputs)."""

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
