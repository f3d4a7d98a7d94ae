"""Products that round more than their dtype says: torch's global settings, autocast, and an update that can't be one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_dist import MuonDist, orthogonalize, step
from muon_dist.measure import measure_spectra
from muon_dist.polar import newton_schulz, restarts
from muon_dist.polar.cost import segments_of
from muon_dist.polar.plausible import most_norm
from muon_dist.polar.polynomials import NAMES, Schedule, schedule_for
from muon_dist.polar.products import SymmetricProducts, fp32_precision, own_products

from .ranks import run_ranks

MORE = pytest.mark.more("product")
SCHEDULES = {"deepseek_v4 10": ("deepseek_v4", 10), "minimax 10": ("minimax", 10), "minimax 12": ("minimax", 12), "jordan 5": ("jordan", 5)}


@contextlib.contextmanager
def products_in(precision: str, by: str = "legacy") -> Iterator[None]:
    """torch's fp32 products in "ieee", "tf32" or "bf16"."""
    matmul = torch.backends.mkldnn.matmul
    try:
        if by == "legacy":
            torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high", "bf16": "medium"}[precision])
        elif by == "matmul":
            matmul.fp32_precision = precision
        else:
            matmul.fp32_precision, torch.backends.mkldnn.fp32_precision = "none", precision
        yield
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def two_decades(rows: int = 128, cols: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, min(rows, cols), generator=generator, dtype=torch.float64))[0] for n in (rows, cols))
    return (u * torch.logspace(0, -2, min(rows, cols), dtype=torch.float64)) @ v.T


def rounded_to_bf16(steps: tuple, segments: tuple[int, ...], x: Tensor) -> Tensor:
    """What fp32 products of bf16 factors make of it, on any CPU."""
    return restarts.iterate(x, steps, segments, *restarts._rounding("bf16"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_segments_for_true_fp32_blow_up_where_products_round_to_bf16(name: str) -> None:
    """The fault, and why the precision decides: the same schedule in the segments of fp32, and in those that are chosen for bf16."""
    polynomial, count = SCHEDULES[name]
    schedule = schedule_for(polynomial, count)
    x = two_decades()
    x = x / torch.linalg.matrix_norm(x)
    chosen = {fp32: segments_of(schedule.steps, 128, 512, torch.float32, SymmetricProducts("cpu", None, fp32)) for fp32 in ("ieee", "bf16")}
    if polynomial == "minimax":
        assert chosen["ieee"] != chosen["bf16"]
        assert not rounded_to_bf16(schedule.steps, chosen["ieee"], x).norm() < 1.5 * math.sqrt(128)  # what the guard leaves out
    assert rounded_to_bf16(schedule.steps, chosen["bf16"], x).norm() < 1.3 * math.sqrt(128)
    assert segments_of(schedule.steps, 64, 256, torch.float64, SymmetricProducts("cpu", None, "bf16")) == segments_of(
        schedule.steps, 64, 256, torch.float64, SymmetricProducts("cpu")
    )  # only fp32 is rounded


@pytest.mark.parametrize("by", ["legacy", "matmul", "backend"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_setting_is_read_however_it_was_set(precision: str, by: str) -> None:
    assert fp32_precision("cpu") == fp32_precision("cuda") == "ieee" == fp32_precision("meta")
    with products_in(precision, by):
        assert fp32_precision("cpu") == precision
        with own_products("cpu", fp32="ieee"):
            assert fp32_precision("cpu") == "ieee"
        assert fp32_precision("cpu") == precision
    if by == "legacy":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert fp32_precision("cuda") == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        pytest.param(precision, name, marks=() if (precision == "bf16") == ("10" in name) else MORE)
        for precision in ("tf32", "bf16")
        for name in SCHEDULES
    ],
)
def test_an_update_is_right_under_every_setting(precision: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    polynomial, count = SCHEDULES[name]
    layer = nn.Linear(512, 128, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = MuonDist([("w", layer.weight)], lr=1.0, weight_decay=0.0, ns_steps=count, polynomial=polynomial, adjust_lr_fn="none")
    layer.weight.grad = two_decades().float()
    exact = orthogonalize(layer.weight.grad.double(), steps=count, polynomial=polynomial)
    with products_in(precision):
        optimizer.step()
        monkeypatch.setattr(newton_schulz, "segments_of", lambda steps, *rest: (1,) * len(steps))
        single = orthogonalize(layer.weight.grad, steps=count, polynomial=polynomial).double()
    assert optimizer.skipped_updates == optimizer.skipped_steps == 0
    update = -layer.weight.detach().double()
    assert 0.8 < update.norm() / exact.norm() < 1.2
    assert (update - exact).norm() < 1.6 * (single - exact).norm() + 0.02 * exact.norm()  # no further off than single steps


def test_a_setting_that_changes_is_noticed_at_the_next_step() -> None:
    p = nn.Parameter(torch.randn(32, 64))
    optimizer = MuonDist([("w", p)], ns_steps=5)
    for precision in ("ieee", "bf16", "ieee"):
        p.grad = torch.randn(32, 64)
        with products_in(precision):
            optimizer.step()
        assert optimizer.engine.domains[0].products.fp32 == precision


def other_settings() -> str:
    p = nn.Parameter(torch.ones(4, 4))
    with products_in("tf32" if dist.get_rank() else "ieee"):
        try:
            MuonDist([("w", p)], ns_steps=5).bind()
        except ValueError as error:
            return str(error)
    return ""


def test_ranks_with_other_settings_are_told() -> None:
    for told in run_ranks(2, other_settings):
        assert "fp32 products in ieee" in told and "fp32 products in tf32" in told


@pytest.mark.parametrize("deflation", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_changes_nothing(dtype: torch.dtype, deflation: int) -> None:
    ends = []
    for autocast in (False, True):
        p = nn.Parameter(torch.zeros(24, 40))
        optimizer = MuonDist([("w", p), ("b", nn.Parameter(torch.zeros(3)))], ns_steps=5, deflation=deflation)
        p.grad = two_decades(24, 40).float()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_deflation_and_measured_spectra_multiply_in_fp32_whatever_is_set() -> None:
    x = two_decades(48, 96).float()
    schedule = Schedule(schedule_for("jordan", 5).steps, deflation=4)
    plain, spectra = orthogonalize(x, schedule=schedule), measure_spectra({"w": x})
    with products_in("bf16"):
        assert measure_spectra({"w": x}) == spectra
        assert (orthogonalize(x, schedule=schedule) - plain).norm() < 0.1 * plain.norm()
    assert fp32_precision("cpu") == "ieee"


def test_a_gpu_adds_up_half_precision_in_fp32_and_settings_are_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
    before = [getattr(matmul, name) for name in names]
    try:
        for value in (True, False):
            for name in names:
                setattr(matmul, name, value)
            with pytest.raises(KeyError), own_products("cuda"):
                assert not any(getattr(matmul, name) for name in names)
                raise KeyError
            assert [getattr(matmul, name) for name in names] == [value] * 3
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


# --------------------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=MORE), 10])
def test_no_update_of_a_known_schedule_is_taken_for_impossible(name: str, steps: int) -> None:
    schedule = schedule_for(name, steps)
    assert most_norm(schedule, 4) == 3.0  # 1.5·√4
    for x in (torch.eye(6), torch.ones(6, 9), torch.randn(6, 9), two_decades(9, 6).float()):
        assert orthogonalize(x, schedule=schedule).norm() <= 1.4 * math.sqrt(6)


def test_steps_that_a_user_made_up_are_held_to_what_they_do() -> None:
    assert most_norm(Schedule([(4.0, 0.0, 0.0)]), 9) == pytest.approx(3 * 4.4)


def impossible(placement: str, factor: float, nonfinite: str = "skip") -> dict[str, Any]:
    """A step in which Newton–Schulz of the 6 × 10 matrix goes wrong on its owner; and the next, in which it doesn't."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (6, 10), "b": (8, 8), "c": (5, 7)}.items()}
    options = {"nonfinite": nonfinite, "placement": placement}
    if placement == "gram":  # which takes shards, not replicas
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parameters = {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters.items()}
    optimizer = MuonDist(list(parameters.items()), lr=0.1, weight_decay=0.0, ns_steps=5, **options)
    own, wrong = step.orthogonalize_batch, [True]

    def orthogonalized(batch: Tensor, *args: Any, **given: Any) -> Any:
        slices = given.get("slices")
        shape = tuple(batch.shape[1:]) if slices is None else slices.shape
        result, moments = own(batch, *args, **given)
        return (result.mul_(factor) if wrong[0] and shape == (6, 10) else result), moments

    def whole() -> dict[str, Tensor]:
        return {name: getattr(p.detach(), "full_tensor", lambda p=p: p.detach())().clone() for name, p in parameters.items()}

    step.orthogonalize_batch = orthogonalized
    try:
        moved, counts = [], []
        for k in range(2):
            for p in parameters.values():
                p.grad = torch.ones_like(p) * (1 + k)
            before = whole()
            optimizer.step()
            after = whole()
            moved.append({name: float((after[name] - before[name]).norm()) for name in after})
            counts.append(optimizer.skipped_updates)
            wrong[0] = False
        error = ""
    except ValueError as raised:
        error = str(raised)
    finally:
        step.orthogonalize_batch = own
    return {"moved": moved, "counts": counts, "skipped steps": optimizer.skipped_steps, "error": error}


@pytest.mark.parametrize(
    ("placement", "world", "factor"),
    [
        ("owner", 1, float("inf")),
        ("owner", 2, float("nan")),
        ("gram", 2, 50.0),
        *(pytest.param("owner", 2, factor, marks=MORE) for factor in (50.0, float("inf"))),
        *(pytest.param("gram", 2, factor, marks=MORE) for factor in (float("nan"), float("inf"))),
    ],
)
def test_an_update_that_cannot_be_one_reaches_no_weight(placement: str, world: int, factor: float) -> None:
    ranks = run_ranks(world, impossible, placement, factor)
    assert {rank["counts"][1] for rank in ranks} == {1}  # all ranks know at the next step
    assert sum(rank["counts"][0] for rank in ranks) >= 1  # whoever computed it, at once
    for rank in ranks:
        first, second = rank["moved"]
        assert first["a"] == 0.0 and first["b"] > 0.01 and first["c"] > 0.01 and second["a"] > 0.01
        assert rank["skipped steps"] == 0


def test_it_raises_on_all_ranks_where_that_was_asked_for() -> None:
    for rank in run_ranks(2, impossible, "owner", 50.0, "raise"):
        assert "1 matrices' updates had norms that no polar factor has" in rank["error"]
