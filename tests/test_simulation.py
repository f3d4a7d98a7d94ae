"""The simulated step: by hand where that is possible, by its own plan, and as the command prints it."""

import json
from pathlib import Path

import numpy as np
import pytest

from muon_dist.bench.scale import _job, calibrate, predict
from muon_dist.bench.simulation import Rates, Work, simulate
from muon_dist.cli.main import main
from muon_dist.groups import PlanOptions
from muon_dist.sharding.plan import BucketLoads

RATES = Rates(products=100.0, memory=1e30, link=10.0, start=0.0, host=0.0)


def loads(flops: list[list[int]], gather: list[list[int]], scatter: list[list[int]], pieces: int = 0, added_up: int = 0) -> BucketLoads:
    """(buckets, ranks) each; every rank sends as much as it receives."""
    work, arrive, leave = (np.array(values) for values in (flops, gather, scatter))
    both = [np.stack([t, t], axis=1) for t in (arrive, leave)]
    zeros = np.zeros_like(work)
    return BucketLoads(
        flops=work,
        gather=both[0],
        scatter=both[1],
        owned=np.ones_like(work),
        workspace=zeros,
        pieces=np.full_like(work, pieces),
        added_up=np.full(len(work), added_up),
    )


def step(work: BucketLoads, rates: Rates = RATES, held: int = 0, adamw: int = 0) -> float:
    n = work.flops.shape[1]
    return simulate([Work(loads=work, position=np.arange(n), held=np.full(n, held))], np.full(n, adamw), rates).step


def test_one_bucket_travels_is_orthogonalised_and_travels_back() -> None:
    one = loads([[300, 500]], [[20, 10]], [[10, 40]])
    assert step(one) == pytest.approx(20 / 10 + 500 / 100 + 40 / 10)
    assert step(one, Rates(**{**vars(RATES), "start": 0.5, "host": 0.25})) == pytest.approx(11 + 2 * 0.5)  # no pieces, no Python
    assert step(loads([[300, 500]], [[20, 10]], [[10, 40]], pieces=8), Rates(**{**vars(RATES), "host": 0.25})) == pytest.approx(11 + 2)
    assert step(loads([[300]], [[0]], [[0]])) == pytest.approx(3)  # one rank: nothing travels, nothing starts


def test_what_travels_hides_behind_the_products_where_it_may() -> None:
    buckets = loads([[500, 500]] * 3, [[10, 10]] * 3, [[10, 10]] * 3)
    assert step(buckets) == pytest.approx(1 + 3 * 5 + 1)  # first gather and last scatter
    assert step(buckets, Rates(**{**vars(RATES), "overlaps": False})) == pytest.approx(3 * (1 + 5 + 1))
    slow = loads([[50, 50]] * 3, [[10, 10]] * 3, [[10, 10]] * 3)  # the link is the limit: six all-to-alls, and what it waits for
    assert 6 <= step(slow) <= 6 + 3 * 0.5


def test_gram_matrices_of_slices_are_waited_for() -> None:
    assert step(loads([[100, 200]], [[0, 0]], [[0, 0]], added_up=15)) == pytest.approx(2 + 2 * 15 / 10)


def test_elementwise_work_counts_by_what_a_rank_stores() -> None:
    rates = Rates(**{**vars(RATES), "memory": 10.0})
    assert step(loads([[0, 0]], [[0, 0]], [[0, 0]]), rates, held=2, adamw=3) == pytest.approx(2 * 30 / 10 + 3 * 26 / 10)


def test_ranks_that_share_a_machine_share_its_rates() -> None:
    shared = RATES.shared_by(4)
    assert (shared.products, shared.link, shared.host) == (25.0, 2.5, 0.0)


def test_a_large_job_is_bound_by_its_largest_matrix_and_sends_what_its_plan_says() -> None:
    rates = Rates(products=400e12, memory=2.5e12, link=50e9, start=1e-4, host=1e-5)
    job = _job("llama-8b", tp=8)
    few, _, even = predict(job, 64, 5, rates, PlanOptions())
    many, sent, _ = predict(job, 1024, 5, rates, PlanOptions())
    assert many.newton_schulz == pytest.approx(4.4e12 / 400e12, rel=0.01)  # 4096 × 14336, one for each of its owners
    assert few.newton_schulz > 1.9 * many.newton_schulz and even <= 1.15
    # an owner of the largest gathers nearly all of it, in bf16, and sends nearly all of it back
    assert 0.9 * 2 * 4096 * 14336 <= sent <= 2 * 1.25 * 4096 * 14336
    assert many.step >= many.newton_schulz + many.waiting


def test_experts_are_spread_and_a_mixture_counts_its_active_parameters() -> None:
    job = _job("moe-1t", tp=1, experts_over=64)
    assert sum(np.prod(p.shape, dtype=float) for p in job.parameters) == pytest.approx(1.04e12, rel=0.02)
    assert 0.03 < job.active < 0.04
    timeline, _, even = predict(job, 64, 5, Rates(products=400e12, memory=2.5e12, link=50e9, start=1e-4, host=1e-5), PlanOptions())
    assert timeline.newton_schulz > 1 and even <= 1.15  # every rank has 6 whole experts of 60 layers


@pytest.mark.more("timing")
@pytest.mark.parametrize("models", [["llama-8b", "llama-70b"], ["llama-8b", "moe-1t"]])
def test_the_command_measures_here_before_it_predicts(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "scale.json", tmp_path / "p.png"
    sizes = ["--ranks", "64", "100", "--check-ranks", "1", "2", "--rounds", "1", "--json", str(out)]
    assert main(["bench", "scale", "--models", *models, *sizes, "--picture", str(picture)]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    few = {"llama-70b": "llama-70b needs a multiple of 8 ranks", "moe-1t": "moe-1t needs a multiple of 64 ranks"}[models[1]]
    assert "Inputs, not measured: 400 TFLOP/s" in printed and f"{few}: 100 left out" in printed
    assert [c["ranks"] for c in written["checks"]] == [1, 2]
    assert [(j["model"], j["ranks"]) for j in written["jobs"]] == [(model, 64) for model in models]
    assert picture.stat().st_size > 10_000
    assert main(["bench", "scale", "--link", "0"]) == 2


@pytest.mark.more("timing")
def test_what_is_predicted_of_this_machine_is_what_it_does() -> None:
    """Within a quarter on one rank, whose rates are measured; the best of three, since another test may run beside."""
    errors = []
    for _ in range(3):
        _, checks = calibrate([1], 5, 1)
        errors.append(abs(checks[0]["error"]))
        if errors[-1] < 0.25:
            return
    raise AssertionError(f"off by {errors}")
