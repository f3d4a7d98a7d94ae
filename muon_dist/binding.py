"""Binding: from the parameters as they are now to domains with a plan that all ranks agree on.

Binding reads layouts, makes each domain's plan, and compares it among the ranks, with a timeout: a difference raises on every rank and
names it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .adaptation import Adaptation, assign_policies
from .bound import BoundParameter, Member, stored_as_box
from .comparison import all_have, compare
from .domain import Domain, Ranks
from .groups import PlanOptions, fixed_schedule
from .polar.cost import flops_of, form_name, segments_of, sliced_flops_of, workspace_bytes
from .polar.matrix_view import Matrix, matrices_of
from .polar.newton_schulz import default_compute_dtype, dtype_named
from .polar.polynomials import Schedule
from .polar.products import SymmetricProducts
from .rendezvous import gather_objects, meet
from .sharding.layout import (
    Fragment,
    Placement,
    dtensor_fragments,
    fragment_numel,
    whole,
)
from .sharding.owners import EVEN_ENOUGH
from .sharding.plan import make_plan
from .sharding.tasks import MatrixTask, SlicedCost


def bind_domains(
    members: Sequence[Member],
    groups: Sequence[Mapping[str, Any]],
    *,
    process_group: dist.ProcessGroup | None,
    options: PlanOptions,
    made: dict[tuple[int, ...], dist.ProcessGroup],
    all_names: Sequence[str] = (),
) -> list[tuple[Domain, Adaptation]]:
    """The domains of the members, in an order equal on all ranks, and what is known of their matrices. Collective.

    Args:
        members: whose state, which is compared, is left alone but for "spectrum".
        groups: their hyperparameters, complete.
        made: keeps the process groups made here, so that binding again makes none twice.
        all_names: of the model's other parameters, where `members` are only some; they tell how deep the model is.
    """
    explicit = _exchange_layouts(members, process_group, made)
    bound = [_bind_parameter(i, m, groups[m.group], process_group, explicit.get(m.name)) for i, m in enumerate(members)]
    assign_policies(bound, all_names)
    by_ranks: dict[tuple[int, ...], list[BoundParameter]] = {}
    for b in bound:
        by_ranks.setdefault(b.ranks, []).append(b)
    domains = []
    for ranks in sorted(by_ranks, key=lambda r: (-len(r), r)):
        together = by_ranks[ranks]
        known = next((b.known_group for b in together if b.known_group is not None), None)
        domains.append(_new_domain(ranks, together, _group_of(ranks, known, made), options))
    everyone = set(_ranks_of(process_group))
    for domain, _ in domains:
        if not everyone.issuperset(domain.ranks):
            raise ValueError(
                f"{domain.parameters[0].name or 'a parameter'} lives on ranks {list(domain.ranks)}, "
                f"beyond process_group's {sorted(everyone)}: "
                "a bad gradient could then skip the step on some of its ranks only. Pass a process_group that covers all of them, and "
                "layouts for plain tensors that are replicas over fewer"
            )
        compare(domain)
    return domains


def _bind_parameter(
    index: int,
    member: Member,
    group: Mapping[str, Any],
    process_group: dist.ProcessGroup | None,
    explicit: tuple[tuple[int, ...], tuple[int, ...], tuple[Fragment, ...], dist.ProcessGroup | None] | None,
) -> BoundParameter:
    p, name, local = member.tensor, member.name, member.local
    device, known = local.device, None
    if explicit is not None:
        shape, ranks, fragments, known = explicit
        device = device if member.layout is None or member.layout.device is None else member.layout.device
        placement = Placement(name=name, shape=shape, fragments=fragments)
    elif isinstance(p, DTensor):
        shape = tuple(p.shape)
        if p.device_mesh.get_coordinate() is None:
            raise ValueError(f"{name} lives on a mesh that this rank is not part of; leave it out of this rank's optimizer")
        ranks, fragments = dtensor_fragments(p, name)
        known = p.device_mesh.get_group() if p.device_mesh.ndim == 1 else None
        if p.device_mesh.device_type != device.type:  # FSDP2 with CPU offload: kept on the host, computed on the accelerator
            device = torch.device(p.device_mesh.device_type, torch.accelerator.current_device_index())
        placement = Placement(name=name, shape=shape, fragments=fragments)
    else:
        shape, ranks, known = tuple(p.shape), _ranks_of(process_group), process_group
        fragment = (whole(shape),) if local.numel() else ()
        placement = Placement(name=name, shape=shape, fragments=(fragment,) * len(ranks), replicated=True)
    bound = BoundParameter(member=member, index=index, group=group, placement=placement, ranks=ranks, device=device, known_group=known)
    if bound.travels:
        view = member.route.view
        assert view is not None  # what travels is read as matrices
        if member.trains:  # nothing of what is frozen travels
            bound.matrices = matrices_of(shape, view, name)
        bound.fixed = fixed_schedule(group)
        compute = dtype_named(group["compute_dtype"], "compute_dtype") or default_compute_dtype(device, local.dtype)
        # fp16 can't carry momentum of any size, only what has been normalised
        wire = dtype_named(group["wire_dtype"], "wire_dtype") or (torch.float32 if compute == torch.float16 else compute)
        bound.compute_dtype, bound.wire_dtype = compute, wire
    return bound


def _new_domain(
    ranks: tuple[int, ...], parameters: list[BoundParameter], group: dist.ProcessGroup | None, options: PlanOptions
) -> tuple[Domain, Adaptation]:
    if all(b.name for b in parameters):
        parameters = sorted(parameters, key=lambda b: b.name)  # so that ranks whose groups are ordered differently agree
    devices = {b.device for b in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"parameters shared by ranks {list(ranks)} lie on several devices here, {sorted(map(str, devices))}: put them on one"
        )
    device = next(iter(devices))
    products = options.products_on(device.type)
    shared = Ranks(ranks=ranks, me=ranks.index(dist.get_rank()) if len(ranks) > 1 else 0, process_group=group, device=device)
    adaptation = Adaptation(parameters, shared, products)
    return _planned(shared, parameters, adaptation, products, options), adaptation


def _planned(
    shared: Ranks, parameters: Sequence[BoundParameter], adaptation: Adaptation, products: SymmetricProducts, options: PlanOptions
) -> Domain:
    """The domain with a plan for its schedules as they stand."""
    tasks: list[MatrixTask] = []
    matrices: list[Matrix] = []
    for position, b in enumerate(parameters):
        b.position = position
        if b.matrices:
            alike = (b.fixed or "adaptive", str(b.compute_dtype), b.group["compute_dtype"] is None, b.group["eps"])
            rule, view = b.rule, b.member.route.view
            assert view is not None  # what travels is read as matrices
            key = (rule.name, *alike, view.transpose if rule.of_matrices else None, b.member.group if rule.hyperparameters else None)
            schedules = adaptation.schedules[len(matrices) : len(matrices) + len(b.matrices)]
            tasks += matrix_tasks(b.name, position, b.matrices, schedules, b.compute_dtype, b.wire_dtype, products, batch_key=key)
            matrices += b.matrices
    plan = make_plan(
        [b.placement for b in parameters], tasks, n_ranks=len(shared.ranks), bucket_bytes=options.bucket_bytes, placement=options.placement
    )
    for b in parameters:
        if b.matrices and not stored_as_box(b, shared.me) and not b.member.local.is_contiguous():
            raise ValueError(
                f"{b.name} is stored as a flat fragment that is not contiguous; make it contiguous before it reaches the optimizer"
            )
    owners = dict(zip([t.parameter for t in reversed(tasks)], reversed(plan.owners), strict=True))
    return Domain(
        ranks=shared.ranks,
        me=shared.me,
        process_group=shared.process_group,
        device=shared.device,
        products=products,
        parameters=tuple(parameters),
        matrices=tuple(matrices),
        plan=plan,
        owners=tuple(max(owners.get(position, 0), 0) for position in range(len(parameters))),
    )


def rebalanced(domain: Domain, adaptation: Adaptation, options: PlanOptions) -> Domain | None:
    """The domain with owners chosen for its schedules as they stand, where that relieves the busiest one; else None. Collective.

    Every rank decides alike, since all have the same schedules; the plans are compared nevertheless. Where matrices are sliced, which
    gives all ranks the same work, nothing is chosen anew.
    """
    if any(slicing is not None for slicing in domain.plan.slicings):
        return None
    work = [
        flops_of(*matrix.shape, schedule, b.compute_dtype, domain.products)
        for (b, matrix), schedule in zip(
            ((b, matrix) for b in domain.parameters for matrix in b.matrices), adaptation.schedules, strict=True
        )
    ]
    busiest = np.bincount(domain.plan.owners, work, domain.plan.n_ranks).max(initial=0.0)
    if busiest * domain.plan.n_ranks <= EVEN_ENOUGH * sum(work):
        return None
    better = _planned(domain, domain.parameters, adaptation, domain.products, options)
    if better.plan.imbalance() * sum(work) * EVEN_ENOUGH > busiest * domain.plan.n_ranks:
        return None
    if not all_have(bytes.fromhex(better.plan.digest()), better):
        raise ValueError(f"the ranks {list(domain.ranks)} don't agree on new owners: their measured step counts differ")
    return better


def matrix_tasks(
    name: str,
    parameter: int,
    matrices: Sequence[Matrix],
    schedules: Sequence[Schedule],
    compute_dtype: torch.dtype,
    wire_dtype: torch.dtype,
    products: SymmetricProducts,
    *,
    batch_key: Hashable = None,
) -> list[MatrixTask]:
    """What the plan knows of a parameter's matrices: their boxes, and what each one's schedule costs."""
    return [
        MatrixTask(
            name=name if len(matrices) == 1 else f"{name}[{k}]",
            parameter=parameter,
            box=matrix.box,
            shape=matrix.shape,
            flops=flops_of(*matrix.shape, schedule, compute_dtype, products),
            workspace=workspace_bytes(
                *matrix.shape, itemsize=compute_dtype.itemsize, in_place=compute_dtype == wire_dtype, deflation=schedule.deflation
            ),
            wire={torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[wire_dtype],
            wire_itemsize=wire_dtype.itemsize,
            batch_key=batch_key,
            form=f"{len(schedule)} steps, {form_name(segments_of(schedule.steps, *matrix.shape, compute_dtype, products))}",
            sliced=_sliced_cost(matrix, schedule, compute_dtype, products),
        )
        for k, (matrix, schedule) in enumerate(zip(matrices, schedules, strict=True))
    ]


def _sliced_cost(matrix: Matrix, schedule: Schedule, compute_dtype: torch.dtype, products: SymmetricProducts) -> SlicedCost:
    fixed, per_line, added_up = sliced_flops_of(*matrix.shape, schedule, compute_dtype, products)
    squares = workspace_bytes(*[min(matrix.shape)] * 2, itemsize=compute_dtype.itemsize, in_place=True)
    return SlicedCost(fixed=fixed, per_line=per_line, added_up=added_up, workspace=squares)


def _ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    if not (dist.is_available() and dist.is_initialized()):
        return (0,)
    return tuple(sorted(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)))


def _group_of(
    ranks: tuple[int, ...], known: dist.ProcessGroup | None, made: dict[tuple[int, ...], dist.ProcessGroup]
) -> dist.ProcessGroup | None:
    """A process group of exactly these ranks; only they take part in making one."""
    if len(ranks) == 1:
        return None
    if known is not None and tuple(dist.get_process_group_ranks(known)) == ranks:  # its own order: all-to-all follows it
        return known
    if ranks == _ranks_of(None):
        return dist.group.WORLD
    if ranks not in made:
        meet(ranks)
        made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]


def _exchange_layouts(
    members: Sequence[Member], process_group: dist.ProcessGroup | None, made: dict[tuple[int, ...], dist.ProcessGroup]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Fragment, ...], dist.ProcessGroup | None]]:
    """What every rank holds of the parameters whose layouts were given: name -> (shape, ranks, fragments, process group).

    A layout tells only this rank's piece, so the ranks of its group tell each other theirs, problems included: a layout that
    is wrong on one rank raises on all of them.
    """
    described: dict[tuple[int, ...], dict[str, tuple[tuple[int, ...], Fragment, str]]] = {}
    known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for member in sorted((m for m in members if m.layout is not None), key=lambda m: m.name):
        layout = member.layout
        assert layout is not None
        group = layout.group if layout.group is not None else process_group
        ranks = _ranks_of(group)
        if layout.replicas is not None:
            ranks = tuple(sorted({r for other in gather_objects(ranks, layout.replicas) for r in other}))
        fragment, numel = layout.fragment(), member.local.numel()
        held = fragment_numel(fragment)
        problem = "" if held == numel else f"its layout describes {held} elements but its tensor has {numel}"
        described.setdefault(ranks, {})[member.name] = (layout.global_shape, fragment, problem)
        known[ranks] = group
    result = {}
    for ranks in sorted(described, key=lambda r: (-len(r), r)):
        mine = described[ranks]
        group = _group_of(ranks, known[ranks], made)
        everyone = [mine] if group is None else gather_objects(mine, group)
        for rank, theirs in zip(ranks, everyone, strict=True):
            for name, (_, _, problem) in theirs.items():
                if problem:
                    raise ValueError(f"{name}, rank {rank}: {problem}. The layout and the tensor must be of the same piece")
            if theirs.keys() != mine.keys():
                raise ValueError(
                    f"rank {rank} has layouts for {sorted(theirs)}, this rank for {sorted(mine)}: give every rank of a group all of them"
                )
            for name in mine:
                if theirs[name][0] != mine[name][0]:
                    raise ValueError(f"{name} has global_shape {theirs[name][0]} on rank {rank} but {mine[name][0]} here")
        for name, (shape, _, _) in mine.items():
            result[name] = (shape, ranks, tuple(theirs[name][1] for theirs in everyone), group)
    return result
