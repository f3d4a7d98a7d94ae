"""Spectra from moments and from products, and generated schedules, against planted singular values."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from muon_dist import Schedule, orthogonalize
from muon_dist.polar.cost import flops
from muon_dist.polar.newton_schulz import orthogonalize_batch
from muon_dist.polar.polynomials import image, minimax_schedule, schedule_for, steps_for, widest_schedule
from muon_dist.spectrum.bidiagonal import RowShard, golub_kahan_quantiles
from muon_dist.spectrum.moments import QUANTILES, spectrum_from_moments
from muon_dist.spectrum.scaling_law import Observation, ScalingLaws, fit_power_law, layer_kind, relative_depths, shipped_laws


def planted(sigma: np.ndarray, rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A rows × cols matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, len(sigma), generator=generator, dtype=torch.float64))[0]
    return ((u * torch.from_numpy(sigma)) @ v.mT).to(dtype)


def falling(rank: int, decades: float, spikes: tuple[float, ...] = ()) -> np.ndarray:
    """Singular values that fall by so many decades, evenly in the logarithm, below a few spikes."""
    sigma = np.logspace(0, -decades, rank)
    sigma[: len(spikes)] = spikes
    return sigma / np.linalg.norm(sigma)


SPECTRA = {
    "mild": falling(200, 1.2),
    "steep": falling(200, 3.0),
    "dominated": falling(200, 2.0, (8.0, 3.0)),
    "flat": falling(200, 0.05),
}


def gains(x: torch.Tensor, result: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Singular values relative to the Frobenius norm, and what each direction became: the diagonal of UᵀOV."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (s / s.norm()).numpy(), (u.mT @ result.double() @ vh.mT).diagonal().numpy()


# ------------------------------------------------------------------------------------------------------------- polynomials


def test_steps_for_gives_the_published_table() -> None:
    lower = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
    assert [steps_for(x, 0.3) for x in lower] == [2, 3, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("lower", [0.1, 1e-2, 1e-3, 1e-5])
def test_the_error_of_generated_schedules_falls_with_every_step(lower: float) -> None:
    x = np.logspace(math.log10(lower), 0, 20_000)
    errors = [np.abs(image(minimax_schedule(lower, k).steps, x) - 1).max() for k in range(1, 9)]
    assert all(later < earlier or earlier < 1e-5 for earlier, later in itertools.pairwise(errors))
    assert len({minimax_schedule(lower, k).steps[0] for k in range(1, 9)}) == 1  # greedy: only the ends differ


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_widest_schedule_stays_in_its_band_on_its_whole_interval(steps: int) -> None:
    schedule = widest_schedule(steps, 0.3)
    reach = next(x for x in np.logspace(-9, 0, 2000) if image(schedule.steps, x) >= 0.7)
    values = image(schedule.steps, np.logspace(math.log10(reach), 0, 40_000))
    assert values.min() >= 0.699 and values.max() <= 1.301
    if steps > 1:
        assert schedule.steps[: steps - 1] != widest_schedule(steps - 1, 0.3).steps


def test_schedules_are_few_and_cached() -> None:
    assert minimax_schedule(1.0e-3, 5) is minimax_schedule(1.2e-3, 5)
    assert widest_schedule(4, 0.3) is widest_schedule(4, 0.3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: minimax_schedule(0, 5), "lower must be"),
        (lambda: minimax_schedule(1.0, 5), "lower must be"),
        (lambda: minimax_schedule(1e-3, 0), "steps must be"),
        (lambda: minimax_schedule(1e-3, 3, tol=0.3), "give 5 steps"),
        (lambda: minimax_schedule(1e-3, 5, safety=0.9), "safety"),
        (lambda: steps_for(1e-3, 2.0), "tol must be"),
        (lambda: Schedule([]), "non-empty"),
        (lambda: Schedule([(1, 0, 0)], normalisation="spectral"), "normalisation"),
        (lambda: Schedule([(1, 0, 0)], deflation=-1), "deflation"),
    ],
)
def test_malformed_requests_for_schedules_raise(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("steps", [3, 5, 8])
@pytest.mark.parametrize("kind", ["flat", "mild", "dominated"])
def test_nothing_diverges_in_bf16_where_the_norm_is_one_percent_off(steps: int, kind: str) -> None:
    schedule = widest_schedule(steps)
    x = planted(SPECTRA[kind], 200, 240, dtype=torch.float32)
    s = torch.linalg.svdvals(x.double())
    exact = float((s**8).sum() ** 0.125)
    off = Schedule(tuple((a * f, b * f**3, c * f**5) if k == 0 else (a, b, c) for k, (a, b, c) in enumerate(schedule.steps)
                         for f in (1.01,)), "schatten8")  # fmt: skip
    assert exact > 0
    for chosen in (schedule, off):
        result = orthogonalize(x, schedule=chosen, compute_dtype="bf16")
        assert torch.linalg.matrix_norm(result.double(), 2) < 1.45


# ----------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("normalisation", ["frobenius", "schatten4", "schatten8"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_a_normalisation_divides_by_what_it_says(normalisation: str, shape: tuple[int, int]) -> None:
    power = {"frobenius": 2, "schatten4": 4, "schatten8": 8}[normalisation]
    sigma = falling(40, 2.0, (3.0,))
    x = planted(sigma * 1e-12, *shape)
    schedule = dataclasses.replace(widest_schedule(4), normalisation=normalisation)
    s, g = gains(x, orthogonalize(x, schedule=schedule))
    np.testing.assert_allclose(g, image(schedule.steps, s / (s**power).sum() ** (1 / power)), rtol=1e-7)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
def test_tight_normalisations_don_t_underflow(dtype: str) -> None:
    x = torch.eye(256) * 1e-15
    result = orthogonalize(x, schedule=widest_schedule(2), compute_dtype=dtype)
    assert result.diagonal().min() > 0.69 and result.diagonal().max() < 1.31
    assert not orthogonalize(torch.zeros(5, 7), schedule=widest_schedule(3), compute_dtype=dtype).any()


# ------------------------------------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize(("polynomial", "steps"), [("jordan", 5), ("minimax", 4), ("minimax", 6)])
def test_quantiles_from_moments_are_those_of_the_decomposition(name: str, polynomial: str, steps: int) -> None:
    schedule = schedule_for(polynomial, steps)
    x = planted(SPECTRA[name], 200, 300, dtype=torch.float32)
    _, moments = orthogonalize(x, schedule=schedule, return_moments=True)
    spectrum = spectrum_from_moments(moments.numpy(), schedule, 200)
    assert spectrum is not None
    for q in QUANTILES[:4]:
        exact = SPECTRA[name][math.ceil(q * 200) - 1]
        estimate = spectrum.quantile(q)
        if exact > 2 * spectrum.resolution:
            assert estimate == pytest.approx(exact, rel=0.1), q
        if exact < 0.3 * spectrum.resolution:
            assert estimate is None, q  # below the resolution: said, not guessed


def test_moments_are_the_sums_they_are_said_to_be() -> None:
    x = planted(SPECTRA["mild"], 200, 220)
    schedule = widest_schedule(3)
    _, moments = orthogonalize(x, schedule=schedule, return_moments=True)
    s = SPECTRA["mild"]
    norm = (s**8).sum() ** 0.125
    expected, t = [0.0, norm], s / norm
    for a, b, c in schedule.steps:
        u = t * t
        p = b * u + c * u * u
        expected += [u.sum(), (u * u).sum(), (u * p).sum(), (p * p).sum()]
        t = t * (a + p)
    np.testing.assert_allclose(moments.numpy(), [*expected, (t * t).sum()], rtol=1e-8)


def test_moments_of_a_flattened_matrix_tell_its_dominant_values_and_the_others() -> None:
    sigma = np.concatenate([[0.7, 0.5, 0.3, 0.2, 0.15, 0.1], falling(194, 1.5) * 0.2])
    sigma /= np.linalg.norm(sigma)
    schedule = dataclasses.replace(widest_schedule(4), deflation=6)
    _, moments = orthogonalize(planted(sigma, 200, 260), schedule=schedule, return_moments=True)
    spectrum = spectrum_from_moments(moments.numpy(), schedule, 200)
    assert spectrum is not None
    np.testing.assert_allclose(spectrum.dominant, sigma[:6], rtol=0.02)
    for q in QUANTILES:
        assert spectrum.quantile(q) == pytest.approx(sigma[math.ceil(q * 200) - 1], rel=0.12)
    assert spectrum.quantile(0.015) == pytest.approx(sigma[2], rel=0.02)  # one of those that were flattened


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("measured_with", [0, 12])
def test_errors_and_coverage_of_other_schedules_are_foretold(name: str, measured_with: int) -> None:
    x = planted(SPECTRA[name], 200, 260)
    measured = dataclasses.replace(widest_schedule(5 if measured_with == 0 else 4), deflation=measured_with)
    _, moments = orthogonalize(x, schedule=measured, return_moments=True)
    spectrum = spectrum_from_moments(moments.numpy(), measured, 200)
    assert spectrum is not None
    deflations = (0, 6, 12, 25) if name != "flat" else (0, measured_with)  # all of a flat spectrum hangs on how much flattening leaves
    for schedule in (
        schedule_for("jordan", 5),
        *(dataclasses.replace(widest_schedule(k), deflation=d) for k in (2, 3) for d in deflations),
    ):
        s, g = gains(x, orthogonalize(x, schedule=schedule))
        error, covered = math.sqrt(np.mean((g - 1)[s > 1e-4] ** 2)), (np.abs(g - 1) <= 0.3)[s > 1e-4].mean()
        assert spectrum.error(schedule) == pytest.approx(error, rel=0.3, abs=0.03), schedule
        assert spectrum.coverage(schedule) == pytest.approx(covered, abs=0.13), schedule


def test_moments_cost_no_product() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 48, 64)
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x, steps=4, return_moments=True)
    assert counter.get_total_flops() == 2 * flops(48, 64, 4)


def test_a_batch_keeps_its_moments_apart_and_a_zero_matrix_has_no_spectrum() -> None:
    x = torch.stack([planted(SPECTRA["mild"], 200, 200, dtype=torch.float32), torch.zeros(200, 200)])
    schedule = widest_schedule(4)
    result, moments = orthogonalize(x, schedule=schedule, return_moments=True)
    assert spectrum_from_moments(moments[1].numpy(), schedule, 200) is None
    alone = orthogonalize(x[0], schedule=schedule, return_moments=True)
    torch.testing.assert_close(moments[0], alone[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result[0], alone[0], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="19 moments"):
        spectrum_from_moments(moments[0, :-1].numpy(), schedule, 200)


# -------------------------------------------------------------------------------------------------------------- Golub–Kahan


@pytest.mark.parametrize("shape", [(200, 200), (200, 330), (330, 200)])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_golub_kahan_quantiles(shape: tuple[int, int], name: str) -> None:
    x = planted(SPECTRA[name], *shape)
    calls = []

    def shard(x: torch.Tensor) -> RowShard:
        everything = torch.arange(x.shape[0])
        return RowShard("x", *x.shape, everything, lambda v: x @ v, lambda u: x.mT @ u, float((x * x).sum()), x.device)

    def reduce(t: torch.Tensor) -> torch.Tensor:
        calls.append(t.numel())
        return t

    few, exact = (golub_kahan_quantiles([shard(x), shard(x)], reduce, iterations=k)[0] for k in (12, 24))
    assert few is not None and exact is not None
    for q in QUANTILES[:3]:
        assert few.quantiles[q] == pytest.approx(SPECTRA[name][math.ceil(q * 200) - 1], rel=0.35)
        assert exact.quantiles[q] == pytest.approx(SPECTRA[name][math.ceil(q * 200) - 1], rel=5e-3)
    assert calls[0] == 2 and calls[1] == 2 * 16 * (shape[1] + 16)  # both matrices in one sum
    assert golub_kahan_quantiles([shard(torch.zeros(4, 6, dtype=torch.float64))]) == [None]


# ------------------------------------------------------------------------------------------------------------- scaling laws


def test_a_power_law_is_found_with_its_uncertainty() -> None:
    x = np.array([1e8, 3e8, 1e9, 3e9])
    law = fit_power_law(list(x), list(0.5 * x**-0.25))
    assert law.alpha == pytest.approx(0.25, abs=1e-9) and law.constant == pytest.approx(0.5, rel=1e-6)
    assert law.predict(1e10)[0] == pytest.approx(0.5 * 1e10**-0.25, rel=1e-9)
    noisy = fit_power_law(list(x), list(0.5 * x**-0.25 * np.exp([0.1, -0.1, -0.1, 0.1])))
    assert noisy.alpha_deviation > 0.01 and noisy.predict(1e12)[1] > noisy.predict(1e9)[1] > 0.1
    with pytest.raises(ValueError, match="two or more sizes"):
        fit_power_law([1e8, 1e8], [0.1, 0.2])


def test_the_shipped_laws_have_the_exponents_that_the_paper_states() -> None:
    alphas = {(law.kind, law.depth): law.by_params.alpha for law in shipped_laws().laws if law.q == 0.5}
    for kind, alpha in (("q", 0.46), ("k", 0.38), ("v", 0.58), ("o", 0.66), ("up", 0.52), ("down", 0.96)):
        assert alphas[(kind, 1.0)] == pytest.approx(alpha, abs=0.03)
    assert np.mean([a for (_, depth), a in alphas.items() if depth in (0.5, 0.75)]) == pytest.approx(0.25, abs=0.04)
    # rank-normalised, up to three quarters of the depth, next to nothing is left
    assert abs(np.mean([law.by_rank.alpha for law in shipped_laws().laws if law.q == 0.5 and law.depth in (0.5, 0.75)])) < 0.1


def test_laws_predict_spectra_and_fall_back_for_unknown_kinds() -> None:
    laws = shipped_laws()
    for kind in ("q", "down", None):
        found = laws.quantiles(kind, 0.6, 4096)
        assert sorted(found) == list(QUANTILES) and all(d > 0 for _, d in found.values())
        sigma = [value for _, (value, _) in sorted(found.items())]
        assert sigma == sorted(sigma, reverse=True)
        spectrum = laws.spectrum(kind, 0.6, 4096)
        assert spectrum.quantile(0.5) == pytest.approx(found[0.5][0], rel=0.1)
        assert spectrum.norms["frobenius"] == pytest.approx(1.0, rel=0.02)
    with pytest.raises(ValueError, match="relative depth"):
        laws.quantiles("q", 1.5, 100)
    with pytest.raises(ValueError, match="two or more sizes"):
        ScalingLaws([Observation("q", 1.0, 1e8, 512, 0.5, 0.01)])


@pytest.mark.parametrize(
    ("name", "part", "parts", "kind"),
    [
        ("blocks.3.attn.qkv.weight", 1, 3, "k"),
        ("h.1.attn.c_attn.weight", 2, 3, "v"),
        ("model.layers.0.self_attn.o_proj.weight", 0, 1, "o"),
        ("model.layers.0.self_attn.q_proj.weight", 0, 1, "q"),
        ("h.1.mlp.c_proj.weight", 0, 1, "down"),
        ("h.1.attn.c_proj.weight", 0, 1, "o"),
        ("layers.2.mlp.gate_up.weight", 1, 2, "up"),
        ("decoder.layers.0.mlp.linear_fc2.weight", 0, 1, "down"),
        ("conv.weight", 0, 1, None),
    ],
)
def test_layer_kinds_by_name(name: str, part: int, parts: int, kind: str | None) -> None:
    assert layer_kind(name, part, parts) == kind


def test_relative_depths() -> None:
    assert relative_depths(["layers.0.x", "layers.3.x", "head"]) == [0.25, 1.0, 1.0]


def test_orthogonalize_batch_keeps_moments_of_excluded_matrices_at_zero() -> None:
    keep = torch.tensor([True, False])
    _, moments = orthogonalize_batch(torch.randn(2, 20, 30), widest_schedule(3), compute_dtype=torch.float32, keep=keep, measure=True)
    assert moments is not None
    assert moments[0, 2] > 0 and moments[1, 2] == 0 and moments.isfinite().all()
