"""The state of members: its keys, its memory, and where it lives. What there is of it, rules declare.

Keys are equal on all ranks from the start; memory comes when layouts are known. Momentum of plain replicas lives with the owners of their
matrices, unless every rank is asked to keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adaptation import blank_state
from .bound import BoundParameter, Member
from .comparison import all_gather_rows
from .groups import policy_of
from .matrix_state import values_of
from .polar.matrix_view import matrices_of
from .program import Program
from .rules import rule_of
from .sharding.state import complete_replicas, elsewhere, fit_state, is_absent, is_elsewhere, is_unset, unset


def declare(member: Member, group: Mapping[str, Any]) -> None:
    """Give a member's state its keys."""
    rule, view = rule_of(group), member.route.view
    for key in rule.keys:
        member.state.setdefault(key, unset())
    if view is None:
        return
    adapts = policy_of(group) is not None and "spectrum" not in member.state
    if not adapts and all(value.name in member.state for value in rule.of_matrices):
        return
    shape = tuple(member.tensor.shape) if member.layout is None else member.layout.global_shape
    matrices = matrices_of(shape, view, member.name)
    if adapts:
        member.state["spectrum"] = blank_state(len(matrices))
    dtype = torch.promote_types(member.tensor.dtype, torch.float32)
    for name, count in values_of(rule, [(m.rows, m.cols) for m in matrices]).items():
        member.state.setdefault(name, torch.zeros(count, dtype=dtype, device="cpu"))


def allocate(program: Program, bound: BoundParameter) -> None:
    """Give a parameter's state the memory that it has on this rank, and let go of what another owns."""
    tensor, state = bound.member.tensor, bound.state
    for key in bound.rule.values:
        if not is_absent(state[key]):
            state[key] = fit_state(state[key], tensor, bound.placement.fragments[program.domain.me], bound.name)
        elif program.keeps(bound):
            state[key] = torch.zeros_like(tensor)
        else:
            state[key] = elsewhere()
    if bound.rule.counts_steps:
        step = 0.0 if is_unset(state["step"]) else state["step"]
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=bound.member.local.device)


def complete(program: Program, *, everywhere: bool) -> None:
    """Bring the state of replicated parameters to their owners, who may have changed, or to every rank. Collective."""
    domain = program.domain
    kept = [(b, key) for b in domain.parameters if b.travels and b.placement.replicated for key in b.rule.values]
    if not kept:
        return
    values = [b.state[key] for b, key in kept]
    lost = torch.tensor([is_elsewhere(v) for v in values], device="cpu")
    has = torch.tensor([not is_absent(v) for v in values], device="cpu")
    everyone = all_gather_rows(torch.cat([has, lost]).to(torch.int64), domain)
    owners = [domain.owner_of(b) for b, _ in kept]
    completed = complete_replicas(
        values,
        [b.member.local for b, _ in kept],
        lambda i, holders: not bool(holders.all() if everywhere else holders[owners[i]]),
        group=domain.process_group,
        ranks=domain.ranks,
        has=everyone[:, : len(values)],
        lost=everyone[:, len(values) :],
    )
    for (bound, key), value in zip(kept, completed, strict=True):
        bound.state[key] = value


def drop_copies(program: Program) -> None:
    """Let go of state that another rank owns."""
    for bound in program.domain.parameters:
        if not program.keeps(bound):
            for key in bound.rule.values:
                bound.state[key] = elsewhere()
