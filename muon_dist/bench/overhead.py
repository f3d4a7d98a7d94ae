"""`muon-dist bench overhead`: what adapting costs, as a share of the optimizer step, by where the time goes."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from ..optimizer import MuonDist
from ..polar.newton_schulz import default_compute_dtype, orthogonalize_batch
from ..polar.polynomials import Schedule
from ..polar.recorder import moment_count
from ..show.table import table, write_json
from ..spectrum.policy import Policy
from ..spectrum.record import WIDTH_OF_DECISION
from .timing import device_name, device_of, seconds


def run(*, width: int, layers: int, cycles: int, threads: int, device: str, json_path: str | None) -> int:
    if min(width, layers, cycles, threads) < 1:
        raise ValueError(f"--width, --layers, --cycles and --threads must be at least 1, got {width}, {layers}, {cycles} and {threads}")
    on = device_of(device)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = {**dict.fromkeys("qkvo", (width, width)), "up": (4 * width, width), "down": (width, 4 * width)}
    named = [
        (f"layers.{k}.{kind}.weight", nn.Parameter(0.02 * torch.randn(shape, device=on)))
        for k in range(layers)
        for kind, shape in shapes.items()
    ]
    policy = Policy()
    optimizer = MuonDist(named, lr=1e-3)
    decay = torch.logspace(0, -2.5, width, device=on)
    for _, p in named:  # a spectrum of two and a half decades, fixed: what is timed doesn't depend on it
        p.grad = torch.randn(p.shape, device=on) * (decay if p.shape[1] == width else decay[:, None])
    inside, total = 0.0, 0.0
    optimizer.step()
    adaptation = optimizer.engine.programs[0].adaptation

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            result = function(*args)
            inside += time.perf_counter() - started
            return result

        return call

    for name in ("begin_step", "end_step", "record"):
        setattr(adaptation, name, timed(getattr(adaptation, name)))
    first = []
    for _ in range(policy.measure_every - 1):  # while measurements are dense
        first.append(seconds(optimizer.step, on))
    dense, inside = inside / sum(first), 0.0
    steps = cycles * policy.measure_every
    more = 0.0
    for _ in range(steps):
        total += seconds(optimizer.step, on)
        flops = [(adaptation.work_of(i), adaptation.schedules[i], s) for i, s in adaptation.measuring.items()]
        more += sum(work.flops(measured) - work.flops(usual) for work, usual, measured in flops)
    usual = sum(adaptation.work_of(i).flops(s) for i, s in enumerate(adaptation.schedules))
    extra = moments_extra(width, optimizer.schedules[named[0][0]][1], on)
    shares = {
        "deciding, sharing, bookkeeping on the host": inside / total,
        f"moments, {extra:.1%} of a measured matrix's iteration, every {policy.measure_every} steps": extra / policy.measure_every,
        "the step more that measured matrices take": more / (steps * usual),
    }
    matrices = len(named)
    numbers = [moment_count(len(s), s.deflation) for _, s in optimizer.schedules.values()]
    bytes_measured = 8 * round(statistics.mean(numbers) + 4 + WIDTH_OF_DECISION)
    print(f"{matrices} matrices of width {width}; {steps} steps of {total / steps * 1e3:.1f} ms")
    print(f"torch {torch.__version__}, {device_name(on)}\n")
    print(
        table(
            ("part", "share of the optimizer step"),
            [(k, f"{v:.2%}") for k, v in shares.items()] + [("all", f"{sum(shares.values()):.2%}")],
            right=(1,),
        )
    )
    print(f"\nthe host's part in the first {policy.measure_every} steps, where measurements are denser: {dense:.2%}")
    per_step = bytes_measured * matrices / policy.measure_every
    print(f"on the wire, with several ranks: {bytes_measured} bytes per measurement, {per_step:.0f} bytes per step on average")
    found = {
        "width": width,
        "layers": layers,
        "steps": steps,
        "milliseconds": total / steps * 1e3,
        "shares": shares,
        "host_at_first": dense,
    }
    write_json(json_path, found)
    return 0


def moments_extra(width: int, schedule: Schedule, device: torch.device) -> float:
    """What moments add to the orthogonalisation of a width × 4·width matrix: the median of pairs."""
    ratios = []
    compute = default_compute_dtype(device, torch.float32, schedule)
    for _ in range(31):
        pair = []
        for measured in (False, True):
            batch = torch.randn(1, width, 4 * width, device=device).to(compute)
            pair.append(seconds(partial(orthogonalize_batch, batch, schedule, compute_dtype=compute, measure=measured), device))
        ratios.append(pair[1] / pair[0] - 1)
    return max(0.0, statistics.median(ratios))
