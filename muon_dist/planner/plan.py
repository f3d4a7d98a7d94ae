"""The plan of a job that does not run: owners, balance, bytes and memory, from shapes alone."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..binding import matrix_tasks
from ..groups import PlanOptions
from ..matrix_state import values_of
from ..polar.cost import flops_of
from ..polar.matrix_view import matrices_of
from ..polar.polynomials import Schedule, schedule_for
from ..polar.products import SymmetricProducts, products_on
from ..rules import RULES
from ..sharding.layout import Fragment, Placement, ShardLayout, fragment_numel
from ..sharding.plan import Plan, make_plan
from ..sharding.tasks import SLICED, MatrixTask
from ..spectrum.policy import FIVE, Policy, Work
from ..spectrum.scaling_law import layer_kind, relative_depths, shipped_laws
from .models import ModelParameter

STATE_BYTES = 4  # fp32, for every number that a rule keeps


def placements(parameters: list[ModelParameter], dp: int, tp: int, zero: int) -> list[Placement]:
    """Where dp × tp ranks keep every parameter; tensor-parallel ranks are neighbours: rank = dp_rank · tp + tp_rank.

    Stage 0 replicates over dp, stages 1 and 2 cut one flat buffer of each tensor-parallel rank's parameters into dp slices,
    stage 3 cuts every parameter.
    """
    blocks = [_blocks(p, tp) for p in parameters]
    local = [[math.prod(b - a for a, b in block) for block in own] for own in blocks]  # elements: [parameter][tp rank]
    slices = [-(-sum(sizes[t] for sizes in local) // dp) for t in range(tp)]
    offsets = [0] * tp
    result = []
    alike: dict[tuple[object, ...], tuple[Fragment, ...]] = {}  # layers that lie alike share their fragments
    for p, own, sizes in zip(parameters, blocks, local, strict=True):
        key = (p.shape, tuple(own))
        if zero in (0, 3) and key in alike:
            result.append(Placement(name=p.name, shape=p.shape, fragments=alike[key], replicated=zero == 0 and tp == 1))
            continue
        fragments: list[Fragment] = [()] * (dp * tp)
        for t in range(tp):
            numel = sizes[t]
            if zero == 0:
                spans = dict.fromkeys(range(dp), (0, numel))
            else:
                # one parameter cut by itself, or the slices of the whole buffer that it lies in
                start, size = (0, -(-numel // dp)) if zero == 3 else (offsets[t], slices[t])
                first, last = start // size, (start + numel - 1) // size
                spans = {d: (max(d * size - start, 0), min((d + 1) * size - start, numel)) for d in range(first, last + 1)}
            for d, span in spans.items():
                fragments[d * tp + t] = ShardLayout(global_shape=p.shape, blocks=(own[t],), span=span).fragment()
            offsets[t] += numel
        alike[key] = tuple(fragments)
        result.append(Placement(name=p.name, shape=p.shape, fragments=alike[key], replicated=zero == 0 and tp == 1))
    return result


def _blocks(p: ModelParameter, tp: int) -> list[tuple[tuple[int, int], ...]]:
    """Each tensor-parallel rank's box. What can't be cut that often is held by several ranks."""
    if p.cut is None:
        return [tuple((0, s) for s in p.shape)] * tp
    pieces = min(tp, p.shards or tp)
    if tp % pieces:
        raise ValueError(f"{p.name}: {pieces} pieces can't be spread over {tp} tensor-parallel ranks; choose --tp a multiple of {pieces}")
    size = -(-p.shape[p.cut] // pieces)
    boxes = []
    for t in range(tp):
        box = [(0, s) for s in p.shape]
        k = t * pieces // tp
        box[p.cut] = (min(k * size, p.shape[p.cut]), min((k + 1) * size, p.shape[p.cut]))
        boxes.append(tuple(box))
    return boxes


def plan_of(
    parameters: list[ModelParameter],
    places: list[Placement],
    options: PlanOptions,
    *,
    ns_steps: int,
    schedules: Mapping[str, Sequence[Schedule]] | None = None,
    device_type: str = "cuda",
) -> Plan:
    """The plan of those parameters that go to Muon, in bf16, for ranks that hold them as `places` says.

    `schedules`, by parameter and matrix, replace `ns_steps` for all.
    """
    fixed, products = schedule_for("jordan", ns_steps), SymmetricProducts(device_type, options.symmetric_kernels)
    muon = [(p, place) for p, place in zip(parameters, places, strict=True) if p.route.view is not None]
    tasks: list[MatrixTask] = []
    for position, (p, _) in enumerate(muon):
        assert p.route.view is not None
        matrices = matrices_of(p.shape, p.route.view, p.name)
        own = [fixed] * len(matrices) if schedules is None else schedules[p.name]
        tasks += matrix_tasks(p.name, position, matrices, own, torch.bfloat16, torch.bfloat16, products)
    n_ranks = len(places[0].fragments)
    return make_plan([place for _, place in muon], tasks, n_ranks=n_ranks, bucket_bytes=options.bucket_bytes, placement=options.placement)


def plan_model(
    parameters: list[ModelParameter],
    *,
    dp: int,
    tp: int,
    zero: int,
    ns_steps: int,
    options: PlanOptions,
    schedules: Mapping[str, Sequence[Schedule]] | None = None,
    device_type: str = "cuda",
    rule: str = "muon",
) -> tuple[Plan, list[int], list[int]]:
    """The plan of a job (`plan_of`), with every rank's bytes of optimizer state for MuonDist and for AdamW alone."""
    if min(dp, tp) < 1 or zero not in (0, 1, 2, 3):
        raise ValueError(f"--dp and --tp must be at least 1 and --zero one of 0, 1, 2, 3; got {dp}, {tp}, {zero}")
    if ns_steps < 1:
        raise ValueError(f"--ns-steps must be at least 1; got {ns_steps}")
    places = placements(parameters, dp, tp, zero)
    plan = plan_of(parameters, places, options, ns_steps=ns_steps, schedules=schedules, device_type=device_type)
    first_owner = {task.parameter: owner for task, owner in zip(plan.matrices, plan.owners, strict=True)}
    positions = {p.name: k for k, p in enumerate(p for p in parameters if p.route.view is not None)}
    ours, adamw = np.zeros(plan.n_ranks, np.int64), np.zeros(plan.n_ranks, np.int64)
    numels: dict[int, np.ndarray] = {}
    for p, place in zip(parameters, places, strict=True):
        held = numels.setdefault(id(place.fragments), np.empty(0, np.int64))
        if not held.size:
            held = numels[id(place.fragments)] = np.array([fragment_numel(f) for f in place.fragments], np.int64)
        adamw += len(RULES["adamw"].values) * STATE_BYTES * held
        if p.route.view is None:
            ours += len(RULES["adamw"].values) * STATE_BYTES * held
            continue
        kept = len(RULES[rule].values) * STATE_BYTES * held
        if place.replicated:
            owner = first_owner[positions[p.name]]
            ours[owner] += kept[owner]
        else:
            ours += kept
        shapes = [(m.rows, m.cols) for m in matrices_of(p.shape, p.route.view, p.name)]
        ours += STATE_BYTES * sum(values_of(RULES[rule], shapes).values())
    return plan, ours.tolist(), adamw.tolist()


def predict(parameters: list[ModelParameter], policy: Policy) -> tuple[dict[str, list[Schedule]], list[dict[str, Any]]]:
    """Schedules by the shipped scaling laws, for every parameter's matrices; and, per kind and quarter of the depth, what they say:
    steps, deflated directions, σ at .5 with its deviation, and the errors that the schedule and five Jordan steps leave. bf16 on a GPU.
    """
    laws, products = shipped_laws(), products_on("cuda")
    muon = [p for p in parameters if p.route.view is not None]
    schedules: dict[str, list[Schedule]] = {}
    rows: dict[tuple[str, float, int], dict[str, Any]] = {}
    for p, depth in zip(muon, relative_depths([p.name for p in muon]), strict=True):
        assert p.route.view is not None
        matrices = matrices_of(p.shape, p.route.view, p.name)
        for part, matrix in enumerate(matrices):
            kind, work = layer_kind(p.name, part, len(matrices)), Work(matrix.rows, matrix.cols, torch.bfloat16, products)
            schedule, error, five = _predicted(policy, kind, depth, work)
            schedules.setdefault(p.name, []).append(schedule)
            place = (kind or "other", 1.0 if depth == 1 else min(math.ceil(depth * 4) / 4, 0.99), work.rank)
            row = rows.setdefault(place, {"matrices": 0, "steps": set(), "deflation": set(), "error": error, "five": five})
            row["matrices"] += 1
            row["steps"].add(len(schedule))
            row["deflation"].add(schedule.deflation)
            row["error"], row["five"] = max(row["error"], error), max(row["five"], five)
            row["sigma"], row["deviation"] = laws.quantiles(kind, depth, work.rank)[0.5]
    listed = [{"kind": kind, "depth": depth, "rank": rank, **row} for (kind, depth, rank), row in sorted(rows.items())]
    return schedules, [{**row, "steps": sorted(row["steps"]), "deflation": sorted(row["deflation"])} for row in listed]


@functools.cache
def _predicted(policy: Policy, kind: str | None, depth: float, work: Work) -> tuple[Schedule, float, float]:
    """A schedule for the spectrum that the laws predict, its error, and that of five Jordan steps."""
    spectrum = shipped_laws().spectrum(kind, depth, work.rank)
    schedule = policy.schedule(policy.best([spectrum], work))
    return schedule, spectrum.error(schedule, floor=policy.floor), spectrum.error(FIVE, floor=policy.floor)


def forms(plan: Plan) -> list[dict[str, Any]]:
    """Per shape and form of Newton–Schulz: how many matrices, and what one costs."""
    count = Counter(
        (task.shape, task.form + (", sliced" if owner == SLICED else ""), task.flops)
        for task, owner in zip(plan.matrices, plan.owners, strict=True)
    )
    return [
        {"shape": list(shape), "form": form, "flops": each, "matrices": count[shape, form, each]} for shape, form, each in sorted(count)
    ]


def over_five(plan: Plan) -> float:
    """Newton–Schulz FLOPs of a plan over those of five Jordan steps, each in its form on a GPU in bf16."""
    products = products_on("cuda")
    return sum(t.flops for t in plan.matrices) / sum(flops_of(*t.shape, FIVE, torch.bfloat16, products) for t in plan.matrices)
