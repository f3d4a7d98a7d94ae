"""`muon-dist bench training`: what the number of Newton–Schulz steps does to the loss of a small GPT, on equal data and seeds.

Runs end after as many steps, or with `--seconds` after as much time each: then what a step costs counts, too. The learning rate rises over
20 steps, and falls to a tenth over the last half.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cli.picture import pyplot
from ..cli.table import table, write_json
from ..optimizer import MuonDist
from ..polar.cost import flops
from ..polar.polynomials import widest_schedule
from ..routing import build_param_groups
from .small_gpt import GPT, read_text, windows
from .timing import device_name, device_of, now

# Twelve generated steps and three of Newton–Schulz's own: the polar factor of all that floating point resolves
EXACT = [*widest_schedule(12).steps, *[(1.875, -1.25, 0.375)] * 3]

FIVE, ADAMW = "five Jordan steps", "AdamW"
VARIANTS: dict[str, dict[str, Any]] = {
    "three Jordan steps": {"ns_steps": 3},
    FIVE: {"ns_steps": 5},
    "exact polar factor": {"ns_steps": len(EXACT), "polynomial": EXACT},
    "adaptive, coverage .9": {"ns_steps": "adaptive", "coverage": 0.9},
    "adaptive, coverage .75": {"ns_steps": "adaptive", "coverage": 0.75},
    "adaptive, .9, deflation 4": {"ns_steps": "adaptive", "coverage": 0.9, "deflation": 4},
    ADAMW: {},
}
HELD_OUT = 0.05  # of the text, at its end
EVALUATION_WINDOWS = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs have in common. `seconds`: instead of `steps`, where it is not None."""

    steps: int
    seconds: float | None
    width: int
    layers: int
    batch: int
    context: int
    lr: float
    adam_lr: float
    dtype: str
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run.

    Attributes:
        loss: held-out, at the end.
        mean_steps: Newton–Schulz steps, mean over matrices and the run, weighted by their cost; None with AdamW.
        curve: (steps, seconds, training loss) along the way.
    """

    loss: float
    mean_steps: float | None
    curve: list[tuple[int, float, float]]


def run(
    *,
    steps: int,
    seconds: float | None,
    seeds: int,
    variants: Sequence[str] | None,
    width: int,
    layers: int,
    batch: int,
    context: int,
    lr: float,
    adam_lr: float,
    dtype: str,
    device: str,
    threads: int,
    picture: str | None,
    json_path: str | None,
) -> int:
    if min(steps, seeds, width, layers, batch, context, threads) < 1 or min(lr, adam_lr) <= 0:
        raise ValueError(
            "--steps, --seeds, --width, --layers, --batch, --context and --threads must be at least 1, and --lr and --adam-lr above 0"
        )
    if seconds is not None and seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {seconds}")
    if unknown := set(variants or ()) - set(VARIANTS):
        raise ValueError(f"--variants: there is no {sorted(unknown)[0]!r}: choose from {', '.join(map(repr, VARIANTS))}")
    on = device_of(device)
    plt = pyplot() if picture is not None else None
    torch.set_num_threads(threads)
    text = read_text(None)
    cut = int(len(text) * (1 - HELD_OUT))
    settings = Settings(
        steps=steps,
        seconds=seconds,
        width=width,
        layers=layers,
        batch=batch,
        context=context,
        lr=lr,
        adam_lr=adam_lr,
        dtype=dtype,
        device=on,
    )
    model = make_model(settings)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    long = f"{steps} steps" if seconds is None else f"{seconds:g} s"
    print(
        f"GPT of {size:.1f} M parameters, width {width}, {layers} layers, {dtype}; {long} of {batch * context} bytes, "
        f"lr {lr:g} (AdamW's own {adam_lr:g}); {seeds} seeds, equal data"
    )
    print(f"torch {torch.__version__}, {device_name(on)}", flush=True)
    chosen = [name for name in VARIANTS if variants is None or name in variants]
    if on.type == "cuda":  # the first kernels of a process take seconds
        train(text[:cut], text[cut:], VARIANTS[chosen[0]], settings, seed=0, most_steps=3)
    runs: dict[str, list[Trained]] = {name: [] for name in chosen}
    for name, seed in ((name, seed) for name in chosen for seed in range(seeds)):
        trained = train(text[:cut], text[cut:], VARIANTS[name], settings, seed=seed)
        runs[name].append(trained)
        done, took, _ = trained.curve[-1]
        counts = "" if trained.mean_steps is None else f", {trained.mean_steps:.2f} Newton–Schulz steps on average"
        print(f"  {name}, seed {seed}: held-out loss {trained.loss:.4f}{counts}, {done} steps in {took:.0f} s", flush=True)
    base = runs.get(FIVE)
    rows = [_row(name, each, base) for name, each in runs.items()]
    print()
    heads = ("variant", "NS steps", "steps", "ms a step", "held-out loss by seed", "against five Jordan", "least … most")
    print(table(heads, rows, right=(1, 2, 3, 5)))
    if base:
        noise = max(r.loss for r in base) - min(r.loss for r in base)
        print(f"\nSpread of five Jordan steps over seeds: {noise:.4f}. NS steps: mean over matrices and the run, weighted by their cost.")
    if plt is not None:
        _draw(plt, runs, str(picture))
    described = {key: value for key, value in vars(settings).items() if key != "device"}
    content = {name: [vars(trained) for trained in each] for name, each in runs.items()}
    write_json(json_path, {**described, "device": device_name(on), "parameters": size * 1e6, "torch": torch.__version__, "runs": content})
    return 0


def _row(name: str, runs: list[Trained], base: list[Trained] | None) -> tuple[str, ...]:
    differences = [a.loss - b.loss for a, b in zip(runs, base, strict=True)] if base else []
    counts = [r.mean_steps for r in runs if r.mean_steps is not None]
    return (
        name,
        f"{statistics.mean(counts):.2f}" if counts else "",
        f"{statistics.mean(r.curve[-1][0] for r in runs):.0f}",
        f"{statistics.mean(r.curve[-1][1] / r.curve[-1][0] for r in runs) * 1e3:.1f}",
        "  ".join(f"{r.loss:.4f}" for r in runs),
        f"{statistics.mean(differences):+.4f}" if differences else "",
        f"{min(differences):+.4f} … {max(differences):+.4f}" if differences else "",
    )


def make_model(settings: Settings) -> GPT:
    heads = max(4, settings.width // 64)
    return GPT(layers=settings.layers, width=settings.width, heads=heads, context=settings.context).to(settings.device)


def train(
    text: Tensor, held_out: Tensor, options: dict[str, Any], settings: Settings, *, seed: int, most_steps: int | None = None
) -> Trained:
    """One run; of at most `most_steps`."""
    torch.manual_seed(seed)
    model, on = make_model(settings), settings.device
    groups = build_param_groups(model, split={"attn.qkv.weight": [settings.width] * 3})
    optimizer: MuonDist | torch.optim.AdamW
    if options:
        adaptive: dict[str, Any] = {"burn_in": 20, "measure_every": 25} if options["ns_steps"] == "adaptive" else {}
        optimizer, lr = MuonDist(groups, lr=settings.lr, weight_decay=0.1, **adaptive, **options), settings.lr
    else:
        lr = settings.adam_lr
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(source: Tensor, seed_of_batch: int) -> Tensor:
        tokens, targets = (t.to(on) for t in windows(source, settings.batch, settings.context, seed_of_batch))
        with torch.autocast(on.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
            loss: Tensor = model(tokens, targets)
        return loss

    counts, losses, times, done = [], [], [], 0.0
    started = now(on)
    for step in range(min(settings.steps if settings.seconds is None else 10**9, most_steps or 10**9)):
        loss = loss_of(text, seed * 1_000_003 + step)
        loss.backward()
        done = step / settings.steps if settings.seconds is None else (now(on) - started) / settings.seconds
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, 1.0, 0.1 + 1.8 * max(0.0, 1 - done))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        times.append(time.perf_counter() - started)
        if isinstance(optimizer, MuonDist):
            counts.append(mean_step_count(optimizer))
        if settings.seconds is not None and done >= 1:
            break
    times[-1] = now(on) - started
    with torch.no_grad():
        evaluated = [loss_of(held_out, -1 - k).item() for k in range(max(1, EVALUATION_WINDOWS // settings.batch))]
    curve = [(k + 1, at, float(loss)) for k, (at, loss) in enumerate(zip(times, torch.stack(losses).tolist(), strict=True))]
    return Trained(loss=statistics.mean(evaluated), mean_steps=statistics.mean(counts) if counts else None, curve=curve)


def mean_step_count(optimizer: MuonDist) -> float:
    """Newton–Schulz steps per matrix, weighted by what one step costs."""
    pairs = [(len(schedule), flops(*shape, 1)) for shape, schedule in optimizer.schedules.values()]
    return sum(n * w for n, w in pairs) / sum(w for _, w in pairs)


def _draw(plt: Any, runs: dict[str, list[Trained]], picture: str) -> None:
    """Training loss of the first seed over steps and over time, each point the mean of a fiftieth of the run."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, (first, *_) in runs.items():
        size = max(1, len(first.curve) // 50)
        chunks = [first.curve[k : k + size] for k in range(0, len(first.curve), size)]
        loss = [statistics.mean(at[2] for at in chunk) for chunk in chunks]
        for ax, column in ((axes[0], 0), (axes[1], 1)):
            ax.plot([chunk[-1][column] for chunk in chunks], loss, label=name)
    axes[0].set(xlabel="steps", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="seconds")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
