"""`muon-dist bench probes`: what other ways to a polar factor would stand on, in units of one bf16 product of the same size.

A rational step (Halley's) in Gram space saves most of the products, but needs a Cholesky factor or an inverse of an fp32 Gram matrix;
directions that are flattened first need skinny products and a small inverse root; small matrices need few launches, as a CUDA graph has.
Whether these pay is a question to the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..polar.flattening import flatten_dominant
from ..polar.newton_schulz import default_compute_dtype, orthogonalize_batch
from ..polar.polynomials import schedule_for
from ..show.table import table, write_json
from .timing import device_name, device_of, spread, times_in_turns

GRAPH_SHAPES = ((12, 768, 768), (4, 768, 3072), (4, 1024, 4096))  # batches as a bucket of 64 MiB has them


@dataclass(frozen=True, kw_only=True)
class Probe:
    """`job` beside `unit`: both are timed in turns.

    Attributes:
        size: rows of the matrices.
        what: is done, how often at once.
        unit_name: what a time is divided by.
    """

    size: int
    what: str
    job: Callable[[], Any]
    unit: Callable[[], Any]
    unit_name: str


def run(*, sizes: list[int], directions: list[int], batch: int, rounds: int, device: str, threads: int, json_path: str | None) -> int:
    if min(*sizes, *directions, batch, rounds, threads) < 1:
        raise ValueError("--sizes, --directions, --batch, --rounds and --threads must be at least 1")
    on = device_of(device)
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {device_name(on)}; {rounds} rounds after one warm-up\n", flush=True)
    rows, records = [], []
    groups = [*(_inverses(size, batch, on) for size in sizes), *(_skinny(max(sizes), count, on) for count in directions), _graphs(on)]
    for probe in (probe for group in groups for probe in group):
        try:
            times = times_in_turns({"job": probe.job, "unit": probe.unit}, rounds, on)
        except RuntimeError as error:  # a device may lack it, or have no room for it: that is an answer, too
            rows.append((probe.size, probe.what, f"failed: {str(error).splitlines()[0][:60]}", probe.unit_name))
            records.append({"size": probe.size, "what": probe.what, "failed": str(error)})
            continue
        ratios = [a / b for a, b in zip(times["job"], times["unit"], strict=True)]
        rows.append((probe.size, probe.what, spread(ratios), probe.unit_name))
        records.append(
            {"size": probe.size, "what": probe.what, "unit": probe.unit_name, "seconds": times, "ratio": statistics.median(ratios)}
        )
    print(table(("rows", "what", "time", "in units of"), rows, right=(0,)))
    if on.type != "cuda":
        print("\nCUDA graphs were left out: they need --device cuda.")
    write_json(json_path, {"torch": torch.__version__, "device": device_name(on), "rounds": rounds, "probes": records})
    return 0


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)


def _inverses(size: int, batch: int, device: torch.device) -> list[Probe]:
    """Of positive definite fp32 Gram matrices, the factor and the inverse from it; one by one and as a batch."""
    result = []
    for count in dict.fromkeys((1, batch)):
        x = _random(count, size, size, device=device, dtype=torch.bfloat16)
        half = x.float() / math.sqrt(size)
        gram = half @ half.mT + torch.eye(size, device=device)
        jobs: dict[str, Callable[[], Any]] = {
            "Cholesky": partial(torch.linalg.cholesky_ex, gram),
            "Cholesky and inverse": partial(_inverse, gram),
            "Cholesky and two triangular solves": partial(_solve, gram, half),
            "inverse": partial(torch.linalg.inv_ex, gram),
            "fp32 product": partial(torch.matmul, half, half),
        }
        for name, job in jobs.items():
            what = name if count == 1 else f"{name}, {count} at once"
            unit_name = "a bf16 product" if count == 1 else f"{count} bf16 products at once"
            result.append(Probe(size=size, what=what, job=job, unit=partial(torch.matmul, x, x), unit_name=unit_name))
    return result


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram).L)


def _skinny(size: int, count: int, device: torch.device) -> list[Probe]:
    """Deflation of `count` directions of a square matrix, and what another way to it would stand on."""
    x = _random(1, size, size, device=device, dtype=torch.bfloat16)
    precise = x.float().div_(torch.linalg.matrix_norm(x.float(), keepdim=True))
    y = precise[..., : min(count, size)].contiguous()
    jobs: dict[str, Callable[[], Any]] = {
        f"deflation of {count} directions, in fp32": lambda: flatten_dominant(precise.clone(), min(count, size), tall=False),
        f"XᵀXY, {count} directions, in fp32": lambda: precise.mT @ (precise @ y),
        f"QR of Y, {count} directions": lambda: torch.linalg.qr(y),
        f"eigenvectors of YᵀY, {count} directions": lambda: torch.linalg.eigh(y.mT @ y),
    }
    return [Probe(size=size, what=name, job=job, unit=lambda: x @ x, unit_name="a bf16 product") for name, job in jobs.items()]


def _graphs(device: torch.device) -> list[Probe]:
    """One bucket's Newton–Schulz replayed as a CUDA graph, beside the same launched one by one."""
    if device.type != "cuda":
        return []
    schedule, result = schedule_for("jordan", 5), []
    compute = default_compute_dtype(device, torch.float32, schedule)
    for count, rows, cols in GRAPH_SHAPES:
        x = _random(count, rows, cols, device=device, dtype=compute)

        def eager(x: Tensor = x) -> Tensor:
            return orthogonalize_batch(x.clone(), schedule, compute_dtype=compute)[0]

        result.append(Probe(size=rows, what=f"graph of {count} × {rows} × {cols}", job=_Graph(eager), unit=eager, unit_name="eager"))
    return result


class _Graph:
    """`work` as a CUDA graph, captured at the first call."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what a first call prepares is not part of the graph
                self._work()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._work()
        self._graph.replay()
