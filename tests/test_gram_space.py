"""Newton–Schulz in Gram space with restarts, and products of which one triangle is computed: as exact as the direct form, and cheaper."""

from __future__ import annotations

import itertools

import pytest
import torch

from muon_dist import orthogonalize
from muon_dist.polar import newton_schulz, restarts
from muon_dist.polar.coefficients import JORDAN
from muon_dist.polar.cost import flops, flops_of, segments_of
from muon_dist.polar.polynomials import Schedule, minimax_schedule, schedule_for, widest_schedule
from muon_dist.polar.products import SymmetricProducts
from muon_dist.polar.restarts import LONGEST, WORSE, best_segments, how_much_worse, possible_segments, single_steps, stands

CPU = SymmetricProducts("cpu")
SCHEDULES = {
    **{f"jordan {k}": schedule_for("jordan", k) for k in (2, 3, 5)},
    **{f"polar_express {k}": schedule_for("polar_express", k) for k in (5, 8)},
    **{f"cans {k}": schedule_for("cans", k) for k in (5, 6)},
    "deepseek_v4": schedule_for("deepseek_v4", 10),
    **{f"minimax {k}": widest_schedule(k) for k in (2, 3, 4, 5, 6, 8, 12)},
    "minimax 1e-3": minimax_schedule(1e-3, 5),
}


def decades(rows: int, cols: int, tenth: float, seed: int = 0) -> torch.Tensor:
    """Matrices whose singular values fall from 1 to 10^−tenth."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(1, rows, cols, dtype=torch.float64, generator=generator), full_matrices=False)
    return (u * torch.logspace(0, -tenth, min(rows, cols), dtype=torch.float64)) @ vh


def direct(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, schedule: Schedule, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(newton_schulz, "segments_of", lambda steps, *rest: single_steps(len(steps)))
        return orthogonalize(x, schedule=schedule, compute_dtype=dtype, return_moments=True)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tall", [False, True])
def test_gram_space_is_as_exact_as_the_direct_form(name: str, tall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch and one by one, moments too: the same in fp64; in fp32 no more than three times its error."""
    schedule = SCHEDULES[name]
    x = torch.cat([decades(48, 240, tenth, seed) for seed, tenth in enumerate((5, 2.5, 4))])
    x = x.mT.contiguous() if tall else x
    exact, exact_moments = direct(monkeypatch, x, schedule, torch.float64)
    single = direct(monkeypatch, x.float(), schedule, torch.float32)[0].double()
    assert max(segments_of(schedule.steps, 48, 240, torch.float32, CPU)) > 1 or name in (
        "jordan 2",
        "jordan 3",
        "minimax 2",
        "minimax 3",
    )
    for part in (slice(None), slice(1), 0):
        result, moments = orthogonalize(x[part], schedule=schedule, return_moments=True)
        assert (result - exact[part]).norm() < (1e-12 if len(schedule) < 10 else 1e-11) * exact[part].norm()
        torch.testing.assert_close(moments, exact_moments[part], rtol=1e-9, atol=1e-12)
        error = (orthogonalize(x[part].float(), schedule=schedule).double() - exact[part]).norm()
        assert error < 3 * (single[part] - exact[part]).norm() + 1e-6 * exact[part].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["jordan 5", "polar_express 5", "minimax 4", "minimax 8"])
def test_gram_space_in_half_precision_is_as_exact_as_the_direct_form(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the segments that a CUDA device takes, computed on the CPU."""
    schedule, x = SCHEDULES[name], decades(96, 480, 3, seed=5)
    segments = segments_of(schedule.steps, 4096, 20480, dtype, SymmetricProducts("cuda"))
    exact, _ = direct(monkeypatch, x, schedule, torch.float64)
    single, _ = direct(monkeypatch, x.float(), schedule, dtype)
    with monkeypatch.context() as patched:
        patched.setattr(newton_schulz, "segments_of", lambda *rest: segments)
        result = orthogonalize(x.float(), schedule=schedule, compute_dtype=dtype)
    assert max(segments) > 1
    assert (result.double() - exact).norm() < 2 * (single.double() - exact).norm()


def test_without_restarts_small_directions_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there are restarts: five Jordan steps on one Gram matrix err over ten times as much as single steps, in three hardly."""
    steps = (JORDAN,) * 5
    assert how_much_worse(steps, torch.float32, (5,)) > 10 and (0, 5) not in possible_segments(steps, torch.float32)
    assert how_much_worse(steps, torch.float32, (1, 2, 2)) < WORSE < how_much_worse(steps, torch.float32, (2, 3))
    x = decades(48, 240, 4).float()
    exact = orthogonalize(x.double())
    errors = []
    for segments in ((5,), (1, 2, 2), (1, 1, 1, 1, 1)):
        monkeypatch.setattr(newton_schulz, "segments_of", lambda *rest, segments=segments: segments)
        errors.append((orthogonalize(x).double() - exact).norm().item())
    assert errors[0] > 5 * errors[1] and errors[1] < 2 * errors[2]


@pytest.mark.parametrize("count", [10, pytest.param(12, marks=pytest.mark.more("product"))])
def test_deep_schedules_in_bf16_don_t_blow_up_where_rows_are_of_unlike_size(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix in fifty did, with segments that matrices of random directions find exact enough."""
    schedule, generator = schedule_for("minimax", count), torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(64, 192, generator=generator) * torch.logspace(0, -2 - k % 3, 64)[:, None] for k in range(120)])
    largest = {}
    for segments in ({10: (1, 2, 1, 1, 1, 2, 2), 12: (1,) * 7 + (2, 3)}[count], None):
        with monkeypatch.context() as patched:
            if segments is not None:
                assert how_much_worse(schedule.steps, torch.bfloat16, segments) <= WORSE and not stands(
                    schedule.steps, torch.bfloat16, segments
                )
                patched.setattr(newton_schulz, "segments_of", lambda *rest, segments=segments: segments)
            norms = torch.linalg.matrix_norm(orthogonalize(x, schedule=schedule, compute_dtype="bf16"))
        largest[segments is None] = float(norms.nan_to_num(nan=float("inf")).max()) / 8
    assert largest[False] > 1.5 > 1.2 > largest[True]


def test_steps_that_would_amplify_rounding_don_t_share_a_gram_matrix() -> None:
    steep = ((8.3, -23.6, 17.3), (4.1, -2.9, 0.5), JORDAN, JORDAN)
    assert (0, 2) not in possible_segments(steep, torch.float32)  # after 8.3 rounding is 69 times what it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_segments_are_the_cheapest_of_all_that_are_exact_enough(dtype: torch.dtype) -> None:
    steps = (JORDAN,) * 5
    possible = possible_segments(steps, dtype)

    def allowed(segments: tuple[int, ...]) -> bool:
        starts = [sum(segments[:k]) for k in range(len(segments))]
        return all(length == 1 or (first, length) in possible for first, length in zip(starts, segments, strict=True))

    compositions = [c for k in range(1, 6) for c in itertools.product(range(1, LONGEST + 1), repeat=k) if sum(c) == 5 and allowed(c)]
    assert len(compositions) > 3
    for cost in (lambda n: 10 + n, lambda n: 3 + n * n, lambda n: 1.0 * n, lambda n: 2.0 * n * n):
        chosen = best_segments(steps, dtype, cost)
        exact_enough = [c for c in compositions if how_much_worse(steps, dtype, c) <= WORSE]
        assert sum(map(cost, chosen)) == min(sum(map(cost, c)) for c in exact_enough)
        assert chosen in exact_enough


def test_segments_that_are_exact_alone_and_not_together_are_not_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "possible_segments", lambda steps, dtype: {(0, 2): 1.1, (2, 2): 1.3})
    monkeypatch.setattr(restarts, "how_much_worse", lambda steps, dtype, segments: 99.0 if segments == (2, 2, 1) else 1.0)
    assert best_segments((JORDAN,) * 5, torch.float32, lambda n: 10.0 + n) == (2, 1, 1, 1)  # the one that is worse alone is let go


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cuda", torch.bfloat16),
        *(pytest.param("cpu", dtype, marks=pytest.mark.more("product")) for dtype in (torch.float16, torch.bfloat16)),
        *(pytest.param("cuda", dtype, marks=pytest.mark.more("product")) for dtype in (torch.float32, torch.float16)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_chosen_form_never_takes_more_operations_than_the_direct_one(device: str, dtype: torch.dtype) -> None:
    for schedule in SCHEDULES.values():
        for rows, cols in [(512, 512), (768, 3072), (3072, 768), (4096, 14336), (4096, 1024), (1, 7), (0, 5), (40, 40)]:
            assert flops_of(rows, cols, schedule, dtype, SymmetricProducts(device)) <= flops(rows, cols, len(schedule))
            segments = segments_of(schedule.steps, rows, cols, dtype, SymmetricProducts(device))
            assert sum(segments) == len(schedule)
            if rows == cols:
                assert segments == single_steps(len(schedule)), "square matrices gain nothing"
    jordan = SCHEDULES["jordan 5"]
    assert flops_of(768, 3072, jordan, torch.float32, CPU) < 0.6 * flops(768, 3072, 5)
    assert flops_of(4096, 14336, jordan, torch.bfloat16, SymmetricProducts("cuda")) < 0.85 * flops(4096, 14336, 5)


@pytest.mark.parametrize("size", [1, 7, 255, 256, 301, 513, 1100])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_symmetric_product_is_the_whole_product(size: int, batch: tuple[int, ...]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(*batch, size, 40, dtype=torch.float64)
    gram, both, out = x @ x.mT, torch.empty(*batch, size, size, dtype=torch.float64), torch.empty(*batch, size, size, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        CPU.multiply(x, x.mT, both)
    assert counter.get_total_flops() == 2 * 40 * CPU.computed_elements(size, x.dtype) * (batch or (1,))[0]
    CPU.multiply(both, both, out, addend=both, beta=-1.5, alpha=0.5)
    torch.testing.assert_close(both, gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, -1.5 * gram + 0.5 * gram @ gram, rtol=1e-12, atol=1e-10)
    for start, stop in CPU.ranges(size, x.dtype):
        assert torch.equal(both[..., start:stop, :start], both[..., :start, start:stop].mT)
    share = CPU.computed_elements(size, x.dtype) / size**2
    assert share == 1 if size < 256 else share < 0.76
    assert SymmetricProducts("cuda").computed_elements(size, x.dtype) == size**2
