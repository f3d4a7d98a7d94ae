"""The plan: balanced, deterministic, and such that every element goes to its owner once and comes back once."""

import math
import time
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from muon_dist.groups import PlanOptions
from muon_dist.planner.models import model_parameters
from muon_dist.planner.plan import plan_model
from muon_dist.sharding.exchange import route_bucket
from muon_dist.sharding.layout import Placement, ShardLayout, box_numel, fragment_numel, whole
from muon_dist.sharding.owners import FLOPS_PER_BYTE
from muon_dist.sharding.plan import Plan, make_plan
from muon_dist.sharding.tasks import MatrixTask

from .ranks import run_ranks


def task(parameter: int, shape: tuple[int, int], name: str = "w", rows: tuple[int, int] | None = None) -> MatrixTask:
    m, n = shape
    small = min(m, n)
    return MatrixTask(
        name=f"{name}{parameter}",
        parameter=parameter,
        box=(rows or (0, m), (0, n)),
        shape=shape,
        flops=5 * (4 * small * m * n + 2 * small**3),
        workspace=0,
        wire="fp32",
        wire_itemsize=4,
    )


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Placement], list[MatrixTask], int]:
    """Parameters cut anywhere over 1–5 ranks (replicated, or in spans, some of them held twice), with one or two matrices each."""
    n_ranks = draw(st.integers(1, 5))
    placements, tasks = [], []
    for k in range(draw(st.integers(1, 6))):
        m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        kind = draw(st.sampled_from(["replicated", "spans", "twice"]))
        if kind == "replicated":
            fragments = ((whole((m, n)),),) * n_ranks
        else:
            holders = n_ranks if kind == "spans" else max(1, n_ranks // 2)
            cuts = sorted(draw(st.lists(st.integers(0, m * n), min_size=holders - 1, max_size=holders - 1)))
            bounds = [0, *cuts, m * n]
            spans = [(bounds[r % holders], bounds[r % holders + 1]) if r < 2 * holders else (0, 0) for r in range(n_ranks)]
            fragments = tuple(ShardLayout(global_shape=(m, n), span=span).fragment() for span in spans)
        placements.append(Placement(name=f"w{k}", shape=(m, n), fragments=fragments, replicated=kind == "replicated"))
        cut = draw(st.integers(0, m - 1))
        halves = [(0, cut), (cut, m)] if cut else [(0, m)]
        tasks += [task(k, (b - a, n), rows=(a, b)) for a, b in halves]
    return placements, tasks, n_ranks


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(1, 400))
def test_every_element_goes_to_its_owner_once_and_comes_back_once(job: tuple, bucket_bytes: int) -> None:
    """A round trip through the routes of all ranks, played by hand: what arrives is what was there, everywhere it was."""
    placements, tasks, n = job
    plan = make_plan(placements, tasks, n_ranks=n, bucket_bytes=bucket_bytes)
    assert sorted(i for bucket in plan.buckets for i in bucket) == list(range(len(tasks)))
    values = [torch.arange(1, math.prod(p.shape) + 1, dtype=torch.float32).view(p.shape) + 1000 * k for k, p in enumerate(placements)]
    local = [
        {
            k: torch.cat([values[k][tuple(slice(a, b) for a, b in box)].flatten() for box in p.fragments[r]] or [torch.empty(0)])
            for k, p in enumerate(placements)
        }
        for r in range(n)
    ]
    returned = [{k: torch.zeros_like(t) for k, t in own.items()} for own in local]
    counts = [{k: torch.zeros_like(t) for k, t in own.items()} for own in local]
    sent, received = Counter(), Counter()
    for bucket in range(len(plan.buckets)):
        routes = [route_bucket(plan, bucket, r, lambda _: False, [task.batch_key for task in plan.matrices]) for r in range(n)]
        batches = [[torch.full(shape, float("nan")) for shape in route.batch_shapes] for route in routes]
        for me, route in enumerate(routes):
            for leg in route.stay:
                leg.slot.of(batches[me]).copy_(leg.view.of(local[me][leg.parameter]))
            for source in range(n):
                outgoing = routes[source].gather_out[me]
                assert len(outgoing) == len(route.gather_in[source])
                for out, into in zip(outgoing, route.gather_in[source], strict=True):
                    assert (out.matrix, out.numel) == (into.matrix, into.numel)
                    into.slot.of(batches[me]).copy_(out.view.of(local[source][out.parameter]))
                    sent[source] += 4 * out.numel
                    received[me] += 4 * out.numel
        for me, route in enumerate(routes):
            for indices, batch in zip(route.batches, batches[me], strict=True):
                for i, matrix in zip(indices, batch, strict=True):
                    assert plan.owners[i] == me
                    (a, b), _ = plan.matrices[i].box
                    assert torch.equal(matrix, values[plan.matrices[i].parameter][a:b])
            arrivals = [(leg, leg.slot.of(batches[me])) for leg in route.stay]
            for source in range(n):
                outgoing = routes[source].scatter_out[me]
                assert len(outgoing) == len(route.scatter_in[source])
                for out, into in zip(outgoing, route.scatter_in[source], strict=True):
                    assert (out.matrix, out.shape) == (into.matrix, into.shape)
                    arrivals.append((into, out.slot.of(batches[source])))
                    sent[source] += 4 * out.numel
                    received[me] += 4 * out.numel
            for leg, update in arrivals:
                leg.view.of(returned[me][leg.parameter]).copy_(update)
                leg.view.of(counts[me][leg.parameter]).add_(1)
    for me in range(n):
        for k in range(len(placements)):
            assert torch.equal(returned[me][k], local[me][k]) and (counts[me][k] == 1).all()
        load = plan.loads()[me]
        assert (load.bytes_sent, load.bytes_received) == (sent[me], received[me])
        assert load.flops == sum(t.flops for t, o in zip(plan.matrices, plan.owners, strict=True) if o == me)


def rows(m: int, n: int, ranks: int) -> Placement:
    chunk = -(-m // ranks)
    fragments = tuple(
        ShardLayout(global_shape=(m, n), span=(min(r * chunk, m) * n, min((r + 1) * chunk, m) * n)).fragment() for r in range(ranks)
    )
    return Placement(name="w", shape=(m, n), fragments=fragments)


def test_the_plan_is_a_pure_function_of_its_input() -> None:
    placements = [rows(8, 5, 2), rows(6, 6, 2), rows(9, 2, 2), rows(5, 5, 2)]
    tasks = [task(k, placement.shape) for k, placement in enumerate(placements)]
    plans = [make_plan(placements, tasks, n_ranks=2, bucket_bytes=1000) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0].digest() == plans[1].digest()
    assert plans[0].digest() != make_plan(placements, tasks, n_ranks=2, bucket_bytes=10).digest()


def test_equal_work_is_spread_evenly_and_unequal_work_near_its_bound() -> None:
    even = make_plan([rows(64, 64, 4)] * 12, [task(k, (64, 64)) for k in range(12)], n_ranks=4, bucket_bytes=2**20)
    assert even.imbalance() == even.imbalance_lower_bound() == 1.0
    shapes = [(64 + 8 * k, 64) for k in range(24)]
    uneven = make_plan([rows(*s, 4) for s in shapes], [task(k, s) for k, s in enumerate(shapes)], n_ranks=4, bucket_bytes=2**20)
    assert uneven.imbalance() <= 1.15 * uneven.imbalance_lower_bound()
    one_large = make_plan([rows(512, 512, 4), rows(8, 8, 4)], [task(0, (512, 512)), task(1, (8, 8))], n_ranks=4, bucket_bytes=2**20)
    assert one_large.imbalance() == one_large.imbalance_lower_bound() > 3.9


def test_among_equals_the_rank_that_holds_most_of_a_matrix_owns_it() -> None:
    def held_by(rank: int) -> Placement:
        spans = [(0, 64) if r == rank else (0, 0) for r in range(4)]
        return Placement(name="w", shape=(8, 8), fragments=tuple(ShardLayout(global_shape=(8, 8), span=s).fragment() for s in spans))

    homes = [2, 0, 3, 1]
    plan = make_plan([held_by(r) for r in homes], [task(k, (8, 8)) for k in range(4)], n_ranks=4, bucket_bytes=2**20)
    assert list(plan.owners) == homes and all(load.bytes_sent == 0 for load in plan.loads())
    # but work is spread where a matrix costs more than its way
    crowded = make_plan([held_by(1)] * 4, [task(k, (8, 8)) for k in range(4)], n_ranks=4, bucket_bytes=2**20)
    assert task(0, (8, 8)).flops < 2 * FLOPS_PER_BYTE * 8 * 8 * 4 and set(crowded.owners) == {1}


def test_owners_swap_matrices_where_no_single_move_helps() -> None:
    sizes = [3, 3, 2, 2, 2]  # costliest first, each to the rank that is done first: 3+2+2 and 3+2; no single move helps
    shapes = [(64, 64)] * len(sizes)
    tasks = [MatrixTask(**{**vars(task(k, s)), "flops": size * 10**12}) for k, (s, size) in enumerate(zip(shapes, sizes, strict=True))]
    plan = make_plan([rows(*s, 2) for s in shapes], tasks, n_ranks=2, bucket_bytes=2**20)
    assert plan.imbalance() == 1.0


@pytest.mark.parametrize("bucket_bytes", [2**30, 3 * 2**20])
def test_buckets_are_as_large_as_hides_most_of_the_travelling(bucket_bytes: int) -> None:
    shapes = [(512, 512)] * 64  # 1 MiB each: 32 MiB per owner, twice that travels; a pair of all-to-alls costs as much as 4 MiB
    work = [task(k, s) for k, s in enumerate(shapes)]
    plan = make_plan([rows(*s, 2) for s in shapes], work, n_ranks=2, bucket_bytes=bucket_bytes)
    waiting = {k: 2 * 32 / k + 4 * k for k in range(1, 33)}
    assert len(plan.buckets) == (min(waiting, key=waiting.get) if bucket_bytes == 2**30 else 11)
    alone = make_plan([rows(*s, 1) for s in shapes], work, n_ranks=1, bucket_bytes=bucket_bytes)  # nothing travels
    assert len(alone.buckets) == -(-64 * 2**20 // bucket_bytes)


def test_buckets_hold_what_one_owner_may_receive_and_a_larger_matrix_is_its_own() -> None:
    shapes = [(32, 32)] * 8 + [(8, 8)] * 8
    plan = make_plan([rows(*s, 2) for s in shapes], [task(k, s) for k, s in enumerate(shapes)], n_ranks=2, bucket_bytes=1024)
    for bucket in plan.buckets:
        for owner in (0, 1):
            own = [plan.matrices[i] for i in bucket if plan.owners[i] == owner]
            assert len(own) == 1 or sum(t.wire_bytes for t in own) <= 1024
    assert max(len(b) for b in plan.buckets) <= 8 and len(plan.buckets) == 5  # 4 large ones each, then 4 small ones each at once


def llama(dp: int, tp: int, zero: int) -> tuple[Plan, list[int], list[int]]:
    return plan_model(model_parameters("configs/models/llama-8b.json"), dp=dp, tp=tp, zero=zero, ns_steps=5, options=PlanOptions())


@pytest.mark.parametrize(("dp", "tp", "zero"), [(4, 2, 0), (8, 1, 0), (4, 2, 1), (2, 16, 1), (4, 2, 3)])
def test_plans_of_llama_8b_add_up(dp: int, tp: int, zero: int) -> None:
    plan, state, adamw = llama(dp, tp, zero)
    parameters = model_parameters("configs/models/llama-8b.json")
    elements = sum(math.prod(p.shape) for p in parameters)
    assert elements == 8_030_261_248  # as published
    muon = sum(math.prod(p.shape) for p in parameters if p.route.view is not None)
    assert sum(t.numel for t in plan.matrices) == muon == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    for place in plan.placements:
        held = sum(map(fragment_numel, place.fragments))
        copies = dp if zero == 0 else 1
        kv = max(1, tp // 8) if ("k_proj" in place.name or "v_proj" in place.name) else 1
        assert held == copies * kv * math.prod(place.shape)
    loads = plan.loads()
    assert sum(load.bytes_sent for load in loads) == sum(load.bytes_received for load in loads)
    assert plan.imbalance() <= 1.15 * plan.imbalance_lower_bound()
    if zero == 3:  # evenly sharded: 4(P/N)(N−1)/N bytes in bf16, each way counted where it is received
        n = dp * tp
        assert sum(load.bytes_received for load in loads) <= 4 * muon * (n - 1) / n * 1.001
    if zero == 0 and tp == 1:  # the momentum of replicas lives with owners
        rest = elements - muon
        assert sum(state) == 4 * muon + 8 * dp * rest and sum(adamw) == 8 * dp * elements


def test_zero_1_moves_little_because_most_matrices_lie_with_one_rank() -> None:
    flat, sharded = (sum(load.bytes_sent for load in llama(4, 1, zero)[0].loads()) for zero in (1, 3))
    assert flat < 0.35 * sharded


def test_thousands_of_ranks_take_seconds() -> None:
    started = time.monotonic()
    plan, _, _ = llama(512, 8, 3)
    assert plan.n_ranks == 4096 and len(plan.loads()) == 4096
    assert time.monotonic() - started < 30


def test_replicated_parameters_have_one_owner_each() -> None:
    place = Placement(name="qkv", shape=(12, 4), fragments=((whole((12, 4)),),) * 3, replicated=True)
    tasks = [task(0, (4, 4), rows=(k, k + 4)) for k in (0, 4, 8)]
    plan = make_plan([place], tasks, n_ranks=3, bucket_bytes=2**20)
    assert len(set(plan.owners)) == 1 and not plan.gathers(0) and plan.scatters(0)
    assert sum(box_numel(piece.box) for pieces in plan.pieces for piece in pieces) == 48


def bound_gpt(zero: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The quickstart's model bound for real, as replicas or under FSDP2, with bf16 on the wire as the command assumes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from muon_dist import MuonDist, build_param_groups

    model = torch.nn.Module()
    for p in model_parameters("configs/models/gpt-5m.json"):
        at = model
        *path, last = p.name.split(".")
        for part in path:
            at = getattr(at, part, None) or at.register_module(part, torch.nn.Module()) or getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(torch.zeros(p.shape)))
    if zero == 3:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = MuonDist(build_param_groups(model, split={"qkv": (256, 256, 256)}), ns_steps=5, wire_dtype="bf16", compute_dtype="bf16")
    optimizer.bind()
    plan = optimizer.engine.domains[0].plan
    owned = [sum(t.flops for t, o in zip(plan.matrices, plan.owners, strict=True) if o == r) for r in range(2)]
    return owned, [(load.bytes_sent, load.bytes_received) for load in plan.loads()]


@pytest.mark.parametrize("zero", [0, 3])
def test_the_command_plans_what_the_optimizer_does(zero: int) -> None:
    parameters = model_parameters("configs/models/gpt-5m.json")
    plan, state, adamw = plan_model(parameters, dp=2, tp=1, zero=zero, ns_steps=5, options=PlanOptions(), device_type="cpu")
    loads = plan.loads()
    for flops, traffic in run_ranks(2, bound_gpt, zero):
        assert flops == [load.flops for load in loads]
        assert traffic == [(load.bytes_sent, load.bytes_received) for load in loads]
    if zero == 3:
        muon = sum(t.numel for t in plan.matrices)
        elements = sum(math.prod(p.shape) for p in model_parameters("configs/models/gpt-5m.json"))
        assert state == [4 * muon // 2 + 8 * (elements - muon) // 2] * 2 and adamw == [8 * elements // 2] * 2


def test_the_peak_counts_buffers_matrices_and_workspace() -> None:
    """One 8 × 4 matrix in two halves, owned by rank 0, with a workspace of 1,000 bytes."""
    place = rows(8, 4, 2)
    work = task(0, (8, 4))
    plan = make_plan([place], [MatrixTask(**{**vars(work), "workspace": 1000})], n_ranks=2, bucket_bytes=2**20)
    owner, other = plan.owners[0], 1 - plan.owners[0]
    assert plan.loads()[owner].peak_bytes == 8 * 4 * 4 + 1000 + 64  # the matrix, the workspace, half of it in a wire buffer
    assert plan.loads()[other].peak_bytes == 64
