"""The table of segments: what it holds is what trying finds, and no machine tries what it holds."""

import pytest
import torch

from muon_dist.polar import forms
from muon_dist.polar.coefficients import JORDAN
from muon_dist.polar.cost import segments_of
from muon_dist.polar.forms import PRECISIONS, cheapest_segments, derive, digest, name_of, schedules_of_the_table
from muon_dist.polar.polynomials import schedule_for, widest_schedule
from muon_dist.polar.products import SymmetricProducts
from muon_dist.polar.restarts import LONGEST, WORSE, how_much_worse, possible_segments
from muon_dist.spectrum.policy import BANDS, Policy, Work


def test_the_table_has_every_schedule_it_should_in_every_precision() -> None:
    """Coefficients come out the same on every machine, or their digest would not be found."""
    table = forms._table()
    assert {(digest(steps), name_of(p)) for _, steps in schedules_of_the_table() for p in PRECISIONS} == table.keys()
    lengths = {digest(steps): len(steps) for _, steps in schedules_of_the_table()}
    for (known, _), each in table.items():
        assert all(sum(segments) == lengths[known] and 1 < max(segments) <= LONGEST for segments in each)


def near_a_threshold(steps: tuple, precision: object, segments: tuple[int, ...]) -> bool:
    """Where machines that round unlike may come to other ends."""
    worst = [how_much_worse(steps, precision, segments), *(v for v in possible_segments(steps, precision).values())]  # type: ignore[arg-type]
    return any(abs(v / WORSE - 1) < 0.1 for v in worst)


@pytest.mark.parametrize("precision", PRECISIONS, ids=name_of)
@pytest.mark.parametrize(
    "steps",
    [
        schedule_for("jordan", 5).steps,
        schedule_for("polar_express", 5).steps,
        *(widest_schedule(k, tol).steps for tol in BANDS for k in (3, 4)),
    ],
    ids=["jordan", "polar express", *(f"{k} within {tol}" for tol in BANDS for k in (3, 4))],
)
def test_deriving_it_again_gives_the_same(steps: tuple, precision: object) -> None:
    derived, kept = set(derive(steps, precision)), set(forms._table()[digest(steps), name_of(precision)])  # type: ignore[arg-type]
    for segments in derived ^ kept:
        assert near_a_threshold(steps, precision, segments)


def test_what_may_be_chosen_is_priced_without_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("segments were tried")

    monkeypatch.setattr(forms, "best_segments", refuse)
    segments_of.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for device in ("cpu", "cuda"):
            work = Work(97, 130, dtype, SymmetricProducts(device))
            assert len(Policy(accuracy="jordan5", min_ns_steps=1).choices(work)) > 20
            for policy in (Policy(), Policy(coverage=0.9)):
                assert policy.prior("layers.0.mlp.up.weight", 0, 1, 0.5, work).steps <= 8
    with pytest.raises(AssertionError, match="tried"):
        cheapest_segments((JORDAN, (2.0, -1.5, 0.5)), torch.float32, lambda n: 3.0 + n)  # a user's own
    segments_of.cache_clear()


def test_the_cheapest_of_the_table_is_taken() -> None:
    steps = (JORDAN,) * 5
    kept = forms._table()[digest(steps), "fp32"]
    for cost in (lambda n: 10.0 + n, lambda n: 3.0 + n * n, lambda n: 2.0 * n * n):
        chosen = cheapest_segments(steps, torch.float32, cost)
        assert sum(map(cost, chosen)) == min(sum(map(cost, s)) for s in ((1,) * 5, *kept))
    assert (1, 2, 2) in kept and (5,) not in kept
