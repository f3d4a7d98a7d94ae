"""Deflation: dominant singular values are lowered to lie among the others, against exact decompositions."""

import dataclasses

import numpy as np
import pytest
import torch

from muon_dist import orthogonalize
from muon_dist.polar.cost import flops
from muon_dist.polar.flattening import PLACE, SMALLEST, Part, dominant_ranks, flatten_dominant
from muon_dist.polar.polynomials import image, schedule_for, widest_schedule

from .test_spectrum import falling, gains, planted


def flattened(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X″, τ and the dominant values that a measurement yields."""
    x = (x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True).clamp_min(1e-300)).to(x.dtype)
    batch = x if x.ndim == 3 else x.unsqueeze(0)
    dominant = torch.zeros(len(batch), 8, dtype=torch.float64)
    tau = flatten_dominant(batch, count, tall=batch.shape[-2] > batch.shape[-1], dominant=dominant)
    return (batch if x.ndim == 3 else batch[0]), tau, dominant


GAP = falling(60, 1.0, (50.0, 40.0, 30.0, 20.0))  # four directions above a gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (60, 60)])
def test_above_a_gap_the_dominant_values_all_come_to_tau_and_nothing_else_changes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = planted(GAP, *shape).to(dtype)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    result, tau, dominant = flattened(x, 4)
    inside = u.mT @ result.double() @ vh.mT * s.norm()  # in the singular vectors of X
    expected = torch.cat([(tau * s.norm()).expand(4), s[4:]])
    assert (inside - torch.diag(expected)).abs().max() < (0.12 * tau * s.norm()).item()  # the inverse root is good to a tenth
    assert (inside - torch.diag(expected))[4:, 4:].abs().max() < {torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert 0.8 * PLACE < tau.item() * s.norm() / s[3] <= PLACE
    assert np.allclose(dominant[0].numpy(), [s[r - 1] / s.norm() for r in dominant_ranks(4)], rtol=0.01)


def test_without_a_gap_the_largest_value_that_is_left_is_near_the_next_one() -> None:
    worst = []
    for seed in range(20):
        x = planted(falling(120, 1.5), 120, 150, seed=seed)
        s = torch.linalg.svdvals(x)
        result, _, _ = flattened(x, 15)
        worst.append(float(torch.linalg.svdvals(result)[0] * s.norm() / s[15]))
    assert max(worst) < 1.6 and min(worst) > 0.99


@pytest.mark.parametrize("name", ["equal", "rank one", "rank deficient", "steep", "zero", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_matrices_come_out_finite_and_no_larger(name: str, dtype: torch.dtype) -> None:
    sigma = {
        "equal": np.concatenate([np.full(8, 3.0), np.full(32, 1.0)]),
        "rank one": np.concatenate([[1.0], np.zeros(39)]),
        "rank deficient": np.concatenate([np.logspace(0, -1, 5), np.zeros(35)]),
        "steep": np.logspace(0, -9, 40),
        "zero": np.zeros(40),
        "tiny": np.logspace(0, -2, 40) * 1e-30,
    }[name]
    x = planted(sigma, 40, 56).to(dtype)
    result, tau, dominant = flattened(x, 8)
    assert result.isfinite().all() and tau.isfinite().all() and dominant.isfinite().all()
    assert float(torch.linalg.matrix_norm(result.double(), 2)) <= 1.0001
    assert tau.item() > 0.9 * SMALLEST * PLACE * 8 ** (-1 / 8)
    schedule = dataclasses.replace(widest_schedule(4), deflation=8)
    update = orthogonalize(x, schedule=schedule)
    assert update.isfinite().all() and float(torch.linalg.matrix_norm(update.double(), 2)) < 1.4
    if name != "zero":
        s, g = gains(x, update)
        assert np.abs(g - 1)[s > 3e-3].max() < 0.45


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounding_is_not_lifted_where_fewer_directions_count_than_are_deflated(dtype: str) -> None:
    """In the first steps of training a gradient may have a rank of a few."""
    x = planted(np.concatenate([np.linspace(1, 0.3, 8), np.zeros(192)]), 200, 260, dtype=torch.float32)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)

    def noise(schedule: object) -> float:
        """What comes out beside the eight directions, for each of them."""
        result = orthogonalize(x, schedule=schedule, compute_dtype=dtype).double()  # type: ignore[call-overload]
        return float((result - u[:, :8] @ (u[:, :8].mT @ result @ vh[:8].mT) @ vh[:8]).norm()) / 8**0.5

    for count, steps in ((12, 2), (25, 2), (25, 3)):
        deflated = noise(dataclasses.replace(widest_schedule(steps, 0.2), deflation=count))
        assert deflated < (0.01 if dtype == "fp32" else max(0.2, noise(schedule_for("jordan", 5))))


def test_directions_that_are_flattened_come_out_at_one_and_the_rest_at_its_own_scale() -> None:
    x = planted(GAP, 60, 100)
    schedule = dataclasses.replace(widest_schedule(3), deflation=4)
    s, g = gains(x, orthogonalize(x, schedule=schedule))
    _, tau, _ = flattened(x, 4)
    norm = ((s[4:] ** 8).sum() + 4 * float(tau) ** 8) ** 0.125
    np.testing.assert_allclose(g[4:], image(schedule.steps, s[4:] / norm), rtol=0.03)
    assert np.abs(g - 1).max() < 0.4
    assert (np.abs(gains(x, orthogonalize(x, schedule=widest_schedule(3)))[1] - 1) <= 0.3).mean() < 0.5


def test_more_directions_than_there_are_and_empty_matrices() -> None:
    schedule = dataclasses.replace(widest_schedule(3), deflation=40)
    x = torch.randn(2, 5, 9)
    result = orthogonalize(x, schedule=schedule)
    for k in range(2):
        assert np.abs(gains(x[k], result[k])[1] - 1).max() < 0.31
    assert orthogonalize(torch.zeros(3, 6, 9), schedule=schedule).abs().max() == 0
    assert orthogonalize(torch.zeros(0, 6, 9), schedule=schedule).shape == (0, 6, 9)
    assert orthogonalize(torch.randn(1, 1), schedule=schedule).abs().item() == pytest.approx(1, abs=0.31)


def test_a_matrix_comes_out_the_same_whichever_others_are_in_its_batch() -> None:
    schedule = dataclasses.replace(widest_schedule(3), deflation=5)
    x = torch.randn(4, 64, 96) * torch.logspace(0, -3, 96)
    together = orthogonalize(x, schedule=schedule)
    for k in range(4):
        assert torch.equal(orthogonalize(x[k : k + 1], schedule=schedule)[0], together[k])


@pytest.mark.parametrize(("shape", "dim"), [((30, 50), 1), ((50, 30), 0), ((40, 40), 0), ((40, 40), 1)])
def test_parts_are_flattened_like_the_whole(shape: tuple[int, int], dim: int) -> None:
    """Sums over the parts are taken here by hand: a process is asked again and again, each time with one more sum that it knows."""
    x = planted(falling(min(shape), 2.0, (9.0, 5.0)), *shape)
    x, tall = x / x.norm(), shape[0] > shape[1]
    whole, known = x.clone().unsqueeze(0), torch.zeros(1, 8, dtype=torch.float64)
    tau = flatten_dominant(whole, 3, tall=tall, dominant=known)
    square = shape[0] == shape[1] and dim == 0
    rows = [(0, 15), (15, shape[0])] if square else [None, None]
    parts = [part.unsqueeze(0) for part in x.tensor_split((15,), dim=dim)]
    sums: list[torch.Tensor] = []

    class Enough(Exception):
        pass

    def asked(part: torch.Tensor, held: tuple[int, int] | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What a process would add up next, given the sums so far; or None, and its part flattened."""
        counted: list[torch.Tensor] = []

        def add_up(tensor: torch.Tensor) -> None:
            counted.append(tensor.clone())
            if len(counted) > len(sums):
                raise Enough
            tensor.copy_(sums[len(counted) - 1])

        mine, dominant = part.clone(), torch.zeros(1, 8, dtype=torch.float64)
        try:
            torch.testing.assert_close(
                flatten_dominant(mine, 3, tall=tall, part=Part(held, add_up), dominant=dominant), tau, rtol=1e-10, atol=0
            )
            torch.testing.assert_close(dominant, known, rtol=1e-9, atol=0)
        except Enough:
            return counted[-1], mine
        return None, mine

    while (each := [asked(part, held) for part, held in zip(parts, rows, strict=True)])[0][0] is not None:
        sums.append(sum(told for told, _ in each))  # type: ignore[arg-type, misc]
    torch.testing.assert_close(torch.cat([mine for _, mine in each], dim=dim + 1), whole, rtol=0, atol=1e-12)
    m, n = min(shape), max(shape)
    over_columns, over_rows = [(3, 3), (m, 3), (3, 3), (m, 3), (3, 3)], [(n, 3), (3, 3), (n, 3), (3, 3), (3, n)]
    assert [tuple(t.shape[1:]) for t in sums] == (over_rows if square else over_columns)


def test_flops_count_the_products_of_deflation() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(64, 128), schedule=dataclasses.replace(widest_schedule(3), deflation=4))
    uncounted = 2 * 64 * 128 * 4 + 2 * (64 + 128) * 4**2  # the counter knows no in-place product and no triangular solve
    assert counter.get_total_flops() + uncounted == pytest.approx(flops(64, 128, 3, deflation=4), abs=6 * 4**3 + 1)


def test_flattening_in_bf16_is_as_exact_as_in_fp32() -> None:
    """What is left is rounded at its own scale, not at that of the dominant direction."""
    sigma = np.concatenate([[0.99], falling(99, 1.0) * 0.01])
    x = planted(sigma, 100, 130, dtype=torch.float32)
    schedule = dataclasses.replace(widest_schedule(3), deflation=2)
    errors = [np.sqrt(np.mean((gains(x, orthogonalize(x, schedule=schedule, compute_dtype=d))[1] - 1) ** 2)) for d in ("fp32", "bf16")]
    assert errors[1] == pytest.approx(errors[0], abs=0.01) and errors[0] < 0.25
    assert np.abs(gains(x, orthogonalize(x, schedule=widest_schedule(3), compute_dtype="bf16"))[1] - 1).mean() > 0.5
