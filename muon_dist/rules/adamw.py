"""AdamW, by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from .rule import ElementwiseRule, Fragments, Hyperparameters, gradient_or_zero


class AdamW(ElementwiseRule):
    """torch's fused AdamW, which leaves everything alone where `found_inf` says so.

    What becomes of an element doesn't depend on its place in a fragment, so replicas that are cut differently stay equal.
    """

    name = "adamw"
    values = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def update(self, fragments: Fragments, group: Hyperparameters, happens: Tensor) -> None:
        steps = list(fragments.state["step"])
        columns = [
            list(fragments.weights),
            [gradient_or_zero(g, w) for g, w in zip(fragments.grads, fragments.weights, strict=True)],
            *(list(fragments.state[key]) for key in self.values),
        ]
        tails = _pad_tails(columns, steps) if happens.device.type == "cpu" else []
        params, gradients, means, squares = columns
        adamw(
            params,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            found_inf=(~happens).to(torch.float32),
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
