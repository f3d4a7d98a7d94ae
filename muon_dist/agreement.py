"""Whether a step happens: one small all-reduce of flags per domain, decided on the device. The host never waits for the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .bound import BoundParameter
from .domain import Domain
from .rendezvous import naming_the_missing

# What is added up beside the flags of parameters: ranks whose gradients are not finite; updates that their owners left out at the step
# before; and by how often gradients were reset, and its square, whether all ranks are at the same iteration
BAD, LEFT_OUT, ITERATION, SQUARE, FIRST = range(5)
COUNTED = 256  # iterations count up to here, so that squares of thousands of ranks can be added up in int32


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the ranks agreed on.

    Attributes:
        go: for every parameter a 0-d bool where it is stored; those that have a gradient here share one tensor, since only the first
            question is open for them.
        bad: 0-d int32: 1 where the whole step is left out, because a gradient is not finite or only some of the ranks that hold
            equal pieces have it, or because the ranks are apart.
        left_out: 0-d int32: how many updates their owners left out at the step before.
        apart: 0-d bool: whether the ranks have reset gradients unequally often since binding.
    """

    go: dict[BoundParameter, Tensor]
    bad: Tensor
    left_out: Tensor
    apart: Tensor


def agree_on_gradients(
    domains: Sequence[Domain], grads: Mapping[BoundParameter, Tensor | None], flag_group: dist.ProcessGroup | None, what: str
) -> Agreement:
    """Which parameters' steps happen: all gradients everywhere are finite, and some rank has this one.

    Args:
        domains: those of this rank, in the order in which all ranks meet.
        grads: this rank's part of every gradient, or None.
        flag_group: the ranks that skip a bad step together, where that is more than one domain.
        what: the step, for the message about ranks that don't come.
    """
    flags: list[Tensor] = []
    present: set[BoundParameter] = set()
    for domain in domains:
        # an empty shard has no say in whether there is a gradient
        present.update(b for b in domain.parameters if b.placement.fragments[domain.me] and grads[b] is not None)
        flag = domain.flags([b in present for b in domain.parameters])
        for alike, used_as in _alike(domain, grads):
            largest = torch.stack(torch._foreach_norm(alike, float("inf")))
            flag[BAD] |= (~largest.to(used_as).isfinite().all()).to(flag.device)
        flag[LEFT_OUT], flag[ITERATION], flag[SQUARE] = domain.left_out, domain.iteration, domain.iteration**2
        domain.left_out.zero_()
        if domain.process_group is not None:
            with naming_the_missing(domain.ranks, what):
                dist.all_reduce(flag, dist.ReduceOp.SUM, group=domain.process_group)
            # equal pieces with and without a gradient would drift apart: as bad as a gradient that is not finite
            torn = (flag[FIRST:] > 0) & (flag[FIRST:] < domain.whole_count)
            flag[BAD] += torn.any()
        flags.append(flag)
    none = torch.zeros((), dtype=torch.int32, device=flags[0].device if flags else None)
    bad, left_out, apart = none, none.clone(), none.bool()
    for domain, flag in zip(domains, flags, strict=True):
        several = flag[SQUARE].long() * len(domain.ranks) != flag[ITERATION].long() ** 2  # the mean of squares, and the mean squared
        apart = apart | several.to(apart.device)
        left_out = left_out + flag[LEFT_OUT].to(left_out.device)
        bad = bad | (flag[BAD] > 0).to(bad.device) | several.to(bad.device)
    if flag_group is not None:
        with naming_the_missing(dist.get_process_group_ranks(flag_group), what):
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=flag_group)

    go: dict[BoundParameter, Tensor] = {}
    finite = {device: bad.to(device) == 0 for device in {b.parameter.device for b in grads}}
    for domain, flag in zip(domains, flags, strict=True):
        for k, b in enumerate(domain.parameters):
            everywhere = finite[b.parameter.device]
            go[b] = everywhere if b in present else everywhere & (flag[FIRST + k].to(everywhere.device) > 0)
    return Agreement(go=go, bad=bad, left_out=left_out, apart=apart)


def _alike(domain: Domain, grads: Mapping[BoundParameter, Tensor | None]) -> list[tuple[list[Tensor], torch.dtype]]:
    """Gradients of one dtype and device, and the dtype of the state that they go into, which may hold less."""
    own: dict[tuple[torch.dtype, torch.device, torch.dtype], list[Tensor]] = {}
    for b in domain.parameters:
        if (g := grads[b]) is not None and g.numel():
            own.setdefault((g.dtype, g.device, b.parameter.dtype), []).append(g)
    return [(alike, used_as) for (_, _, used_as), alike in own.items()]


def agree_after_host(domains: Sequence[Domain], grads: Mapping[BoundParameter, Tensor | None], verdict: Tensor, what: str) -> Agreement:
    """As `agree_on_gradients`, where a host has decided on all ranks whether the step happens."""
    left_out = torch.zeros((), dtype=torch.int32, device=domains[0].device if domains else None)
    for domain in domains:
        own = domain.left_out.clone()
        domain.left_out.zero_()
        if domain.process_group is not None and domain.plan.matrices:
            with naming_the_missing(domain.ranks, what):
                dist.all_reduce(own, group=domain.process_group)
        left_out = left_out + own
    nothing = torch.zeros_like(left_out)
    return Agreement(go=dict.fromkeys(grads, verdict), bad=nothing, left_out=left_out, apart=nothing.bool())


class Lagged:
    """A bool on the device, told to the host without a wait: at once on a CPU, elsewhere as soon as a later call finds it copied."""

    def __init__(self) -> None:
        self._copy: tuple[Tensor, torch.Event] | None = None

    def seen(self, flag: Tensor) -> bool:
        if flag.device.type == "cpu":
            return bool(flag)
        before, answer = self._copy, False
        if before is not None and before[1].query():
            answer, before = bool(before[0]), None
        if before is None:
            host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.Event(flag.device)
            event.record()
            self._copy = (host, event)
        return answer
