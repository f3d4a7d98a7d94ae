"""The Triton kernel for symmetric products: run in Triton's interpreter, compiled for GPUs that aren't there, and used by the optimizer."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from muon_dist import MuonDist
from muon_dist.cli.main import main
from muon_dist.groups import PlanOptions
from muon_dist.planner.models import model_parameters
from muon_dist.planner.plan import plan_model
from muon_dist.polar.cost import flops_of
from muon_dist.polar.newton_schulz import orthogonalize_batch
from muon_dist.polar.polynomials import minimax_schedule, schedule_for
from muon_dist.polar.products import SymmetricProducts

from .ranks import run_ranks
from .test_parity import BOUNDS, updates_against_reference

KERNEL = SymmetricProducts("cpu", 1)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The (tiles, matrices) of every launch."""
    from muon_dist.polar import kernels

    launched: list[tuple[int, int]] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            launched.append(grid)
            return real[grid]

    real = kernels._tiles
    monkeypatch.setattr(kernels, "_tiles", Spy())
    yield launched


# bf16 is missing: the interpreter multiplies its bits as integers. It is compiled below.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("size", [1, 7, 64, 65, 150])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_kernel_computes_one_triangle_of_the_whole_product(
    size: int, batch: tuple[int, ...], dtype: torch.dtype, bound: float, grids: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    for shape, tall in (((size, 90), False), ((90, size), True)):
        x = torch.randn(*batch, *shape).to(dtype) / 10
        first, second = (x.mT, x) if tall else (x, x.mT)
        gram, out = (torch.full((*batch, size, size), float("nan"), dtype=dtype) for _ in range(2))
        KERNEL.multiply(first, second, gram)
        whole = first.double() @ second.double()
        assert (gram - whole).norm() <= bound * whole.norm()
        assert torch.equal(gram, gram.mT)
        KERNEL.multiply(gram, gram, out, addend=gram, beta=-1.5, alpha=0.5)
        whole = -1.5 * gram.double() + 0.5 * gram.double() @ gram.double()
        assert (out - whole).norm() <= bound * whole.norm()
    tiles = -(-size // 64)
    assert grids == [(tiles * (tiles + 1) // 2, *(batch or (1,)))] * 4


def test_a_tile_finds_its_place_in_the_triangle_whatever_the_square_root_rounds_to() -> None:
    import triton
    import triton.language as tl

    from muon_dist.polar.kernels import _place

    def write_place(numbers, out):  # type: ignore[no-untyped-def]
        k = tl.program_id(0)
        i, j = _place(tl.load(numbers + k))
        tl.store(out + 2 * k, i)
        tl.store(out + 2 * k + 1, j)

    write_place.__globals__.update(tl=tl, _place=_place)
    sides = (1, 2, 3, 8, 2047, *range(2048, 20000, 501))
    places = [(i, j) for side in sides for i, j in ((side - 1, 0), (side - 1, side - 1), (side, 0), (side, side))]
    numbers = torch.tensor([i * (i + 1) // 2 + j for i, j in places], dtype=torch.int32)
    found = torch.zeros(len(places), 2, dtype=torch.int32)
    triton.jit(write_place)[(len(places),)](numbers, found)
    assert found.tolist() == [list(place) for place in places]


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose last element is more than 2³¹ elements from its first; few pages of it are ever touched."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last >= 2**31 and max(strides) < 2**31
    return torch.empty(last + 1, dtype=torch.float16).as_strided(shape, strides)


def test_offsets_beyond_two_to_the_31_are_of_64_bits() -> None:
    x = far_apart((3, 8, 8), (2**30, 8, 1)).copy_(torch.randn(3, 8, 8))  # matrices of a batch
    out = torch.empty(3, 8, 8, dtype=torch.float16)
    KERNEL.multiply(x, x.mT, out)
    assert (out - x.double() @ x.double().mT).abs().max() < 0.02

    x = far_apart((70, 4), (2**25, 1)).copy_(torch.randn(70, 4))  # rows of a matrix in two tiles
    near, far = torch.empty(70, 70, dtype=torch.float16), far_apart((70, 70), (2**25, 1))
    for out in (near, far):
        KERNEL.multiply(x, x.mT, out)
        assert (out - x.double() @ x.double().mT).abs().max() < 0.02
    again = torch.empty(70, 70, dtype=torch.float16)
    KERNEL.multiply(near, near, again, addend=far, beta=1.0, alpha=0.0)
    assert torch.equal(again, near)


SCHEDULES = [schedule_for("jordan", 5), minimax_schedule(1e-3, 5), dataclasses.replace(minimax_schedule(1e-3, 5), deflation=3)]


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (24, 24)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["jordan", "minimax", "deflated"])
def test_newton_schulz_with_the_kernel_is_newton_schulz(schedule: Any, shape: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    found = []
    for products in (SymmetricProducts("cuda"), SymmetricProducts("cuda", 1)):  # segments are those of a GPU both times
        result, moments = orthogonalize_batch(x.clone(), schedule, compute_dtype=torch.float32, measure=True, products=products)
        found.append((result, moments))
        assert bool(grids) == (products.kernels_from is not None)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def updates_with_kernels(placement: str, shapes: str, options: dict[str, Any]) -> float:
    os.environ["TRITON_INTERPRET"] = "1"
    from muon_dist.polar import kernels

    product, taken = kernels.symmetric_product, []
    kernels.symmetric_product = lambda *args: (taken.append(args), product(*args))[1]  # type: ignore[assignment, func-returns-value]
    worst = updates_against_reference(placement, shapes, torch.float32, {"bucket_mb": 0.008, "symmetric_kernels": 16, **options})
    assert taken and all(args[2].shape[-1] >= 16 for args in taken)
    return worst


@pytest.mark.parametrize(("placement", "options"), [("replicas", {}), ("fsdp2", {}), ("fsdp2", {"placement": "gram"})], ids=str)
def test_updates_are_those_of_the_reference(placement: str, options: dict[str, Any]) -> None:
    assert max(run_ranks(2, updates_with_kernels, placement, "even", options)) <= BOUNDS[torch.float32]


def test_one_triangle_is_half_the_operations_and_smaller_matrices_and_fp64_are_left_to_torch() -> None:
    jordan, whole, kernel = schedule_for("jordan", 5), SymmetricProducts("cuda"), SymmetricProducts("cuda", 2048)
    for dtype in (torch.bfloat16, torch.float32):
        assert flops_of(4096, 4096, jordan, dtype, kernel) < 0.7 * flops_of(4096, 4096, jordan, dtype, whole)
        assert flops_of(1024, 4096, jordan, dtype, kernel) == flops_of(1024, 4096, jordan, dtype, whole)
    assert flops_of(4096, 4096, jordan, torch.float64, kernel) == flops_of(4096, 4096, jordan, torch.float64, whole)
    llama = model_parameters("configs/models/llama-8b.json")
    plans = [
        plan_model(llama, dp=8, tp=1, zero=1, ns_steps=5, options=PlanOptions(symmetric_kernels=rows))[0] for rows in (None, 2048, 10**6)
    ]
    work = [sum(load.flops for load in plan.loads()) for plan in plans]
    assert work[1] < 0.75 * work[0] and work[2] == work[0]


@pytest.mark.parametrize("rows", [0, -1, True, 1.5, "2048"])
def test_a_wrong_number_of_rows_is_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows of a Gram matrix from which"):
        MuonDist([nn.Parameter(torch.ones(3, 3))], symmetric_kernels=rows)


def test_a_cpu_and_a_missing_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton, which comes with"):
        MuonDist([("w", p)], symmetric_kernels=2048).step()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA device, and matrices are orthogonalised on 'cpu'"):
        MuonDist([("w", p)], symmetric_kernels=2048).step()


def unlike() -> str:
    os.environ["TRITON_INTERPRET"] = "1"
    p = nn.Parameter(torch.ones(160, 160))
    try:
        MuonDist([("w", p)], symmetric_kernels=(None, 16)[torch.distributed.get_rank()]).bind()
    except ValueError as error:
        return str(error)
    return "bound"


def test_ranks_that_differ_are_told() -> None:
    assert all("agree" in text for text in run_ranks(2, unlike))


def test_the_bench_says_from_how_many_rows_on_the_kernel_is_faster(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ns.json"
    options = ["--shapes", "40x100", "64x64", "--rounds", "2", "--threads", "1", "--symmetric-kernels", "--json", str(out)]
    assert main(["bench", "ns", *options]) == 0
    assert "The kernel is not faster for the largest of these shapes" in capsys.readouterr().out  # the interpreter never is
    written = json.loads(out.read_text())["symmetric_kernels"]
    assert all(0 < error < 1e-6 for r in written for error in r["errors"])
    assert [(r["shape"], r["product"], len(r["kernel_over_torch"])) for r in written] == [
        ([m, n], product, 2) for m, n in ((40, 100), (64, 64)) for product in ("XXᵀ", "bA + cA²")
    ]


COMPILE = """
import itertools, json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from muon_dist.polar import kernels
from muon_dist.polar.products import SymmetricProducts
import torch

captured = {}
class Spy:
    def __getitem__(self, grid):
        def launch(*args, **options):
            captured.update(args=args, options=options)
        return launch
real, kernels._tiles = kernels._tiles, Spy()
words = ("mma.sync", "wgmma.mma_async", "cp.async", "ld.global.v4", "st.global.v4")
for arch, name_of, size in itertools.product((80, 90), ("bfloat16", "float16", "float32"), (512, 4096)):
    dtype = getattr(torch, name_of)
    a, out = (torch.empty(2, size, size, dtype=dtype) for _ in range(2))
    SymmetricProducts("cuda", 1).multiply(a, a, out, addend=a, beta=1.0, alpha=1.0)
    element = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[name_of]
    signature, constants, aligned = {}, {}, {}
    for k, (name, value) in enumerate(zip(real.arg_names, captured["args"])):  # as a launch specialises them
        if isinstance(value, torch.Tensor):
            signature[name], aligned[(k,)] = "*" + element, [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(k,)] = [["tt.divisibility", 16]]
    options = dict(captured["options"])
    for name in ("HAS_ADDEND", "TILE", "DEPTH"):
        signature[name], constants[name] = "constexpr", options.pop(name)
    built = triton.compile(ASTSource(real, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options)
    counts = {w: built.asm["ptx"].count(w) for w in words}
    told = {"arch": arch, "dtype": name_of, "size": size, "shared": built.metadata.shared, "binary": len(built.asm["cubin"])}
    print(json.dumps({**told, **counts}))
"""


def test_it_compiles_for_gpus_with_tensor_cores_and_asynchronous_copies(tmp_path: Any) -> None:
    """What launches on an A100 (80) or H100 (90) would run, in every dtype, for small and large matrices; nothing runs here."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    all_built = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({(built["arch"], built["dtype"], built["size"]) for built in all_built}) == 2 * 3 * 2
    for built in all_built:
        assert built["binary"] > 0 and built["shared"] <= 99 * 1024, built  # the smallest limit of a GPU since 2020
        assert built["cp.async"] and built["ld.global.v4"] and built["st.global.v4"], built
        if built["dtype"] != "float32":
            assert built["wgmma.mma_async" if built["arch"] == 90 else "mma.sync"], built
