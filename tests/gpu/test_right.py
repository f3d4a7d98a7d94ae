"""What must be right on a GPU: MuonDist's step on a device against the reference on the CPU, and what else only a device can get wrong.

MUON_DIST_TEST_DEVICE says on which; without it everything runs on the CPU with the same code. `bash tests/gpu.sh` runs this file on CUDA.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_dist import MuonDist, orthogonalize
from muon_dist.bench.peers import newton_schulz
from muon_dist.polar.coefficients import JORDAN
from muon_dist.polar.newton_schulz import default_compute_dtype
from muon_dist.polar.polynomials import minimax_schedule, schedule_for
from muon_dist.polar.products import SymmetricProducts

from ..ranks import run_ranks
from ..reference import ReferenceMuon
from ..reference import orthogonalize as polar_factor

DEVICE = torch.device(os.environ.get("MUON_DIST_TEST_DEVICE", "cpu"))
ON_A_GPU = DEVICE.type == "cuda"
SHAPES = [(256, 64), (96, 320), (128, 128), (128, 128), (33, 17), (5, 64), (1, 9), (48,), (7,)]
ADAPTIVE = {"ns_steps": "adaptive", "burn_in": 2, "measure_every": 4}
EXACT = {"compute_dtype": "fp32", "wire_dtype": "fp32"}


def values(seed: int, dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """The same on every device; matrices have singular values over two decades."""
    generator = torch.Generator().manual_seed(seed)
    result = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(t * torch.logspace(0, -2, t.shape[-1], dtype=t.dtype) if t.ndim == 2 else t).to(dtype) for t in result]


class Model:
    """Parameters on the device, and an optimizer that is fed gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE, **options: Any) -> None:
        self.named = [(f"layers.{k}.weight", nn.Parameter(t.to(device))) for k, t in enumerate(values(0, dtype))]
        self.optimizer = MuonDist(self.named, **{"lr": 0.1, "weight_decay": 0.0, "ns_steps": 5, **options})

    def step(self, seed: int) -> None:
        for (_, p), g in zip(self.named, values(seed, self.named[0][1].dtype), strict=True):
            p.grad = g.to(p.device)
        self.optimizer.step()

    def read(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().double().clone() for name, p in self.named}


def reference_for(model: Model) -> ReferenceMuon:
    read = model.read()
    return ReferenceMuon(read, {name: [p.shape[0]] for name, p in read.items() if p.ndim == 2}, lr=0.1, weight_decay=0.0)


def errors_of(model: Model, steps: int = 3) -> dict[str, float]:
    """The worst relative error of any update against the reference in fp64, by name."""
    reference, worst = reference_for(model), dict.fromkeys(model.read(), 0.0)
    for seed in range(1, steps + 1):
        before = model.read()
        reference.parameters = {name: p.clone() for name, p in before.items()}
        reference.step(dict(zip(before, (g.double() for g in values(seed, model.named[0][1].dtype)), strict=True)))
        model.step(seed)
        for name, after in model.read().items():
            wanted = reference.parameters[name] - before[name]
            worst[name] = max(worst[name], float((after - before[name] - wanted).norm() / wanted.norm()))
    return worst


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """torch's own, which tests here change."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_default_device(None)


# ------------------------------------------------------------------------------------------------------------------- updates


def test_updates_in_fp64_are_the_references() -> None:
    assert max(errors_of(Model(torch.float64)).values()) < 1e-10


def test_updates_in_fp32_are_the_references() -> None:
    assert max(errors_of(Model(**EXACT)).values()) < 2e-5


def test_updates_in_bf16_are_no_further_from_fp64_than_torchs_iteration() -> None:
    """Newton–Schulz in bf16 has noise of its own, whoever runs it."""
    g = values(1)
    theirs = []
    for matrix in (t for t in g if t.ndim == 2):
        found = newton_schulz(matrix.to(DEVICE, torch.bfloat16), JORDAN, 5, 1e-7).cpu().double()
        exact = polar_factor(matrix.double(), [JORDAN] * 5)
        theirs.append(float((found - exact).norm() / exact.norm()))
    ours = list(errors_of(Model(compute_dtype="bf16"), steps=1).values())[: len(theirs)]
    assert max(ours) < 1.3 * max(theirs) < 0.2


def test_parameters_and_gradients_in_bf16() -> None:
    """The update is right to bf16's last digit of the parameter that it is added to."""
    model = Model(torch.bfloat16, compute_dtype="fp32", wire_dtype="fp32", lr=1.0)
    before = model.read()
    model.step(1)
    for name, after in model.read().items():
        if before[name].ndim == 2:
            g = dict(zip(before, values(1, torch.bfloat16), strict=True))[name].double()
            wanted = before[name] - 0.2 * max(g.shape) ** 0.5 * polar_factor(g, [JORDAN] * 5)
            assert (after - wanted).abs().max() <= 2**-7 * wanted.abs().max(), name


def test_fp16_is_taken_where_bf16_does_not_resolve_and_is_nearer() -> None:
    schedule = minimax_schedule(1e-4, 8)
    assert default_compute_dtype(torch.device("cuda"), torch.float32, schedule) == torch.float16
    if ON_A_GPU:
        assert default_compute_dtype(DEVICE, torch.float32, schedule_for("jordan", 5)) == torch.bfloat16
    x = values(3, shapes=[(192, 192)])[0]
    x = torch.linalg.qr(x)[0] @ torch.diag(torch.logspace(0, -4, 192)) @ torch.linalg.qr(x.T)[0]
    exact = orthogonalize(x.double(), schedule=schedule)
    error = {
        dtype: float((orthogonalize(x.to(DEVICE), schedule=schedule, compute_dtype=dtype).cpu() - exact).norm() / exact.norm())
        for dtype in ("fp16", "bf16")
    }
    assert error["fp16"] < 0.5 * error["bf16"] and error["fp16"] < 0.1, error


@pytest.mark.parametrize(("precision", "bound"), [("highest", 2e-5), ("high", 0.05), ("medium", 0.2)])
def test_torchs_precision_of_fp32_products_is_what_fp32_iterations_have(precision: str, bound: float) -> None:
    """TF32 and split bf16 on a GPU, bf16 on CPUs that have it: noise of theirs, and no more."""
    torch.set_float32_matmul_precision(precision)
    assert max(errors_of(Model(**EXACT)).values()) < bound


DEEP = {"deepseek_v4": 10, "minimax": 12}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("highest", "fp32"), ("high", "fp32"), ("medium", "fp32"), ("highest", "bf16"), ("highest", "fp16")]
)
@pytest.mark.parametrize("polynomial", DEEP)
def test_deep_schedules_stand_every_precision_of_products(polynomial: str, precision: str, dtype: str) -> None:
    """Segments that were chosen for other rounding blow up; the guard would leave such updates out, and count them."""
    torch.set_float32_matmul_precision(precision)
    model = Model(ns_steps=DEEP[polynomial], polynomial=polynomial, compute_dtype=dtype, adjust_lr_fn="none")
    for seed in range(1, 4):
        before = model.read()
        model.step(seed)
        for name, after in model.read().items():
            if after.ndim == 2:
                moved = float((after - before[name]).norm()) / 0.1
                assert 0.5 * min(after.shape) ** 0.5 < moved < 1.4 * min(after.shape) ** 0.5, name
    assert model.optimizer.skipped_updates == model.optimizer.skipped_steps == 0


@pytest.mark.parametrize("options", [{"ns_steps": 5}, {"ns_steps": 5, "deflation": 2}], ids=["five", "deflation"])
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    ends = []
    for enabled in (False, True):
        model = Model(**EXACT, **options)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            model.step(1)
        ends.append(model.read())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("options", [{"ns_steps": 5}, ADAPTIVE, {**ADAPTIVE, "deflation": 2}], ids=["five", "adaptive", "deflation"])
def test_a_default_device_changes_nothing(options: dict[str, Any]) -> None:
    """Tensors of the host stay there, and those of the device too; on a CPU "meta" stands for a device that is not the parameters'."""
    runs = []
    for default in (None, DEVICE if ON_A_GPU else torch.device("meta")):
        with torch.device("cpu"):
            model = Model(**EXACT, **options)
        torch.set_default_device(default)
        for seed in range(1, 9):
            with torch.device("cpu"):
                gradients = values(seed)
            for (_, p), g in zip(model.named, gradients, strict=True):
                p.grad = g.to(p.device)
            model.optimizer.step()
        saved = model.optimizer.state_dict()
        torch.set_default_device(None)
        runs.append((model.read(), {str(v.device) for entry in saved["state"].values() for k, v in entry.items() if k == "spectrum"}))
    assert runs[0][1] == runs[1][1] <= {"cpu"}
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


@pytest.mark.parametrize("deflation", [1, 4])
def test_dominant_directions_are_flattened_on_the_device(deflation: int) -> None:
    """What the device makes of a matrix is what the CPU makes of it in fp64, but for fp32's rounding."""
    schedule = dataclasses.replace(schedule_for("minimax", 5), deflation=deflation)
    for x in (t for t in values(2) if t.ndim == 2 and min(t.shape) > 8):
        found = orthogonalize(x.to(DEVICE), schedule=schedule, compute_dtype="fp32").cpu()
        exact = orthogonalize(x.double(), schedule=schedule)
        assert (found - exact).norm() < 1e-2 * exact.norm()  # the sketch is the device's own
        s = torch.linalg.svdvals(found)
        assert abs(float(s[:deflation].mean()) - 1) < 0.35


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_kernel_for_symmetric_products(dtype: str) -> None:
    """Compiled on a GPU, in Triton's interpreter on a CPU, which has no bf16."""
    if dtype == "bf16" and not ON_A_GPU:
        dtype = "fp16"
    bound = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1e-2}[dtype]
    [errors] = run_ranks(1, kernel_errors, dtype, str(DEVICE))
    assert max(errors.values()) < bound, errors


def kernel_errors(dtype: str, device: str) -> dict[str, float]:
    """Of XXᵀ and bA + cA² against fp64: odd sizes, batches, and in Newton–Schulz."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    compute = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    kernel, result = SymmetricProducts("cuda", 1), {}
    sizes = [(1, 257, 130), (3, 64, 200)] if device == "cpu" else [(1, 257, 130), (3, 512, 2048), (2, 1000, 1000), (1, 4096, 1024)]
    for count, m, n in sizes:
        x = (torch.randn(count, m, n, generator=torch.Generator().manual_seed(m)) / n**0.5).to(device, compute)
        gram, out = torch.empty(count, m, m, device=device, dtype=compute), torch.empty(count, m, m, device=device, dtype=compute)
        kernel.multiply(x, x.mT, gram)
        exact = x.double() @ x.double().mT
        result[f"XXᵀ {count} × {m} × {n}"] = float((gram.double() - exact).norm() / exact.norm())
        kernel.multiply(gram, gram, out, addend=gram, beta=-4.775, alpha=2.0315)
        exact = -4.775 * gram.double() + 2.0315 * gram.double() @ gram.double()
        result[f"bA + cA² {count} × {m}"] = float((out.double() - exact).norm() / exact.norm())
        assert torch.equal(out, out.mT), "the two triangles differ"
    return result


# --------------------------------------------------------------------------------------------------------- gradients and state


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    runs = []
    for bad in (True, False):
        model = Model(**EXACT)
        model.step(1)
        if bad:
            for (_, p), g in zip(model.named, values(9), strict=True):
                p.grad = g.to(p.device)
            model.named[2][1].grad[3, 3] = float("nan")  # type: ignore[index]
            model.optimizer.step()
        model.step(2)
        runs.append(model)
    assert runs[0].optimizer.skipped_steps == 1 and runs[1].optimizer.skipped_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(runs[0].read().values(), runs[1].read().values(), strict=True))


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    model, lonely = Model(**EXACT, weight_decay=0.1), "layers.1.weight"
    model.step(1)
    before = model.read()
    for (name, p), g in zip(model.named, values(2), strict=True):
        p.grad = None if name == lonely else g.to(p.device)
    model.optimizer.step()
    moved = {name for name, after in model.read().items() if not torch.equal(after, before[name])}
    assert moved == set(before) - {lonely}


@pytest.mark.parametrize("options", [{"ns_steps": 5}, ADAPTIVE, {**ADAPTIVE, "deflation": 2}], ids=["five", "adaptive", "deflation"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(options: dict[str, Any]) -> None:
    whole, first = Model(**options), Model(**options)
    for seed in range(1, 13):
        whole.step(seed)
        if seed <= 7:
            first.step(seed)
    file = io.BytesIO()
    torch.save({"model": dict(first.named), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    again = Model(**options)
    with torch.no_grad():
        for name, p in again.named:
            p.copy_(saved["model"][name])
    again.optimizer.load_state_dict(saved["optimizer"])
    for seed in range(8, 13):
        again.step(seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.read().values(), again.read().values(), strict=True))


def test_state_moves_between_host_and_device() -> None:
    """A run goes on where the other hardware has left it; what is kept lies where its parameter lies."""
    here = Model(**EXACT)
    for seed in (1, 2):
        here.step(seed)
    other = Model(**EXACT, device=torch.device("cpu"))
    with torch.no_grad():
        for (_, p), (_, q) in zip(other.named, here.named, strict=True):
            p.copy_(q)
    other.optimizer.load_state_dict(copy.deepcopy(here.optimizer.state_dict()))
    before = here.read()
    for model in (here, other):
        model.step(3)
    for model, device in ((here, DEVICE.type), (other, "cpu")):
        assert {model.optimizer.state[p]["momentum_buffer"].device.type for _, p in model.named if p.ndim == 2} == {device}
    for name, after in here.read().items():
        assert (after - other.read()[name]).norm() <= 2e-5 * (after - before[name]).norm(), name


def test_parameters_on_the_host_of_a_model_that_is_offloaded() -> None:
    """Masters and gradients on the CPU, as offloading leaves them: orthogonalised where they lie, and right."""
    assert max(errors_of(Model(**EXACT, device=torch.device("cpu"))).values()) < 2e-5


# ------------------------------------------------------------------------------------------------------------- waiting, memory


@pytest.mark.parametrize("options", [{"ns_steps": 5}, ADAPTIVE], ids=["five", "adaptive"])
def test_the_host_never_waits_for_the_device(options: dict[str, Any]) -> None:
    """On a GPU torch raises where a step would; its logic is tested on tensors without values (test_no_waiting.py)."""
    model = Model(**options)
    for seed in range(1, 10):
        model.step(seed)
    grads = [[g.to(DEVICE) for g in values(seed)] for seed in range(10, 22)]
    if ON_A_GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for each in grads:
            for (_, p), g in zip(model.named, each, strict=True):
                p.grad = g
            model.optimizer.step()
    finally:
        if ON_A_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert model.optimizer.skipped_steps == 0


def test_memory_stays_flat_over_200_steps() -> None:
    model = Model(**ADAPTIVE)
    grads = [g.to(DEVICE) for g in values(1)]
    counts = []
    for step in range(200):
        for (_, p), g in zip(model.named, grads, strict=True):
            p.grad = g
        model.optimizer.step()
        if step in (39, 199):  # the same place of a measuring period
            gc.collect()
            alive = sum(isinstance(each, Tensor) for each in gc.get_objects())
            counts.append((alive, torch.cuda.memory_allocated() if ON_A_GPU else 0))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------------------------ two ranks


def sharded(placement: str, device: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """What four steps make of the model on this many ranks, which share a card."""
    world, here = dist.get_world_size(), torch.device(device)
    mesh = init_device_mesh(here.type, (world,))

    def place(t: Tensor) -> Tensor:
        return distribute_tensor(t.to(here), mesh, [Shard(0)]) if placement == "rows" else t.to(here)

    named = [(f"layers.{k}.weight", nn.Parameter(place(t))) for k, t in enumerate(values(0))]
    optimizer = MuonDist(named, lr=0.1, weight_decay=0.0, **EXACT, **options)
    for seed in range(1, 5):
        for (_, p), g in zip(named, values(seed), strict=True):
            p.grad = place(g)
        optimizer.step()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in named}


@pytest.mark.parametrize("options", [{"ns_steps": 5}, {**ADAPTIVE, "burn_in": 1, "measure_every": 2}], ids=["five", "adaptive"])
@pytest.mark.parametrize("placement", ["replicas", "rows"])
def test_two_ranks_that_share_the_device_give_the_update_of_one(placement: str, options: dict[str, Any]) -> None:
    try:
        ranks = run_ranks(2, sharded, placement, str(DEVICE), options)
    except RuntimeError as error:
        if ON_A_GPU and any(words in str(error) for words in ("not supported", "unsupported", "not implemented")):
            pytest.skip(f"gloo lacks a collective for tensors on a GPU: {str(error).splitlines()[-1][:120]}")
        raise
    model = Model(**EXACT, **options)
    before = model.read()
    for seed in range(1, 5):
        model.step(seed)
    for name, after in model.read().items():
        for rank in ranks:
            assert (rank[name] - after).norm() <= 2e-5 * (after - before[name]).norm(), name
