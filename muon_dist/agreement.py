"""Whether a step happens: one small all-reduce of flags per domain, decided on the device. The host never waits for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .domain import Domain
from .rendezvous import naming_the_missing
from .sharding.layout import Placement

# What is added up beside the flags of parameters: ranks whose gradients are not finite; updates that their owners left out at the step
# before; and by how often gradients were reset, and its square, whether all ranks are at the same iteration
BAD, LEFT_OUT, ITERATION, SQUARE, FIRST = range(5)
COUNTED = 256  # iterations count up to here, so that squares of thousands of ranks can be added up in int32


class StepMask:
    """Which members' steps happen.

    Attributes:
        flags: a 0-d bool for each member, where it is stored. Those that have a gradient here share one tensor, since only whether the
            whole step happens is open for them.
        own: members with a flag of their own.
    """

    def __init__(self, flags: Sequence[Tensor], own: frozenset[int] = frozenset()) -> None:
        self.flags, self.own = flags, own

    def split(self, members: Sequence[int]) -> list[tuple[Tensor, list[int] | None]]:
        """Members of one device, by flag: (flag, their places in `members`); places are None where all share one."""
        if not members:
            return []
        if self._alike(members):
            return [(self.flags[members[0]], None)]
        together: dict[int, list[int]] = {}
        for place, member in enumerate(members):
            together.setdefault(member if member in self.own else -1, []).append(place)
        return [(self.flags[members[places[0]]], places) for places in together.values()]

    def stacked(self, members: Sequence[int], device: torch.device) -> Tensor:
        """(len(members),), bool."""
        if self._alike(members):
            return self.flags[members[0]].to(device).expand(len(members))
        return torch.stack([self.flags[member].to(device) for member in members])

    def _alike(self, members: Sequence[int]) -> bool:
        return not self.own or self.own.isdisjoint(members)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the ranks agreed on.

    Attributes:
        mask: which members' steps happen.
        bad: 0-d int32: 1 where the whole step is left out, because a gradient is not finite or only some of the ranks that hold
            equal pieces have it, or because the ranks are apart.
        left_out: 0-d int32: how many updates their owners left out at the step before.
        apart: 0-d bool: whether the ranks have reset gradients unequally often since binding.
    """

    mask: StepMask
    bad: Tensor
    left_out: Tensor
    apart: Tensor


class Consensus:
    """What the ranks of one domain tell each other at every step.

    Attributes:
        left_out: 0-d int32: updates of this rank's matrices that were no polar factors, and that others don't know of.
        iteration: 0-d int32: how often gradients were reset since binding; beyond COUNTED from 0 again.
        members: of the domain's parameters, by position, in the engine.
        devices, devices_by_position: where these are stored.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.left_out, self.iteration = torch.zeros(2, dtype=torch.int32, device=domain.device).unbind()
        self.members = [b.index for b in domain.parameters]
        # an empty shard has no say in whether there is a gradient
        self._has_a_say = [bool(b.placement.fragments[domain.me]) for b in domain.parameters]
        self.devices: set[torch.device] = set()
        self.devices_by_position: list[torch.device] = []
        self._dtypes: list[torch.dtype] = []
        self.look_up()
        counts = [_replica_count(b.placement) for b in domain.parameters]
        self._holders = torch.tensor(counts, dtype=torch.int32, device=domain.device)
        self._flags: tuple[list[bool], Tensor] = ([], torch.empty(0, device="cpu"))  # the last that were asked for

    def look_up(self) -> None:
        """Where parameters are and in which dtype, which a host may change."""
        self.devices_by_position = [b.member.tensor.device for b in self.domain.parameters]
        self.devices = set(self.devices_by_position)
        self._dtypes = [b.member.tensor.dtype for b in self.domain.parameters]

    def present(self, grads: Sequence[Tensor | None]) -> list[bool]:
        """By position, which parameters have a gradient here."""
        return [say and grads[i] is not None for say, i in zip(self._has_a_say, self.members, strict=True)]

    def ask(self, grads: Sequence[Tensor | None], present: list[bool], what: str) -> Tensor:
        """The sum of all ranks' flags, (FIRST + parameters,) int32 on the domain's device. Collective."""
        domain, flag = self.domain, self._flags_for(present)
        for alike, used_as in self._alike(grads):
            largest = torch.stack(torch._foreach_norm(alike, float("inf")))
            flag[BAD] |= (~largest.to(used_as).isfinite().all()).to(flag.device)
        flag[LEFT_OUT], flag[ITERATION], flag[SQUARE] = self.left_out, self.iteration, self.iteration**2
        self.left_out.zero_()
        if domain.process_group is not None:
            with naming_the_missing(domain.ranks, what):
                dist.all_reduce(flag, dist.ReduceOp.SUM, group=domain.process_group)
            # equal pieces with and without a gradient would drift apart: as bad as a gradient that is not finite
            torn = (flag[FIRST:] > 0) & (flag[FIRST:] < self._holders)
            flag[BAD] += torn.any()
        return flag

    def share_left_out(self, what: str) -> Tensor:
        """How many updates all ranks have left out since the last call. Collective, where the domain has matrices."""
        domain, own = self.domain, self.left_out.clone()
        self.left_out.zero_()
        if domain.process_group is not None and domain.plan.matrices:
            with naming_the_missing(domain.ranks, what):
                dist.all_reduce(own, group=domain.process_group)
        return own

    def _flags_for(self, present: list[bool]) -> Tensor:
        """Zeros and `present`, in int32 on the device, a new tensor. They seldom change; a copy from the host would wait."""
        if self._flags[0] != present:
            self._flags = (present, torch.tensor([0] * FIRST + present, dtype=torch.int32, device=self.domain.device))
        return self._flags[1].clone()

    def _alike(self, grads: Sequence[Tensor | None]) -> list[tuple[list[Tensor], torch.dtype]]:
        """Gradients of one dtype and device, and the dtype of the state that they go into, which may hold less."""
        found = [(g, used_as) for i, used_as in zip(self.members, self._dtypes, strict=True) if (g := grads[i]) is not None and g.numel()]
        kinds = dict.fromkeys((g.dtype, g.device, used_as) for g, used_as in found)
        if len(kinds) == 1:
            return [([g for g, _ in found], found[0][1])]
        return [([g for g, own in found if (g.dtype, g.device, own) == kind], kind[2]) for kind in kinds]


def _replica_count(placement: Placement) -> int:
    """Ranks that hold some of a parameter, if any piece is held twice; else 0. If one of them has a gradient, all must have."""
    held = [fragment for fragment in placement.fragments if fragment]
    return len(held) if len(set(held)) < len(held) else 0


def agree_on_gradients(
    domains: Sequence[Consensus], grads: Sequence[Tensor | None], flag_group: dist.ProcessGroup | None, what: str
) -> Agreement:
    """Which members' steps happen: all gradients everywhere are finite, and some rank has this one.

    Args:
        domains: those of this rank, in the order in which all ranks meet.
        grads: this rank's part of every member's gradient, or None.
        flag_group: the ranks that skip a bad step together, where that is more than one domain.
        what: the step, for the message about ranks that don't come.
    """
    present = [domain.present(grads) for domain in domains]
    flags = [domain.ask(grads, has, what) for domain, has in zip(domains, present, strict=True)]
    none = torch.zeros((), dtype=torch.int32, device=flags[0].device if flags else None)
    bad, left_out, apart = none, none.clone(), none.bool()
    for domain, flag in zip(domains, flags, strict=True):
        several = flag[SQUARE].long() * len(domain.domain.ranks) != flag[ITERATION].long() ** 2  # the mean of squares; the mean, squared
        apart = apart | several.to(apart.device)
        left_out = left_out + flag[LEFT_OUT].to(left_out.device)
        bad = bad | (flag[BAD] > 0).to(bad.device) | several.to(bad.device)
    if flag_group is not None:
        with naming_the_missing(dist.get_process_group_ranks(flag_group), what):
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=flag_group)

    finite = {device: bad.to(device) == 0 for domain in domains for device in domain.devices}
    result: list[Tensor] = [none] * len(grads)
    own = []
    for domain, flag, has in zip(domains, flags, present, strict=True):
        for i, device in zip(domain.members, domain.devices_by_position, strict=True):
            result[i] = finite[device]
        for position in [position for position, here in enumerate(has) if not here] if not all(has) else ():
            i, device = domain.members[position], domain.devices_by_position[position]
            own.append(i)
            result[i] = finite[device] & (flag[FIRST + position].to(device) > 0)
    return Agreement(mask=StepMask(result, frozenset(own)), bad=bad, left_out=left_out, apart=apart)


def agree_after_host(domains: Sequence[Consensus], members: int, verdict: Tensor, what: str) -> Agreement:
    """As `agree_on_gradients`, where a host has decided on all ranks whether the step happens, of all its members."""
    left_out = torch.zeros((), dtype=torch.int32, device=domains[0].domain.device if domains else None)
    for domain in domains:
        left_out = left_out + domain.share_left_out(what)
    nothing = torch.zeros_like(left_out)
    return Agreement(mask=StepMask([verdict] * members), bad=nothing, left_out=left_out, apart=nothing.bool())


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
