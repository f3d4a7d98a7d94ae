"""Whether a step happens: one small all-reduce of flags per domain, decided on the device. The host never learns the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .binding import BoundParameter, Domain


def agree_on_gradients(
    domains: Sequence[Domain], grads: Mapping[BoundParameter, Tensor | None], flag_group: dist.ProcessGroup | None
) -> tuple[dict[BoundParameter, Tensor], Tensor]:
    """Which parameters' steps happen: all gradients everywhere are finite, and some rank has this one.

    Args:
        domains: those of this rank, in the order in which all ranks meet.
        grads: this rank's part of every gradient, or None.
        flag_group: the ranks that skip a bad step together, where that is more than one domain.

    Returns:
        For every parameter a 0-d bool where it is stored; those that have a gradient here share one tensor, since only the
        first question is open for them. And a 0-d int32: 1 where the whole step is left out, because a gradient is not finite or
        only some of the ranks that hold equal pieces have it.
    """
    flags: list[Tensor] = []  # per domain: [ranks whose gradients are not finite, ranks that have a gradient …]
    present: set[BoundParameter] = set()
    for domain in domains:
        # an empty shard has no say in whether there is a gradient
        present.update(b for b in domain.parameters if b.placement.fragments[domain.me] and grads[b] is not None)
        flag = domain.flags([b in present for b in domain.parameters])
        own: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for b in domain.parameters:
            if (g := grads[b]) is not None and g.numel():
                own.setdefault((g.dtype, g.device), []).append(g)
        for alike in own.values():
            flag[0] |= (~torch.stack(torch._foreach_norm(alike, float("inf"))).isfinite().all()).to(flag.device)
        if domain.process_group is not None:
            dist.all_reduce(flag, dist.ReduceOp.SUM, group=domain.process_group)
            # equal pieces with and without a gradient would drift apart: as bad as a gradient that is not finite
            torn = (flag[1:] > 0) & (flag[1:] < domain.whole_count)
            flag[0] += torn.any()
        flags.append(flag)
    bad = torch.zeros((), dtype=torch.int32, device=flags[0].device if flags else None)
    for flag in flags:
        bad |= (flag[0] > 0).to(bad.device)
    if flag_group is not None:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=flag_group)

    go: dict[BoundParameter, Tensor] = {}
    finite = {device: bad.to(device) == 0 for device in {b.parameter.device for b in grads}}
    for domain, flag in zip(domains, flags, strict=True):
        for k, b in enumerate(domain.parameters):
            everywhere = finite[b.parameter.device]
            go[b] = everywhere if b in present else everywhere & (flag[1 + k].to(everywhere.device) > 0)
    return go, bad
