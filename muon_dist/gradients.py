"""Gradients as torch leaves them, for the fragments that this rank stores."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_gradient(name: str, parameter: Tensor) -> Tensor | None:
    """This rank's part of a gradient, checked against its parameter."""
    grad = parameter.grad if parameter.requires_grad else None
    if grad is None:
        return None
    if grad.is_sparse:
        raise ValueError(f"{name or 'a parameter'} has a sparse gradient, which MuonDist does not take; use sparse=False in its embedding")
    if isinstance(parameter, DTensor):
        wanted = parameter.placements
        placed = grad.placements if isinstance(grad, DTensor) else None
        if not isinstance(grad, DTensor) or any(
            have != want and have.is_shard() for have, want in zip(grad.placements, wanted, strict=True)
        ):
            raise ValueError(
                f"{name or 'a parameter'} is placed {wanted} but its gradient is {placed or 'a plain tensor'}: taking its part would "
                "need communication. Redistribute the gradient to the parameter's placements before the step"
            )
        if placed != wanted:
            # of replicas every rank takes its own part; sums are added up, as of norms under sequence parallelism
            grad = grad.redistribute(placements=wanted)
        grad = grad.to_local()
        if hasattr(grad, "wait"):
            grad = grad.wait()
    return grad
