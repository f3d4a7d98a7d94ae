"""`muon-dist bench training`: what the number of Newton–Schulz steps does to the loss of a small GPT, on equal data and seeds."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ..cli.table import table, write_json
from ..optimizer import MuonDist
from ..polar.cost import flops
from ..polar.polynomials import widest_schedule
from ..routing import build_param_groups
from .small_gpt import GPT, read_text, windows

# Twelve generated steps and three of Newton–Schulz's own: the polar factor of all that floating point resolves
EXACT = [*widest_schedule(12).steps, *[(1.875, -1.25, 0.375)] * 3]

VARIANTS: dict[str, dict[str, Any]] = {
    "three Jordan steps": {"ns_steps": 3},
    "five Jordan steps": {"ns_steps": 5},
    "exact polar factor": {"ns_steps": len(EXACT), "polynomial": EXACT},
    "adaptive, coverage .9": {"ns_steps": "adaptive", "coverage": 0.9},
    "adaptive, coverage .75": {"ns_steps": "adaptive", "coverage": 0.75},
    "adaptive, .9, deflation 4": {"ns_steps": "adaptive", "coverage": 0.9, "deflation": 4},
}
HELD_OUT = 0.05  # of the text, at its end
EVALUATION_WINDOWS = 128


def run(
    *, steps: int, seeds: int, width: int, layers: int, batch: int, context: int, lr: float, threads: int, json_path: str | None
) -> int:
    if min(steps, seeds, width, layers, batch, context, threads) < 1 or lr <= 0:
        raise ValueError("--steps, --seeds, --width, --layers, --batch, --context and --threads must be at least 1, and --lr above 0")
    torch.set_num_threads(threads)
    text = read_text(None)
    cut = int(len(text) * (1 - HELD_OUT))
    print(
        f"GPT of width {width}, {layers} layers; {steps} steps of {batch * context} bytes, lr {lr:g}; {seeds} seeds, equal data", flush=True
    )
    runs: list[dict[str, Any]] = []
    for name, options in VARIANTS.items():
        losses, counts = [], []
        for seed in range(seeds):
            loss, mean_steps, seconds = train(
                text[:cut], text[cut:], options, steps=steps, seed=seed, width=width, layers=layers, batch=batch, context=context, lr=lr
            )
            losses.append(loss)
            counts.append(mean_steps)
            print(f"  {name}, seed {seed}: held-out loss {loss:.4f}, {mean_steps:.2f} steps on average, {seconds:.0f} s", flush=True)
        runs.append({"variant": name, "losses": losses, "mean_steps": statistics.mean(counts)})
    base = next(r for r in runs if r["variant"] == "five Jordan steps")
    rows = []
    for r in runs:
        differences = [a - b for a, b in zip(r["losses"], base["losses"], strict=True)]
        each = "  ".join(f"{loss:.4f}" for loss in r["losses"])
        rows.append(
            (
                r["variant"],
                f"{r['mean_steps']:.2f}",
                each,
                f"{statistics.mean(differences):+.4f}",
                f"{min(differences):+.4f} … {max(differences):+.4f}",
            )
        )
    print()
    print(table(("variant", "NS steps", "held-out loss by seed", "against five Jordan", "least … most"), rows, right=(1, 3)))
    noise = max(base["losses"]) - min(base["losses"])
    print(f"\nSpread of five Jordan steps over seeds: {noise:.4f}. NS steps: mean over matrices and the run, weighted by their cost.")
    settings = {"steps": steps, "width": width, "layers": layers, "batch": batch, "context": context, "lr": lr, "torch": torch.__version__}
    write_json(json_path, {**settings, "runs": runs})
    return 0


def train(
    text: Tensor,
    held_out: Tensor,
    options: dict[str, Any],
    *,
    steps: int,
    seed: int,
    width: int,
    layers: int,
    batch: int,
    context: int,
    lr: float,
) -> tuple[float, float, float]:
    """Held-out loss, mean step count and seconds of one run."""
    torch.manual_seed(seed)
    model = GPT(layers=layers, width=width, heads=4, context=context)
    adaptive: dict[str, Any] = {"burn_in": 20, "measure_every": 25} if options["ns_steps"] == "adaptive" else {}
    groups = build_param_groups(model, split={"attn.qkv.weight": [width] * 3})
    optimizer = MuonDist(groups, lr=lr, weight_decay=0.1, **adaptive, **options)
    counts, started = [], time.perf_counter()
    for step in range(steps):
        tokens, targets = windows(text, batch, context, seed * 1_000_003 + step)
        model(tokens, targets).backward()
        for group in optimizer.param_groups:  # up over 20 steps, down to a tenth over the last half
            group["lr"] = lr * min((step + 1) / 20, 1.0, 0.1 + 1.8 * (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        counts.append(mean_step_count(optimizer))
    with torch.no_grad():
        losses = [model(*windows(held_out, batch, context, -1 - k)).item() for k in range(max(1, EVALUATION_WINDOWS // batch))]
    return statistics.mean(losses), statistics.mean(counts), time.perf_counter() - started


def mean_step_count(optimizer: MuonDist) -> float:
    """Newton–Schulz steps per matrix, weighted by what one step costs."""
    pairs = [(len(schedule), flops(*shape, 1)) for shape, schedule in optimizer.schedules.values()]
    return sum(n * w for n, w in pairs) / sum(w for _, w in pairs)
