"""Polynomials, Newton–Schulz, matrix views and scales, against singular value decompositions and closed forms."""

import math
import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from muon_dist import orthogonalize
from muon_dist.polar import polynomials
from muon_dist.polar.coefficients import JORDAN
from muon_dist.polar.cost import flops, flops_of
from muon_dist.polar.matrix_view import MatrixView, matrices_of
from muon_dist.polar.newton_schulz import orthogonalize_batch
from muon_dist.polar.polynomials import Schedule, schedule_for
from muon_dist.polar.products import SymmetricProducts
from muon_dist.polar.scaling import update_scale

from .reference import orthogonalize as reference_orthogonalize

CONVERGING = [*schedule_for("polar_express", 9).steps, *[(1.875, -1.25, 0.375)] * 3]


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def image(schedule: Schedule, x: torch.Tensor) -> torch.Tensor:
    for a, b, c in schedule.steps:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", [(7, 7), (5, 19), (19, 5), (1, 6), (6, 1), (3, 4, 9), (2, 3, 8, 4)])
def test_a_converging_schedule_gives_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(x, schedule=CONVERGING)
    torch.testing.assert_close(result, polar(x), rtol=1e-10, atol=1e-10)
    assert result.shape == x.shape and result.dtype == x.dtype


@pytest.mark.parametrize("polynomial", ["jordan", "polar_express", "cans", "deepseek_v4"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (9, 9)])
def test_families_equal_the_reference_iteration(shape: tuple[int, int], polynomial: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    expected = reference_orthogonalize(x, list(schedule_for(polynomial, 6).steps))
    torch.testing.assert_close(orthogonalize(x, steps=6, polynomial=polynomial), expected, rtol=1e-12, atol=1e-12)


def test_a_batch_equals_its_matrices_one_by_one() -> None:
    x = torch.randn(5, 12, 30)
    alone = torch.stack([orthogonalize(m) for m in x])
    torch.testing.assert_close(orthogonalize(x), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1e-12, 1e-19, 1e12, 1e30])
def test_the_size_of_the_input_does_not_matter(size: float) -> None:
    x = torch.randn(16, 24)
    torch.testing.assert_close(orthogonalize(x * size), orthogonalize(x), rtol=0, atol=2e-5)


def test_the_input_is_left_as_it_is() -> None:
    x = torch.randn(3, 8, 5)
    before = x.clone()
    orthogonalize(x)
    assert torch.equal(x, before)


def test_zero_gives_zero_and_empty_gives_empty() -> None:
    assert not orthogonalize(torch.zeros(3, 5, 4)).any()
    assert orthogonalize(torch.zeros(0, 5)).shape == (0, 5)
    assert orthogonalize(torch.zeros(2, 0, 5)).shape == (2, 0, 5)


def test_matrices_that_are_not_kept_come_back_as_zeros() -> None:
    result, _ = orthogonalize_batch(
        torch.randn(3, 4, 6), Schedule((JORDAN,) * 5), compute_dtype=torch.float32, keep=torch.tensor([True, False, True])
    )
    assert not result[1].any() and result[0].any() and result[2].any()


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, "fp32", "fp64", "torch.float16"])
def test_compute_dtypes_have_names_and_the_result_has_the_inputs_dtype(dtype: object) -> None:
    x = torch.randn(8, 8)
    assert orthogonalize(x, compute_dtype=dtype).dtype == torch.float32
    torch.testing.assert_close(orthogonalize(x, compute_dtype=dtype), orthogonalize(x), rtol=0, atol=0.1)


# Polar Express, arXiv 2505.16932, as published (before the safety factor of 1.01), and CANS, arXiv 2506.10935
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
CANS = [
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
]


def test_generated_schedules_are_the_published_ones_where_those_exist() -> None:
    generated = schedule_for("polar_express", 5).steps
    for k, ((a, b, c), (pa, pb, pc)) in enumerate(zip(generated, POLAR_EXPRESS, strict=True)):
        s = 1.01 if k < 4 else 1.0
        assert (a * s, b * s**3, c * s**5) == pytest.approx((pa, pb, pc), rel=1e-9)
    for ours, theirs in zip(schedule_for("cans", 5).steps, CANS, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", ["polar_express", "cans"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_minimax_schedules_end_near_one_for_every_step_count(name: str, steps: int) -> None:
    schedule = schedule_for(name, steps)
    reached = {1: 0.16, 2: 0.039, 3: 9.5e-3, 4: 2.3e-3}.get(steps, 1e-3)  # the smallest direction that these steps must lift
    values = image(schedule, torch.logspace(math.log10(reached), 0, 4000, dtype=torch.float64))
    assert values.min() >= 0.69 and values.max() <= 1.31
    if steps < 5:  # the first steps of the published five are no schedule of their own
        assert schedule.steps != schedule_for(name, 5).steps[:steps]


def test_jordan_oscillates_where_it_is_known_to() -> None:
    values = image(schedule_for("jordan", 8), torch.linspace(0.02, 1, 4000, dtype=torch.float64))
    assert 0.67 < values.min() < 0.70 and 1.12 < values.max() < 1.14


def test_deepseek_v4_ends_with_two_contracting_steps() -> None:
    assert schedule_for("deepseek_v4", 10).steps == (JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2


@pytest.mark.parametrize(
    ("polynomial", "steps", "words"),
    [
        ("muon", 5, "unknown polynomial"),
        ("jordan", 0, "steps must be"),
        ("jordan", 5.0, "steps must be"),
        ("jordan", True, "steps must be"),
        ("deepseek_v4", 2, ">= 3"),
        ([(1, 2)], 5, "three numbers"),
        ([(1, 2, float("nan"))], 1, "finite"),
        ([], 5, "non-empty"),
        ([JORDAN] * 3, 4, "lists 3 steps"),
    ],
)
def test_malformed_polynomials_raise(polynomial: object, steps: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schedule_for(polynomial, steps)


def test_one_triple_repeats_and_a_list_says_its_own_length() -> None:
    assert schedule_for((2, -1.5, 0.5), 4).steps == ((2.0, -1.5, 0.5),) * 4
    assert schedule_for([JORDAN, (2, -1.5, 0.5), JORDAN], 3) == schedule_for([JORDAN, (2, -1.5, 0.5), JORDAN], 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3)}, "matrices"),
        ({"x": torch.zeros(3, 3, dtype=torch.int32)}, "floating"),
        ({"compute_dtype": "int8"}, "not a dtype"),
    ],
)
def test_orthogonalize_refuses_what_it_cannot_do(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        orthogonalize(**{"x": torch.ones(3, 3), **arguments})


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (20, 40), (16, 80), (80, 16), (24, 24), (20, 30), (520, 530), (1100, 300)])
def test_flops_count_the_products_that_run(shape: tuple[int, int], steps: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    schedule = schedule_for("jordan", steps)
    expected = flops_of(*shape, schedule, torch.float32, SymmetricProducts("cpu"))  # before counting: the form is found by trying, once
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape), steps=steps)
    assert counter.get_total_flops() == expected <= flops(*shape, steps)
    if max(shape) < 2 * min(shape) < 512:  # too square for Gram space, too small for half a product
        assert flops_of(*shape, schedule, torch.float32, SymmetricProducts("cpu")) == flops(*shape, steps)


def test_scales() -> None:
    assert update_scale("match_rms_adamw", 30, 50) == 0.2 * math.sqrt(50)
    assert update_scale("original", 30, 50) == update_scale(None, 30, 50) == 1.0
    assert update_scale("original", 50, 30) == math.sqrt(50 / 30)
    assert update_scale("spectral", 30, 50) == math.sqrt(30 / 50)
    assert update_scale("none", 30, 50) == 1.0
    with pytest.raises(ValueError, match="unknown adjust_lr_fn"):
        update_scale("rms", 3, 5)


@pytest.mark.parametrize(
    ("shape", "view", "expected"),
    [
        ((6, 4), MatrixView(), [(6, 4)]),
        ((12, 4), MatrixView(split=(4, 4, 4)), [(4, 4)] * 3),
        ((12, 4), MatrixView(split=(8, 2, 2)), [(8, 4), (2, 4), (2, 4)]),
        ((12, 4), MatrixView(split=3), [(3, 4)] * 4),
        ((4, 12), MatrixView(split=(8, 4), transpose=True), [(8, 4), (4, 4)]),
        ((3, 6, 4), MatrixView(), [(6, 4)] * 3),
        ((3, 6, 4), MatrixView(split=(2, 4)), [(2, 4), (4, 4)] * 3),
        ((8, 3, 2, 2), MatrixView(kind="conv"), [(8, 12)]),
        ((8, 3, 5), MatrixView(kind="conv"), [(8, 15)]),
        ((0, 4), MatrixView(), []),
    ],
)
def test_matrix_views_say_rows_and_cols(shape: tuple[int, ...], view: MatrixView, expected: list[tuple[int, int]]) -> None:
    assert [(m.rows, m.cols) for m in matrices_of(shape, view)] == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), st.booleans(), st.booleans(), st.integers(0, 10))
def test_matrices_tile_their_parameter(shape: tuple[int, ...], conv: bool, transpose: bool, cut: int) -> None:
    conv = conv and len(shape) > 2
    transpose = transpose and not conv
    outputs = shape[0] if conv else shape[-1] if transpose else shape[-2]
    split = (cut % outputs, outputs - cut % outputs) if cut % outputs else None
    seen = torch.zeros(shape, dtype=torch.int64)
    for matrix in matrices_of(shape, MatrixView(kind="conv" if conv else "matrix", split=split, transpose=transpose)):
        seen[tuple(slice(a, b) for a, b in matrix.box)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("shape", "view", "words"),
    [
        ((5,), {}, "two dimensions"),
        ((6, 4), {"split": (2, 3)}, "add up to 5"),
        ((6, 4), {"split": 4}, "don't divide"),
        ((6, 4), {"kind": "conv"}, "three"),
    ],
)
def test_views_that_do_not_fit_raise(shape: tuple[int, ...], view: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        matrices_of(shape, MatrixView(**view))


@pytest.mark.parametrize("view", [{"kind": "dense"}, {"split": (2, 0)}, {"split": ()}, {"kind": "conv", "transpose": True}])
def test_views_that_make_no_sense_raise(view: dict) -> None:
    with pytest.raises(ValueError):
        MatrixView(**view)


# ----------------------------------------------------------------------------------------- the same on all ranks, and again


GENERATED = """
import hashlib
from muon_dist.polar import polynomials
from muon_dist.spectrum.policy import Policy
from muon_dist.spectrum.record import Choice
schedules = [polynomials.schedule_for(name, steps) for name in ("polar_express", "cans", "minimax") for steps in (3, 5, 8, 12)]
schedules += [Policy().schedule(Choice(0, steps, tol)) for tol in (0.1, 0.28) for steps in (2, 5, 9)]
schedules += [polynomials.minimax_schedule(1e-4, 7)]
print(hashlib.sha256(repr([s.steps for s in schedules]).encode()).hexdigest(), end="")
"""


@pytest.mark.more("repeat")
def test_unlike_cpus_generate_the_same_polynomials() -> None:
    """numpy, OpenBLAS and the C library take other code paths, as on another CPU; with linear algebra of theirs, ranks disagreed."""
    others = {
        "OPENBLAS_CORETYPE": "Zen",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F",
    }
    told = []
    for extra in ({}, others):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GENERATED], env={**os.environ, **extra}, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told.append(done.stdout.split())
    assert told[0][0] == told[1][0]


def test_polynomials_are_generated_without_linear_algebra_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = polynomials.greedy_minimax(1e-3, 8)
    monkeypatch.setattr(polynomials, "np", None)
    assert polynomials.greedy_minimax(1e-3, 8) == expected
    assert all(float(f"{c:.12g}") == c for step in expected for c in step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (16, 256), (2, 7), (1, 64), (3, 3), (48, 48), (190, 40), (8, 1024)])
def test_a_matrix_comes_out_the_same_to_the_last_bit_whatever_batch_it_is_in(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Owners may be chosen anew when a run is resumed, and other matrices then share a batch."""
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    schedule = schedule_for("jordan", 5)
    batched = [
        torch.cat([orthogonalize_batch(part.clone(), schedule, compute_dtype=dtype)[0] for part in x.split(size)]) for size in (1, 2, 3, 6)
    ]
    assert all(torch.equal(batched[0], other) for other in batched)
