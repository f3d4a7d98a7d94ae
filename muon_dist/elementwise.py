"""What happens to fragments element by element: gradients, decay, momentum, AdamW. Foreach and fused kernels, no ranks.

Whether a parameter's step happens is a bool on the device, never known to the host. Where it doesn't, nothing may change and no
NaN may get further, so values are chosen with `where`, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from .bound import BoundParameter
from .sharding.layout import local_tensor


def local_gradient(bound: BoundParameter) -> Tensor | None:
    """This rank's part of a gradient, checked against its parameter."""
    grad = bound.parameter.grad if bound.parameter.requires_grad else None
    if grad is None:
        return None
    if grad.is_sparse:
        raise ValueError(
            f"{bound.name or 'a parameter'} has a sparse gradient, which MuonDist does not take; use sparse=False in its embedding"
        )
    if isinstance(bound.parameter, DTensor):
        wanted = bound.parameter.placements
        placed = grad.placements if isinstance(grad, DTensor) else None
        if not isinstance(grad, DTensor) or any(
            have != want and have.is_shard() for have, want in zip(grad.placements, wanted, strict=True)
        ):
            raise ValueError(
                f"{bound.name or 'a parameter'} is placed {wanted} but its gradient is {placed or 'a plain tensor'}: taking its part would "
                "need communication. Redistribute the gradient to the parameter's placements before the step"
            )
        if placed != wanted:
            # of replicas every rank takes its own part; sums are added up, as of norms under sequence parallelism
            grad = grad.redistribute(placements=wanted)
        grad = grad.to_local()
        if hasattr(grad, "wait"):
            grad = grad.wait()
    return grad


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout of `like`, where torch's fused kernels expect it."""
    if grad is None:
        return torch.zeros_like(like)
    grad = grad.to(like.dtype)
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def decay(tensors: Sequence[Tensor], factor: float, go: Sequence[Tensor]) -> None:
    """Multiply tensors by `factor` where their step happens. As a tensor of half precision, 1 − lr·wd would round to 1."""
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for k, (tensor, flag) in enumerate(zip(tensors, go, strict=True)):
        alike.setdefault((id(flag), tensor.dtype), []).append(k)
    for (_, dtype), places in alike.items():
        flag, same = go[places[0]], [tensors[k] for k in places]
        if dtype in (torch.float32, torch.float64):
            one = torch.ones((), dtype=dtype, device=flag.device)
            torch._foreach_mul_(same, torch.where(flag, one * factor, one))
        else:
            torch._foreach_copy_(same, [torch.where(flag, t * factor, t) for t in same])


def momentum_forms(group: Mapping[str, Any], buffers: list[Tensor], grads: Sequence[Tensor | None], go: Sequence[Tensor]) -> list[Tensor]:
    """Advance the momentum of parameters of one group, in place, and return what is to be orthogonalised: the Nesterov form or it.

    Where a step doesn't happen the buffer stands in for the gradient: buf.lerp_(buf, …) is buf.
    """
    fresh = [torch.where(flag, _or_zero(grad, buffer), buffer) for grad, flag, buffer in zip(grads, go, buffers, strict=True)]
    torch._foreach_lerp_(buffers, fresh, 1 - group["momentum"])
    if not group["nesterov"]:
        return buffers
    torch._foreach_lerp_(fresh, buffers, group["momentum"])
    return fresh


def adamw_step(
    group: Mapping[str, Any], tensors: list[Tensor], grads: Sequence[Tensor | None], states: Sequence[dict[str, Any]], go: Tensor
) -> None:
    """torch's fused AdamW on the fragments of one group; it leaves everything alone where `found_inf` says so.

    What becomes of an element doesn't depend on its place in a fragment, so replicas that are cut differently stay equal.
    """
    steps = [s["step"] for s in states]
    columns = [
        tensors,
        [_or_zero(grad, tensor) for grad, tensor in zip(grads, tensors, strict=True)],
        [local_tensor(s["exp_avg"]) for s in states],
        [local_tensor(s["exp_avg_sq"]) for s in states],
    ]
    tails = _pad_tails(columns, steps) if go.device.type == "cpu" else []
    params, gradients, means, squares = columns
    adamw(
        params,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=True,
        found_inf=(~go).to(torch.float32),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for tail, padded in tails:
        tail.copy_(padded[: tail.numel()])


def _pad_tails(columns: list[list[Tensor]], steps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Cut what doesn't fill a vector off the tensors of every column, and add it to the columns as a padded tensor of its own.

    On a CPU the fused kernel rounds the last elements of a tensor, fewer than 64 bytes, differently from all others.

    Returns:
        (tail, padded): what is to be copied back after the kernel, from the padded tensor's start.
    """
    tails: list[tuple[Tensor, Tensor]] = []
    for k in range(len(steps)):
        row = [column[k] for column in columns]
        width = 64 // row[0].element_size()
        left = row[0].numel() % width
        if not left or not all(t.is_contiguous() for t in row):
            continue
        for column, tensor in zip(columns, row, strict=True):
            flat = tensor.view(-1)
            tail = flat[-left:]
            column[k] = flat[:-left]
            column.append(F.pad(tail, (0, width - left)))
            tails.append((tail, column[-1]))
        steps.append(steps[k].clone())
    return tails
