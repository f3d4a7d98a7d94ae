"""What a step costs, counted: orthogonalisations, collectives by kind, bytes on the wire, state, and what overlaps."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from muon_dist import MuonDist
from muon_dist.spectrum.policy import Policy
from muon_dist.spectrum.record import Choice

from . import models
from .ranks import run_ranks
from .recording import Collectives, Recorder


def one_step(placement: str, shapes: list[tuple[int, int]], bucket_mb: float) -> dict:
    model = models.place(models.make_bank(shapes, torch.float32), placement)
    optimizer = MuonDist(model.named_parameters(), bucket_mb=bucket_mb, ns_steps=5)
    models.backward(model, 0, placement)
    optimizer.step()  # binds and allocates
    models.backward(model, 1, placement)
    with Recorder() as recorder, Collectives() as collectives:
        optimizer.step()
    plan, me = optimizer.engine.domains[0].plan, optimizer.engine.domains[0].me
    state = {
        key: sum(
            (v.to_local() if isinstance(v, DTensor) else v).numel() for s in optimizer.state.values() for k, v in s.items() if k == key
        )
        for key in ("momentum_buffer", "exp_avg")
    }
    return {
        "matrices": recorder.matrices,
        "events": recorder.events,
        "bytes": (recorder.bytes_sent, recorder.bytes_received),
        "planned": (plan.loads()[me].bytes_sent, plan.loads()[me].bytes_received),
        "collectives": Counter(collectives.names),
        "buckets": len(plan.buckets),
        "domains": len(optimizer.engine.domains),
        "state": state,
        "keys": [sorted(s) for s in optimizer.state.values()],
        "owned": len([o for o in plan.owners if o == me]),
        "imbalance": (plan.imbalance(), plan.imbalance_lower_bound()),
    }


CASES = [("replicas", 2), ("replicas", 4), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4), ("hsdp", 4), ("tp", 2)]


@pytest.mark.parametrize(("placement", "world"), CASES)
def test_every_matrix_is_orthogonalised_once_in_the_whole_job(placement: str, world: int) -> None:
    shapes = models.ODD if placement != "tp" else models.EVEN
    ranks = run_ranks(world, one_step, placement, shapes, 0.004)
    assert Counter(m for rank in ranks for m in rank["matrices"]) == Counter(shapes)


@pytest.mark.parametrize(("placement", "world"), CASES)
def test_a_step_sends_what_the_plan_says_in_one_all_to_all_each_way(placement: str, world: int) -> None:
    shapes = models.ODD if placement != "tp" else models.EVEN
    for rank in run_ranks(world, one_step, placement, shapes, 0.004):
        assert rank["bytes"] == rank["planned"]
        assert rank["domains"] == 1 and rank["buckets"] > 1
        ways = 1 if placement == "replicas" else 2  # replicas hold whole gradients: nothing to gather
        # besides, one small all-reduce of flags: nothing is gathered in hiding
        assert rank["collectives"] == {"alltoall_base_": ways * rank["buckets"], "allreduce_": 1}


@pytest.mark.parametrize("world", [2, 4])
def test_evenly_sharded_traffic_is_the_closed_form(world: int) -> None:
    shapes = [(64, 32)] * 8
    elements = 8 * 64 * 32
    for rank in run_ranks(world, one_step, "fsdp2", shapes, 64):
        # P matrix parameters over N ranks: (P/N)(N−1)/N in and as much out each way; 4 bytes in fp32
        assert rank["bytes"] == (2 * 4 * elements // world * (world - 1) // world,) * 2
        assert rank["imbalance"] == (1.0, 1.0)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_fsdp2_state_is_the_shards_of_each_rank(world: int) -> None:
    for rank, result in enumerate(run_ranks(world, one_step, "fsdp2", models.ODD, 64)):

        def rows(m: int, rank: int = rank) -> int:
            chunk = -(-m // world)
            return max(0, min(m - rank * chunk, chunk))

        assert result["state"] == {
            "momentum_buffer": sum(rows(m) * n for m, n in models.ODD),
            "exp_avg": sum(rows(m) for m, _ in models.ODD),
        }


@pytest.mark.parametrize(("placement", "world"), [("replicas", 3), ("fsdp2", 4)])
def test_momentum_takes_its_share_of_memory_and_every_rank_has_every_key(placement: str, world: int) -> None:
    ranks = run_ranks(world, one_step, placement, models.ODD, 64)
    total = sum(m * n for m, n in models.ODD)
    assert sum(rank["state"]["momentum_buffer"] for rank in ranks) == total
    assert max(rank["state"]["momentum_buffer"] for rank in ranks) < 0.6 * total
    assert all(rank["keys"] == ranks[0]["keys"] and ["momentum_buffer"] in rank["keys"] for rank in ranks)


@pytest.mark.parametrize("world", [2, 4])
def test_equal_shapes_are_one_batch(world: int) -> None:
    for rank in run_ranks(world, one_step, "fsdp2", [(24, 40)] * 8, 64):
        assert [detail for kind, detail in rank["events"] if kind == "ns"] == [(8 // world, 24, 40)]


@pytest.mark.parametrize("world", [2, 3])
def test_the_next_bucket_travels_while_this_one_is_orthogonalised(world: int) -> None:
    for rank in run_ranks(world, one_step, "fsdp2", [(32, 32)] * (6 * world), 0.004):  # one matrix per owner and bucket
        assert rank["buckets"] == 6
        events = rank["events"]
        # launches: gather 0, then for every bucket i: gather i+1, scatter i; the last has only its scatter
        gathers = [0, *range(1, 11, 2)]
        ns_starts = [k for k, (kind, _) in enumerate(events) if kind == "ns"]
        ns_ends = [k for k, (kind, _) in enumerate(events) if kind == "ns end"]
        assert len(ns_starts) == 6
        for bucket in range(5):
            following = gathers[bucket + 1]
            assert events.index(("launch", following)) < ns_starts[bucket], "launched only after this bucket's Newton–Schulz"
            assert events.index(("wait", following)) > ns_ends[bucket], "waited for before this bucket's Newton–Schulz ended"
        launched = {number for kind, number in events if kind == "launch"}
        assert launched == {number for kind, number in events if kind == "wait"}  # no handle is dropped


def missing_gradients(placement: str, missing_on: tuple[int, ...], name: str) -> dict:
    model = models.place(models.make_bank(models.ODD, torch.float64), placement)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.1, ns_steps=5)
    for seed in (0, 1):
        models.backward(model, seed, placement)
        parameters = dict(model.named_parameters())
        gradient = models.whole(parameters[name].grad)
        before = models.whole_parameters(model)
        state = [models.whole(v) for v in optimizer.state[parameters[name]].values() if v.numel()] if seed else []
        if dist.get_rank() in missing_on:
            parameters[name].grad = None
        optimizer.step()
    after = models.whole_parameters(model)
    states = [models.whole(v) for v in optimizer.state[parameters[name]].values() if v.numel()]
    moved = {n: float((after[n] - before[n]).norm()) for n in after}
    return {
        "moved": moved,
        "state_same": len(states) == len(state) and all(torch.equal(a, b) for a, b in zip(states, state, strict=True)),
        "after": after,
        "gradient": gradient,
    }


@pytest.mark.parametrize("name", ["layers.5.weight", "layers.5.bias"])
@pytest.mark.parametrize(("placement", "world"), [("fsdp2", 3), ("mixed", 2)])
def test_a_gradient_missing_everywhere_leaves_the_parameter_alone(placement: str, world: int, name: str) -> None:
    for rank in run_ranks(world, missing_gradients, placement, tuple(range(world)), name):
        assert rank["moved"].pop(name) == 0.0 and rank["state_same"]  # no decay, no momentum, no step count
        assert all(distance > 0 for distance in rank["moved"].values())


def missing_on_some(missing_on: tuple[int, ...]) -> float:
    """A sharded parameter whose gradient is None on some ranks, against the reference fed zeros there."""
    from .reference import ReferenceMuon

    model = models.place(models.make_bank(models.ODD, torch.float64), "fsdp2")
    parameters = models.whole_parameters(model)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, ns_steps=5)
    reference = ReferenceMuon(parameters, models.muon_names(parameters), lr=1.0, weight_decay=0.0)
    worst = 0.0
    for seed in range(2):
        models.backward(model, seed, "fsdp2")
        for name, p in model.named_parameters():
            if name.startswith(("layers.0.", "layers.5.")) and dist.get_rank() in missing_on:
                p.grad.to_local().zero_()
        gradients = models.whole_gradients(model)
        for name, p in model.named_parameters():
            if name.startswith(("layers.0.", "layers.5.")) and dist.get_rank() in missing_on:
                p.grad = None
        before = models.whole_parameters(model)
        reference.parameters = {n: p.clone() for n, p in before.items()}
        reference.step(gradients)
        optimizer.step()
        worst = max(worst, *models.relative_errors(before, models.whole_parameters(model), reference.parameters).values())
    return worst


@pytest.mark.parametrize("missing_on", [(0,), (1, 2)])
def test_a_gradient_missing_on_some_ranks_counts_as_zero_there(missing_on: tuple[int, ...]) -> None:
    assert max(run_ranks(3, missing_on_some, missing_on)) <= 1e-10


def nonfinite_on_one_rank(placement: str, value: float, mode: str) -> dict:
    model = models.place(models.make_bank(models.ODD, torch.float32), placement)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, nonfinite=mode, ns_steps=5)
    models.backward(model, 0, placement)
    optimizer.step()
    before, states = models.whole_parameters(model), [{k: models.whole(v) for k, v in s.items()} for s in optimizer.state.values()]
    models.backward(model, 1, placement)
    if dist.get_rank() == dist.get_world_size() - 1:
        grad = next(p.grad for p in model.parameters() if models.local(p.grad).numel())
        models.local(grad).view(-1)[0] = value
    error = ""
    try:
        optimizer.step()
    except ValueError as e:
        error = str(e)
    same = all(torch.equal(a, b) for a, b in zip(before.values(), models.whole_parameters(model).values(), strict=True))
    same &= all(torch.equal(models.whole(v), s[k]) for s, now in zip(states, optimizer.state.values(), strict=True) for k, v in now.items())
    skipped = optimizer.skipped_steps
    models.backward(model, 2, placement)
    optimizer.step()
    finite = all(p.isfinite().all() for p in models.whole_parameters(model).values())
    moved = all((a != b).any() for a, b in zip(before.values(), models.whole_parameters(model).values(), strict=True))
    return {"same": same, "skipped": skipped, "finite": finite, "moved": moved, "error": error}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("placement", "world"), [("replicas", 1), ("replicas", 2), ("fsdp2", 3), ("fsdp2_tp", 4)])
def test_one_overflow_on_one_rank_skips_the_step_on_all_and_touches_no_state(placement: str, world: int, value: float) -> None:
    if placement == "fsdp2_tp":
        world_result = run_ranks(world, nonfinite_wide, value)
    else:
        world_result = run_ranks(world, nonfinite_on_one_rank, placement, value, "skip")
    for rank in world_result:
        assert rank == {"same": True, "skipped": 1, "finite": True, "moved": True, "error": ""}


def nonfinite_wide(value: float) -> dict:
    models.ODD = models.WIDE  # FSDP2 refuses empty tensor-parallel shards
    return nonfinite_on_one_rank("fsdp2_tp", value, "skip")


def test_nonfinite_raise_raises_on_every_rank_and_names_the_parameter_where_it_is() -> None:
    ranks = run_ranks(2, nonfinite_on_one_rank, "fsdp2", float("nan"), "raise")
    assert "another rank" in ranks[0]["error"] and "layers.0.weight" in ranks[1]["error"]
    assert all(rank["same"] and rank["moved"] for rank in ranks)


def torn_replicas(missing_on: int, name: str) -> dict:
    """A gradient that only some replicas have: they would drift apart if each went on with what it has."""
    torch.manual_seed(0)
    parameters = {
        "w0": torch.nn.Parameter(torch.randn(4, 6)),
        "w1": torch.nn.Parameter(torch.randn(6, 4)),
        "b": torch.nn.Parameter(torch.randn(5)),
    }
    results = []
    for mode in ("skip", "raise"):
        optimizer = MuonDist(parameters.items(), lr=0.1, nonfinite=mode, ns_steps=5)
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        if dist.get_rank() == missing_on:
            parameters[name].grad = None
        before = {n: p.detach().clone() for n, p in parameters.items()}
        try:
            optimizer.step()
            error = ""
        except ValueError as e:
            error = str(e)
        same = all(torch.equal(before[n], p) for n, p in parameters.items())
        results.append((same, optimizer.skipped_steps, error))
    return results


@pytest.mark.parametrize("name", ["w0", "w1", "b"])
@pytest.mark.parametrize("missing_on", [0, 1])
def test_a_gradient_that_only_some_replicas_have_skips_the_step_on_all(missing_on: int, name: str) -> None:
    for skipping, raising in run_ranks(2, torn_replicas, missing_on, name):
        assert skipping == (True, 1, "")
        assert raising[0] and "only some replicas have it" in raising[2]


def missing_where_it_is_held() -> list[float]:
    """One row over two ranks: the rank that holds it has no gradient, the other has an empty one."""
    model = models.place(models.make_bank([(1, 5), (4, 4)], torch.float32), "fsdp2")
    optimizer = MuonDist(model.named_parameters(), lr=0.1, ns_steps=5)
    for seed in (0, 1):
        models.backward(model, seed, "fsdp2")
        bias = model.layers[0].bias
        if seed and dist.get_rank() == 0:
            bias.grad = None
        optimizer.step()
    return [float(optimizer.state[p]["step"]) for p in (bias, model.layers[1].bias)]


def test_an_empty_shard_has_no_say_in_whether_there_is_a_gradient() -> None:
    assert run_ranks(2, missing_where_it_is_held) == [[1.0, 2.0], [1.0, 2.0]]


def frozen(count: int) -> dict:
    """What a step takes of eight 12 × 8 matrices, of which so many were frozen after the first."""
    model = models.place(models.make_bank([(12, 8)] * 8, torch.float32), "fsdp2")
    optimizer = MuonDist(model.named_parameters(), ns_steps=5)
    models.backward(model, 0, "fsdp2")
    optimizer.step()
    before = {}
    for k, layer in enumerate(list(model.layers)[:count]):
        layer.weight.requires_grad_(False)
        before[k] = layer.weight.full_tensor().detach().clone()
    for seed in (1, 2):
        models.backward(model, seed, "fsdp2")
        with Recorder() as recorder:
            optimizer.step()
    kept = all(torch.equal(model.layers[k].weight.full_tensor(), value) for k, value in before.items())
    held = sum(entry["momentum_buffer"].to_local().numel() for entry in optimizer.state.values() if "momentum_buffer" in entry)
    return {"matrices": len(recorder.matrices), "sent": recorder.bytes_sent, "kept": kept, "held": held}


def test_frozen_matrices_neither_travel_nor_are_orthogonalised() -> None:
    """Their momentum stays, so that it can be saved."""
    everything = run_ranks(2, frozen, 0)
    assert [rank["matrices"] for rank in everything] == [4, 4]
    for count in (7, 8):
        ranks = run_ranks(2, frozen, count)
        assert sum(rank["matrices"] for rank in ranks) == 8 - count
        assert sum(rank["sent"] for rank in ranks) == sum(rank["sent"] for rank in everything) * (8 - count) // 8
        assert all(rank["kept"] for rank in ranks) and sum(rank["held"] for rank in ranks) == 8 * 12 * 8


def rerouted(world: int) -> tuple[int, int, int]:
    """Of how many buckets the route is made anew where the schedule of one matrix changes; of all; and on the other ranks."""
    from muon_dist import program as programs

    model = models.make_bank([(12, 8)] * 8, torch.float32)
    optimizer = MuonDist(model.named_parameters(), bucket_mb=0.0004, burn_in=100)
    models.backward(model, 0, "replicas")
    models.average_replicas(model)
    optimizer.step()
    (program,) = optimizer.engine.programs
    own, routed = programs.route_bucket, []
    programs.route_bucket = lambda plan, bucket, *rest: routed.append(bucket) or own(plan, bucket, *rest)
    try:
        before = [bucket.route for bucket in program.buckets]
        program.adaptation.schedules[0] = Policy().schedule(Choice(0, 3, 0.28))
        program.regroup([0])
    finally:
        programs.route_bucket = own
    same = sum(a is bucket.route for a, bucket in zip(before, program.buckets, strict=True))
    assert same == len(before) - len(routed) and program.batch_keys[0][1] == program.adaptation.schedules[0]
    return len(routed), len(before), int(program.domain.plan.owners[0] == program.domain.me)


@pytest.mark.parametrize("world", [1, 2])
def test_one_schedule_that_changes_makes_one_route_anew_where_its_matrix_is_worked_on(world: int) -> None:
    for routed, buckets, mine in run_ranks(world, rerouted, world):
        assert buckets > 2 and routed == mine
