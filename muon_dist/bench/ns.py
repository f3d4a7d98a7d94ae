"""`muon-dist bench ns`: Newton–Schulz alone, per shape: the chosen form beside the direct one, its rate beside a plain product's.

In every round a batch of each shape is orthogonalised in the direct form, in the chosen one, and by torch.optim.Muon's iteration in
the same dtype: matrix by matrix as torch.optim.Muon does, as a batch, and with `--compiled` as a batch through torch.compile. A large
square product tells what the machine can do.
"""

from __future__ import annotations

import functools
import math
import platform
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..polar import newton_schulz
from ..polar.coefficients import JORDAN
from ..polar.cost import flops, form_name, segments_of
from ..polar.newton_schulz import default_compute_dtype, dtype_named, orthogonalize_batch
from ..polar.polynomials import Schedule, schedule_for
from ..polar.products import SymmetricProducts, check_kernels
from ..polar.restarts import single_steps
from ..show.table import table, write_json
from .peers import newton_schulz as torch_iteration
from .timing import device_name, device_of, spread, times_in_turns
from .timing import seconds as seconds_of

SHAPES = ("768x768", "768x3072", "3072x768", "1024x1024", "1024x4096", "2048x2048", "2048x5632")  # of models of .1 to 1 B parameters
DIRECT, CHOSEN, PEER = "direct", "chosen", "torch.optim.Muon"
BATCHED, COMPILED = "its iteration, batched", "its iteration, batched and compiled"
HEADS = {DIRECT: "over direct", PEER: "over torch.optim.Muon's", BATCHED: "… batched", COMPILED: "… compiled"}


def run(
    shapes: list[str],
    *,
    polynomial: str,
    steps: int,
    batch: list[int],
    dtype: str | None,
    device: str | None,
    rounds: int,
    threads: int,
    compiled: bool,
    symmetric_kernels: bool,
    json_path: str | None,
) -> int:
    if min(steps, *batch, rounds, threads) < 1:
        raise ValueError(f"--steps, --batch, --rounds and --threads must be at least 1, got {steps}, {batch}, {rounds} and {threads}")
    sizes, schedule = [_shape(text) for text in shapes], schedule_for(polynomial, steps)
    torch.set_num_threads(threads)
    on = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compute = dtype_named(dtype, "--dtype") or default_compute_dtype(on, torch.float32, schedule)
    if symmetric_kernels:
        check_kernels(1, on.type)
        if compute == torch.float64:
            raise ValueError("--symmetric-kernels: the kernel is for bf16, fp16 and fp32")
    name = device_name(on) if on.type == "cuda" else f"{platform.machine()}, {threads} threads"
    print(
        f"{polynomial}, {len(schedule)} steps, batches of {' and '.join(map(str, batch))}, {str(compute).removeprefix('torch.')}; "
        f"{rounds} rounds after one warm-up"
    )
    print(f"torch {torch.__version__}, {name}\n")
    side = max(2048, max(min(size) for size in sizes))
    peak = _product_rate(side, compute, on, rounds)
    rows, records = [], []
    peers = [DIRECT, PEER, BATCHED, *([COMPILED] if compiled else [])]
    for size, count in ((size, count) for count in batch for size in sizes):
        seconds = _measure(size, schedule, count, compute, on, rounds, compiled)
        segments = segments_of(schedule.steps, *size, compute, SymmetricProducts(on.type))
        useful = count * flops(*size, len(schedule)) / statistics.median(seconds[CHOSEN])
        ratios = {name: [a / b for a, b in zip(seconds[CHOSEN], seconds[name], strict=True)] for name in peers}
        name_of = f"{count} × {size[0]} × {size[1]}" if len(batch) > 1 else f"{size[0]} × {size[1]}"
        rows.append((name_of, form_name(segments), *map(spread, ratios.values()), f"{useful / 1e12:.3g}", f"{useful / peak:.0%}"))
        records.append(
            {"shape": list(size), "batch": count, "segments": list(segments), "seconds": seconds, "useful_flops_per_second": useful}
        )
    heads = ("matrix", "form", *(HEADS[name] for name in peers), "TFLOP/s", "of a product's rate")
    print(table(heads, rows, right=range(2, len(heads))))
    print(
        "\nover: time over that of the direct form, and of torch.optim.Muon's iteration in the same dtype; median (least … most) of the\n"
        f"rounds. TFLOP/s: useful operations, k(4m²n + 2m³), a second; a {side}³ product does {peak / 1e12:.3g}. More is possible\n"
        "where operations are saved."
    )
    options = {"polynomial": polynomial, "steps": len(schedule), "batch": batch, "dtype": str(compute), "device": name, "rounds": rounds}
    content = {"torch": torch.__version__, **options, "product_flops_per_second": peak, "shapes": records}
    if symmetric_kernels:
        content["symmetric_kernels"] = _compare_kernels(sizes, max(batch), compute, on, rounds)
    write_json(json_path, content)
    return 0


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{text!r} is not a shape: write rows and columns, as in 768x3072")
    return int(parts[0]), int(parts[1])


def _measure(
    size: tuple[int, int], schedule: Schedule, batch: int, dtype: torch.dtype, device: torch.device, rounds: int, compiled: bool
) -> dict[str, list[float]]:
    x = torch.randn(batch, *size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)

    def ours() -> None:
        orthogonalize_batch(x.clone(), schedule, compute_dtype=dtype)

    def direct() -> None:
        with mock.patch.object(newton_schulz, "segments_of", lambda steps, *rest: single_steps(len(steps))):
            ours()

    def peer() -> None:
        for matrix in x:
            torch_iteration(matrix, JORDAN, len(schedule), 1e-7)  # its only polynomial; they all cost the same

    sides: dict[str, Callable[[], Any]] = {DIRECT: direct, CHOSEN: ours, PEER: peer}
    sides[BATCHED] = functools.partial(torch_iteration, x, JORDAN, len(schedule), 1e-7)
    if compiled:
        torch.compiler.reset()  # a graph for this shape alone
        iteration = torch.compile(torch_iteration, dynamic=False)
        sides[COMPILED] = functools.partial(iteration, x, JORDAN, len(schedule), 1e-7)
    return times_in_turns(sides, rounds, device)


def _compare_kernels(
    sizes: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """The Triton kernel beside torch's product of everything, on XXᵀ and on bA + cA²; says from how many rows on it is faster."""
    kernel, whole = SymmetricProducts(device.type, 1), SymmetricProducts("cuda")
    rows, records = [], []
    slower = 0  # the largest matrix for which the kernel is not faster
    shapes = sorted({(min(size), max(size)) for size in sizes})
    for m, n in shapes:
        x = torch.randn(batch, m, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype) / math.sqrt(n)
        gram, out = x @ x.mT, torch.empty(batch, m, m, dtype=dtype, device=device)
        factors: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
            "XXᵀ": (x, x.mT, {}),
            "bA + cA²": (gram, gram, {"addend": gram, "beta": -4.775, "alpha": 2.0315}),
        }
        for name, (first, second, more) in factors.items():
            sides = {"kernel": kernel, "torch": whole}
            jobs: dict[str, Callable[[], Any]] = {
                side: functools.partial(products.multiply, first, second, out, **more) for side, products in sides.items()
            }
            times = times_in_turns(jobs, rounds, device)
            ratios = [a / b for a, b in zip(times["kernel"], times["torch"], strict=True)]
            errors = [_error(products, first, second, more) for products in sides.values()]
            away = [f"{error:.1e}" for error in errors]
            rows.append((f"{m} × {n}", name, spread(ratios), *away))
            records.append({"shape": [m, n], "product": name, "kernel_over_torch": ratios, "errors": errors})
            slower = m if statistics.median(ratios) >= 1 else slower
    print()
    print(table(("matrix", "product", "the kernel over torch's product", "its error", "torch's"), rows, right=(2, 3, 4)))
    print("\nerror: distance from the product in fp64, in Frobenius norm, over the norm of that.")
    if faster := [m for m, _ in shapes if m > slower]:
        print(f"\nOf these shapes the kernel is faster from {faster[0]} rows on: MuonDist(symmetric_kernels={faster[0]}).")
    else:
        print("\nThe kernel is not faster for the largest of these shapes: leave symmetric_kernels out.")
    return records


def _error(products: SymmetricProducts, first: Tensor, second: Tensor, more: dict[str, Any]) -> float:
    """How far a product of the first matrices of two batches is from that in fp64."""
    first, second, more = first[:1], second[:1], {k: v[:1] if isinstance(v, Tensor) else v for k, v in more.items()}
    exact = first.double() @ second.double() * more.get("alpha", 1.0)
    if "addend" in more:
        exact += more["beta"] * more["addend"].double()
    out = torch.empty_like(exact, dtype=first.dtype)
    products.multiply(first, second, out, **more)
    return float((out.double() - exact).norm() / exact.norm())


def _product_rate(side: int, dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    """Operations a second of a side × side product: the best of the rounds."""
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out: Tensor = torch.empty_like(first)
    best = min(seconds_of(lambda: torch.mm(first, second, out=out), device) for _ in range(rounds + 1))
    return 2 * side**3 / best
