"""What is chosen from a spectrum, when matrices are measured, and the record of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from muon_dist import choose_schedule, orthogonalize
from muon_dist.polar.polynomials import schedule_for, widest_schedule
from muon_dist.polar.products import products_on
from muon_dist.spectrum import record
from muon_dist.spectrum.moments import QUANTILES, spectrum_from_moments, spectrum_from_quantiles
from muon_dist.spectrum.policy import ACCURACIES, FIVE, HYSTERESIS, Policy, Work
from muon_dist.spectrum.record import Choice, Decision, blank_rows, read_rows
from muon_dist.spectrum.timetable import are_due, turn_of

from .test_spectrum import SPECTRA, falling, gains, planted

EARLY = falling(200, 3.5, (60.0, 30.0, 20.0, 10.0))  # as in the first steps of training
WORK = Work(200, 260, torch.float32, products_on("cpu"))


def error_of(x: torch.Tensor, schedule: object) -> float:
    s, g = gains(x, orthogonalize(x, schedule=schedule))  # type: ignore[call-overload]
    return float(np.sqrt(np.mean((g - 1)[s > 1e-4] ** 2)))


# ---------------------------------------------------------------------------------------------------------- choose_schedule


@pytest.mark.parametrize("shape", [(200, 200), (200, 700), (330, 200)])
@pytest.mark.parametrize("name", [*SPECTRA, "early"])
@pytest.mark.parametrize("accuracy", ["jordan4", "jordan5", "jordan3", "jordan8"])
def test_no_further_from_the_polar_factor_than_jordan_steps_and_never_dearer(name: str, accuracy: str, shape: tuple[int, int]) -> None:
    x = planted({**SPECTRA, "early": EARLY}[name], *shape, dtype=torch.float32)
    chosen, reference = choose_schedule(x, accuracy=accuracy), schedule_for("jordan", int(accuracy[-1]))
    work = Work(*shape, torch.float32, products_on("cpu"))
    assert work.flops(chosen) <= work.flops(reference)
    # where all singular values are alike the error is that of one gain, which no estimate tells exactly
    most = 1.5 * error_of(x, reference) + 0.02 if name == "flat" else 1.1 * error_of(x, reference) + 1e-3
    assert error_of(x, chosen) <= most
    assert chosen.error == pytest.approx(error_of(x, chosen), rel=0.4, abs=0.08 if name == "flat" else 0.03)


def test_a_steep_spectrum_costs_half_of_five_jordan_steps_and_deflation_is_why() -> None:
    x = planted(EARLY, 200, 260, dtype=torch.float32)
    chosen = choose_schedule(x)
    assert chosen.deflation > 0 and WORK.flops(chosen) < 0.6 * WORK.flops(FIVE)
    assert WORK.flops(choose_schedule(x, deflation=0)) > 1.5 * WORK.flops(chosen)


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("coverage", [0.5, 0.75, 0.9, 0.99])
def test_choose_schedule_is_the_cheapest_that_covers(name: str, coverage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = planted(SPECTRA[name], 200, 260, dtype=torch.float32)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a decomposition was computed")

    with monkeypatch.context() as patched:
        for place in (torch.linalg, torch, np.linalg):
            for function in ("svd", "svdvals", "eigh", "eigvalsh", "eig", "eigvals"):
                if hasattr(place, function):
                    patched.setattr(place, function, refuse)
        chosen = choose_schedule(x, coverage=coverage, deflation=0)
        deflated = choose_schedule(x, coverage=coverage)
    assert WORK.flops(deflated) <= WORK.flops(chosen)
    for schedule in (chosen, deflated):
        s, g = gains(x, orthogonalize(x, schedule=schedule))
        covered = (np.abs(g - 1) <= 0.3)[s > 1e-4].mean()
        assert covered >= coverage - (0.02 if not schedule.deflation else 0.06)
        assert schedule.coverage == pytest.approx(covered, abs=0.03 if not schedule.deflation else 0.15)
    if len(chosen.steps) > 1:
        fewer = orthogonalize(x, schedule=widest_schedule(len(chosen.steps) - 1, 0.28))
        assert (np.abs(gains(x, fewer)[1] - 1) <= 0.3)[s > 1e-4].mean() < coverage + 0.02
    assert chosen.quantiles is not None and chosen.quantiles[0.5] == pytest.approx(s[99], rel=0.1)


def test_directions_below_the_noise_floor_are_not_paid_for() -> None:
    sigma = falling(200, 1.5)
    sigma[120:] = 1e-7  # 40% of them
    x = planted(sigma, 200, 260)
    assert len(choose_schedule(x, coverage=0.9)) <= 4
    assert len(choose_schedule(x, coverage=0.9, floor=1e-8)) > 8


def test_choose_schedule_takes_any_dtype_and_what_is_hard() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = planted(SPECTRA["mild"], 200, 210).to(dtype)
        assert 2 <= len(choose_schedule(x)) <= 4 and orthogonalize(x, schedule=choose_schedule(x)).dtype == dtype
    zero = choose_schedule(torch.zeros(5, 5))
    assert (len(zero), zero.error, zero.coverage) == (1, 0.0, 1.0)
    assert len(choose_schedule(torch.randn(1, 9))) >= 1
    limited = choose_schedule(planted(SPECTRA["steep"], 200, 200), max_steps=1)
    assert len(limited) == 1 and limited.error is not None and limited.error > 0.5
    both = torch.stack([planted(SPECTRA["mild"], 200, 200), planted(EARLY, 200, 200)])
    together, work = choose_schedule(both, coverage=0.9), Work(200, 200, torch.float64, products_on("cpu"))
    assert all(work.flops(together) >= work.flops(choose_schedule(x, coverage=0.9)) for x in both)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": 0}, "coverage"),
        ({"coverage": 1.1}, "coverage"),
        ({"accuracy": "jordan2"}, "jordan3, jordan4"),
        ({"accuracy": "jordan5", "coverage": 0.9}, "two ways to say"),
        ({"tol": 0.2}, "give coverage as well"),
        ({"coverage": 0.9, "tol": 0}, "tol"),
        ({"deflation": -1}, "deflation"),
        ({"max_steps": 0}, "max_steps"),
        ({"floor": -1}, "floor"),
        ({"x": torch.zeros(0, 4)}, "elements"),
        ({"x": torch.full((3, 3), float("nan"))}, "finite"),
        ({"x": torch.zeros(3)}, "matrices"),
    ],
)
def test_choose_schedule_refuses_what_makes_no_sense(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_schedule(**{"x": torch.eye(4), **options})


# ------------------------------------------------------------------------------------------------------------------ policy


def test_everything_that_may_be_chosen_is_within_the_price_of_the_jordan_steps() -> None:
    for accuracy, shape in itertools.product(ACCURACIES, [(64, 64), (512, 512), (512, 2048), (7, 9), (1, 5)]):
        policy, work = Policy(accuracy=accuracy), Work(*shape, torch.float32, products_on("cpu"))
        assert policy.reference is not None
        costs = [cost for cost, _ in policy.choices(work)]
        assert costs == sorted(costs) and costs[-1] <= work.flops(policy.reference)
        assert (work.flops(policy.reference), Choice(0, len(policy.reference), 0.0)) in policy.choices(work)
        assert work.flops(policy.schedule(policy.prior("blocks.0.attn.q.weight", 0, 1, 0.5, work))) <= work.flops(FIVE)
    work = Work(512, 2048, torch.float32, products_on("cpu"))
    assert {c.deflation for _, c in Policy().choices(work)} == {0, 16, 32, 64}  # a 64th would be 8
    fewest = [
        min(c.steps for _, c in p.choices(work)) for p in (Policy(), Policy(coverage=0.9), Policy(max_ns_steps=1), Policy(min_ns_steps=3))
    ]
    assert fewest == [2, 1, 1, 3]
    assert {c.deflation for _, c in Policy().choices(Work(64, 64, torch.float32, products_on("cpu")))} == {0, 8}
    assert {c.deflation for _, c in Policy().choices(Work(7, 64, torch.float32, products_on("cpu")))} == {0}


@pytest.mark.parametrize("name", [*SPECTRA, "early"])
def test_of_what_costs_the_same_the_nearest_is_taken(name: str) -> None:
    spectrum = spectrum_from_quantiles(
        {q: float({**SPECTRA, "early": EARLY}[name][int(200 * q)]) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}, 200
    )
    policy, asked = Policy(), spectrum.error(schedule_for("jordan", 4))
    best = policy.best([spectrum], WORK)
    costs = {choice: cost for cost, choice in policy.choices(WORK)}
    errors = {c: spectrum.error(policy.schedule(c)) for c in costs}
    assert errors[best] == min(errors[c] for c in costs if costs[c] == costs[best])
    for c in costs:
        if costs[c] == costs[best] and errors[c] <= asked:
            kept = policy.best([spectrum], WORK, now=c) == c  # from another band, unless that gains little
            assert kept == (errors[c] - errors[best] < HYSTERESIS * asked)


def test_the_first_step_is_never_dearer_than_five_jordan_steps_whatever_is_asked() -> None:
    for policy in (Policy(coverage=0.99), Policy(accuracy="jordan8"), Policy()):
        for shape in ((128, 128), (128, 512), (1024, 1024)):
            work = Work(*shape, torch.float32, products_on("cpu"))
            prior = policy.prior("blocks.3.mlp.down.weight", 0, 1, 1.0, work)
            assert work.flops(policy.schedule(prior)) <= work.flops(FIVE)
            assert work.flops(policy.schedule(policy.to_measure(prior, work, floor=False))) <= work.flops(FIVE)


def test_decisions_don_t_flicker() -> None:
    spectrum = spectrum_from_quantiles({0.1: 0.1, 0.5: 0.02, 0.9: 0.004}, 200)
    for policy in (Policy(), Policy(coverage=0.9)):
        best = policy.best([spectrum], WORK)
        assert policy.best([spectrum], WORK, now=best) == best
        costs = {choice: cost for cost, choice in policy.choices(WORK)}
        dearer = [c for c in costs if costs[c] > costs[best] and policy.best([spectrum], WORK, now=c) == c]
        quality = policy._quality([spectrum], WORK, None)
        for c in dearer:  # what is kept is hardly dearer, or the cheaper one is hardly good enough
            assert quality(c) >= 0 and (costs[best] > (1 - HYSTERESIS) * costs[c] or quality(best) < HYSTERESIS)
        far = max(costs, key=lambda c: costs[c])
        assert quality(best) < HYSTERESIS or policy.best([spectrum], WORK, now=far) == best
    coverages = {k: spectrum.coverage(widest_schedule(k, 0.28)) for k in range(2, 8)}
    k = next(k for k, value in coverages.items() if value >= 0.5)
    policy = Policy(coverage=coverages[k] - 0.01, deflation=0)  # reached by k, but by less than the hysteresis
    now = Choice(0, k + 1, 0.28)
    assert policy.best([spectrum], WORK).steps == k and policy.best([spectrum], WORK, now=now) == now
    assert Policy(coverage=coverages[k] - 0.03, deflation=0).best([spectrum], WORK, now=now).steps <= k


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": 0.0}, "coverage"),
        ({"coverage": 1.01}, "coverage"),
        ({"coverage": True}, "coverage"),
        ({"coverage": 0.9, "tol": 1.0}, "tol"),
        ({"accuracy": "five"}, "accuracy='five'"),
        ({"accuracy": 5}, "accuracy=5"),
        ({"min_ns_steps": 6, "max_ns_steps": 4}, "above"),
        ({"max_ns_steps": 99}, "at most"),
        ({"measure_every": 1}, "measure_every"),
        ({"burn_in": -1}, "burn_in"),
        ({"deflation": 1.5}, "deflation"),
        ({"polynomial": "cans"}, "generates its polynomials"),
    ],
)
def test_policies_that_make_no_sense_raise(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Policy(**options)


def test_a_measurement_shows_what_the_next_decision_needs() -> None:
    """Measured with one step more than it takes, a spectrum tells the errors of all that may be chosen, to within a quarter."""
    x, policy = planted(falling(200, 2.5, (8.0, 3.0)), 200, 260, dtype=torch.float32), Policy(accuracy="jordan5")
    for now in (Choice(12, 2, 0.2), Choice(25, 2, 0.28), Choice(6, 3, 0.2)):
        schedule = policy.schedule(policy.to_measure(now, WORK, floor=False))
        assert len(schedule) == now.steps + 1
        _, moments = orthogonalize(x, schedule=schedule, return_moments=True)
        spectrum = spectrum_from_moments(moments.numpy(), schedule, 200)
        assert spectrum is not None
        assert spectrum.error(FIVE) == pytest.approx(error_of(x, FIVE), rel=0.1)
        choice = policy.best([spectrum], WORK)
        assert error_of(x, policy.schedule(choice)) <= 1.1 * error_of(x, FIVE)


def test_the_share_below_the_floor_is_kept_only_where_it_is_measured_again() -> None:
    spectrum, deep = (spectrum_from_quantiles({0.1: 0.1, 0.5: 0.02, 0.9: low}, 200) for low in (0.004, 1e-6))
    for policy, kept in ((Policy(coverage=0.9), True), (Policy(), False)):
        first = policy.decide(deep, WORK, Decision(choice=policy.prior("", 0, 1, 0.5, WORK)), reaches_floor=True)
        second = policy.decide(spectrum, WORK, first, reaches_floor=False)
        assert first.below > 0.1 and second.measurements == 2
        assert (second.below == first.below) == kept
        if not kept:
            assert second.error == spectrum.error(policy.schedule(second.choice))


# --------------------------------------------------------------------------------------------------------------- timetable


def due_steps(turns: list[float], every: int, burn_in: int, steps: int) -> list[list[int]]:
    """At which steps each matrix is measured."""
    count = len(turns)
    full = [np.full(count, v) for v in (every, burn_in)]
    found: list[list[int]] = [[] for _ in range(count)]
    for step in range(steps):
        for matrix in np.flatnonzero(are_due(np.full(count, step), np.array(turns), *full)).tolist():
            found[matrix].append(step)
    return found


def test_matrices_are_measured_often_at_first_and_then_once_in_a_period() -> None:
    (alone,) = due_steps([0.0], 50, 0, 260)
    assert alone == [0, 1, 3, 7, 15, 31, 49, 99, 149, 199, 249]  # the steps 1, 2, 4, 8, 16, 32, and then every 50
    (late,) = due_steps([0.0], 50, 10, 120)
    assert late == [10 + s for s in (0, 1, 3, 7, 15, 31, 49, 99)]
    many = due_steps([k / 100 for k in range(100)], 50, 0, 400)
    assert all(12 <= len(each) <= 14 for each in many)
    at = np.bincount(np.concatenate(many), minlength=400)
    assert at[0] == 100 and set(at[1:3]) == {50} and set(at[3:7]) == {25} and max(at[7:15]) <= 13
    assert max(at[100:]) <= 3  # a period's measurements are spread over it


def test_turns_are_told_by_names_and_spread() -> None:
    turns = sorted(turn_of(f"model.layers.{k}.{kind}.weight/0") for k in range(40) for kind in ("q_proj", "up_proj", "down_proj"))
    assert 0 <= turns[0] < 0.05 and 0.95 < turns[-1] < 1 and max(b - a for a, b in itertools.pairwise(turns)) < 0.06
    assert turn_of("layers.0.up/0") == turn_of("layers.0.up/0") != turn_of("layers.0.up/1")


# ------------------------------------------------------------------------------------------------------------------ record


def test_a_decision_comes_back_from_its_numbers() -> None:
    decision = Decision(choice=Choice(16, 3, 0.28), measurements=4, error=0.2, error_of_five=0.25, coverage=0.8, quantiles=(0.1,) * 5)
    again = Decision.of(np.array(decision.numbers()))
    assert again.numbers()[:6] == decision.numbers()[:6] and math.isnan(again.below)
    assert len(decision.numbers()) == record.WIDTH_OF_DECISION and again.choice == Choice(16, 3, 0.28)


def test_rows_are_read_back_and_those_of_version_1_too() -> None:
    rows = blank_rows(2)
    rows[:, record.IN_FORCE] = Decision(choice=Choice(8, 2, 0.2), measurements=3).numbers()
    read = read_rows(torch.from_numpy(rows), "w", deflation=0, tol=0.28)
    np.testing.assert_array_equal(read, rows)
    old = torch.full((1, 79), math.nan, dtype=torch.float64)  # taken, steps, measurements, below, coverage, quantiles, at, with, moments
    old[0, :10] = torch.tensor([120.0, 4, 2, 0.01, 0.93, 0.2, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
    old[0, 10] = -1
    (row,) = read_rows(old, "w", deflation=4, tol=0.28)
    decision = Decision.of(row[record.IN_FORCE])
    assert row[0] == record.VERSION and row[record.TAKEN] == 120 and row[record.MEASURED_AT] == row[record.DECIDED_AT] == -1
    assert decision.choice == Choice(4, 4, 0.28) and decision.measurements == 2
    assert (decision.coverage, decision.below) == (0.93, 0.01) and decision.quantiles == (0.2, 0.1, 0.05, 0.02, 0.01)
    assert len(QUANTILES) == 5
    blank = torch.full((1, 79), math.nan, dtype=torch.float64)
    blank[0, 0] = 0
    assert math.isnan(read_rows(blank, "w", deflation=0, tol=0.28)[0, record.STEPS])


@pytest.mark.parametrize("given", [torch.zeros(2, 30), torch.zeros(record.ROW_WIDTH), torch.full((1, record.ROW_WIDTH), 3.0)])
def test_rows_of_another_form_raise_and_say_what_to_do(given: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up: the measured spectra .* version 1.*measured anew"):
        read_rows(given, "layers.0.up", deflation=0, tol=0.28)


def test_schedules_of_choices_are_what_they_say() -> None:
    assert Policy().schedule(Choice(0, 5, 0.0)) == FIVE
    assert Policy().schedule(Choice(7, 3, 0.2)) == dataclasses.replace(widest_schedule(3, 0.2), deflation=7)
