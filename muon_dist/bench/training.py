"""`muon-dist bench training`: what the orthogonalisation does to the loss of small GPTs, on equal data and seeds.

Every variant is trained at several learning rates, since a larger update is a larger learning rate, and compared at its best. With
`--equal-rms` also at the learning rate at which its updates are as large as those of five Jordan steps. The learning rate rises over
20 steps, and falls to a tenth over the last half. Runs can be kept in a file, where later calls find them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..example.small_gpt import GPT, read_text, windows
from ..optimizer import MuonDist
from ..polar.cost import flops
from ..polar.polynomials import widest_schedule
from ..routing import build_param_groups
from ..show.picture import pyplot
from ..show.table import table, write_json
from .timing import device_name, device_of, now

# Twelve generated steps and three of Newton–Schulz's own: the polar factor of all that floating point resolves
EXACT = [*widest_schedule(12).steps, *[(1.875, -1.25, 0.375)] * 3]

FIVE, ADAMW = "five Jordan steps", "AdamW"
EIGHTH = -8  # an eighth of the width is deflated
VARIANTS: dict[str, dict[str, Any]] = {
    FIVE: {"ns_steps": 5},
    "adaptive steps": {},  # as they are by default
    "adaptive steps from one on": {"min_ns_steps": 1},
    "accuracy jordan5": {"accuracy": "jordan5"},
    "two steps, an eighth deflated": {"ns_steps": 2, "polynomial": "minimax", "deflation": EIGHTH},
    "coverage .9": {"coverage": 0.9},
    "exact polar factor": {"ns_steps": len(EXACT), "polynomial": EXACT},
    "three Jordan steps": {"ns_steps": 3},
    "one step, an eighth deflated": {"ns_steps": 1, "polynomial": "minimax", "deflation": EIGHTH},
    "two steps": {"ns_steps": 2, "polynomial": "minimax"},
    ADAMW: {},
}
HELD_OUT = 0.05  # of the text, at its end
EVALUATION_WINDOWS = 256
RMS_EVERY = 10  # steps between two looks at the size of updates


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What runs of one width have in common. `seconds`: instead of `steps`, where it is not None."""

    steps: int
    seconds: float | None
    width: int
    layers: int
    batch: int
    context: int
    rest_lr: float
    dtype: str
    device: str

    @property
    def on(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run.

    Attributes:
        loss: held-out, at the end.
        steps_of_ns: Newton–Schulz steps, mean over matrices and the run, weighted by their cost; None with AdamW.
        flops: of Newton–Schulz over those of five Jordan steps one by one, over the whole run, deflation and measurements included.
        rms: root mean square of the singular values of updates before they are scaled: 1 for exact polar factors.
        curve: (steps, seconds, training loss) along the way.
    """

    variant: str
    lr: float
    seed: int
    equal_rms: bool
    settings: dict[str, Any]
    parameters: int
    loss: float
    steps_of_ns: float | None
    flops: float | None
    rms: float | None
    seconds: float
    curve: list[tuple[int, float, float]]


def run(
    *,
    steps: int,
    seconds: float | None,
    seeds: Sequence[int],
    variants: Sequence[str] | None,
    width: Sequence[int],
    layers: int,
    batch: int,
    context: int,
    lr: Sequence[float],
    adam_lr: Sequence[float],
    rest_lr: float,
    equal_rms: bool,
    dtype: str,
    device: str,
    threads: int,
    results: str | None,
    picture: str | None,
    json_path: str | None,
) -> int:
    if min(steps, layers, batch, context, threads, *width) < 1 or min(rest_lr, *lr, *adam_lr) <= 0 or min(seeds) < 0:
        raise ValueError(
            "--steps, --width, --layers, --batch, --context and --threads must be at least 1, learning rates above 0, and --seeds from 0"
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
    chosen = [name for name in VARIANTS if variants is None or name in variants]
    kept = _read(results)
    shown: list[Trained] = []
    for each in width:
        settings = Settings(
            steps=steps,
            seconds=seconds,
            width=each,
            layers=layers,
            batch=batch,
            context=context,
            rest_lr=rest_lr,
            dtype=dtype,
            device=str(on),
        )
        size = sum(p.numel() for p in make_model(settings).parameters()) / 1e6
        long = f"{steps} steps" if seconds is None else f"{seconds:g} s"
        print(f"\nGPT of {size:.1f} M parameters, width {each}, {layers} layers, {dtype}; {long} of {batch * context} bytes")
        print(f"torch {torch.__version__}, {device_name(on)}", flush=True)
        if on.type == "cuda":  # the first kernels of a process take seconds
            train(text[:cut], text[cut:], FIVE, settings, lr=lr[0], seed=0, most_steps=3)
        mine = [r for r in kept if r.settings == asdict(settings)]

        def trained(name: str, rate: float, seed: int, equal: bool, settings: Settings = settings, mine: list[Trained] = mine) -> None:
            found = [r for r in mine if (r.variant, r.seed, r.equal_rms) == (name, seed, equal) and math.isclose(r.lr, rate, rel_tol=0.01)]
            if not found:
                found = [train(text[:cut], text[cut:], name, settings, lr=rate, seed=seed, equal_rms=equal)]
                mine += found
                _keep(results, found[0])
            shown.extend(found[:1])
            _say(found[0])

        for name in chosen:
            for rate, seed in ((rate, seed) for rate in (adam_lr if name == ADAMW else lr) for seed in seeds):
                trained(name, rate, seed, False)
        if equal_rms and (five := _best(r for r in mine if r.variant == FIVE and not r.equal_rms)):
            for name in (n for n in chosen if n not in (FIVE, ADAMW)):
                own = _best(r for r in mine if r.variant == name and not r.equal_rms)
                for seed in seeds if own else ():
                    trained(name, float(f"{five[0].lr * _rms(five) / _rms(own):.3g}"), seed, True)
        _report(shown, asdict(settings))
    if plt is not None:
        _draw(plt, shown, str(picture))
    write_json(json_path, {"device": device_name(on), "torch": torch.__version__, "runs": [asdict(r) for r in shown]})
    return 0


def _read(path: str | None) -> list[Trained]:
    if path is None or not Path(path).exists():
        return []
    return [Trained(**json.loads(line)) for line in Path(path).read_text().splitlines()]


def _keep(path: str | None, trained: Trained) -> None:
    """A line for a run; of its curve every tenth of it."""
    if path is not None:
        with Path(path).open("a") as file:
            file.write(json.dumps({**asdict(trained), "curve": trained.curve[:: max(1, len(trained.curve) // 10)]}) + "\n")


def _say(r: Trained) -> None:
    more = (
        ""
        if r.flops is None
        else f"; {r.steps_of_ns:.2f} Newton–Schulz steps, {r.flops:.2f}× the FLOPs of five, updates of rms {r.rms:.2f}"
    )
    what = " at equal rms" if r.equal_rms else ""
    print(f"  {r.variant}{what}, lr {r.lr:g}, seed {r.seed}: held-out loss {r.loss:.4f}{more}, {r.seconds:.0f} s", flush=True)


def _best(runs: Iterable[Trained]) -> list[Trained]:
    """The runs of a variant at the learning rate with the least mean loss."""
    rates: dict[float, list[Trained]] = {}
    for r in runs:
        rates.setdefault(r.lr, []).append(r)
    most = max((len(each) for each in rates.values()), default=0)
    complete = [each for each in rates.values() if len(each) == most]  # of rates that were tried with all seeds
    return min(complete, key=lambda each: statistics.mean(r.loss for r in each)) if complete else []


def _rms(runs: Sequence[Trained]) -> float:
    return statistics.mean(r.rms for r in runs if r.rms is not None)


def _report(runs: Sequence[Trained], settings: dict[str, Any]) -> None:
    runs = [r for r in runs if r.settings == settings]
    five = {r.seed: r.loss for r in _best(r for r in runs if r.variant == FIVE)}
    rows = []
    for equal in (False, True):
        for name in VARIANTS:
            best = sorted(_best(r for r in runs if r.variant == name and r.equal_rms == equal), key=lambda r: r.seed)
            if not best:
                continue
            differences = [r.loss - five[r.seed] for r in best if r.seed in five]
            known = [r for r in best if r.flops is not None]
            rows.append(
                (
                    name + (", equal rms" if equal else ""),
                    f"{best[0].lr:g}",
                    f"{statistics.mean(r.steps_of_ns for r in known if r.steps_of_ns is not None):.2f}" if known else "",
                    f"{statistics.mean(r.flops for r in known if r.flops is not None):.2f}×" if known else "",
                    f"{_rms(known):.2f}" if known else "",
                    "  ".join(f"{r.loss:.4f}" for r in best),
                    f"{statistics.mean(differences):+.4f}" if differences else "",
                    f"{min(differences):+.4f} … {max(differences):+.4f}" if differences else "",
                )
            )
    print()
    heads = ("variant", "best lr", "NS steps", "FLOPs", "rms", "held-out loss by seed", "against five Jordan", "least … most")
    print(table(heads, rows, right=(1, 2, 3, 4, 6)))
    if len(five) > 1:
        print(f"Spread of five Jordan steps over seeds: {max(five.values()) - min(five.values()):.4f}.", flush=True)


def make_model(settings: Settings) -> GPT:
    heads = max(4, settings.width // 64)
    return GPT(layers=settings.layers, width=settings.width, heads=heads, context=settings.context).to(settings.on)


def train(
    text: Tensor,
    held_out: Tensor,
    variant: str,
    settings: Settings,
    *,
    lr: float,
    seed: int,
    equal_rms: bool = False,
    most_steps: int | None = None,
) -> Trained:
    """One run; of at most `most_steps`."""
    torch.manual_seed(seed)
    model, on = make_model(settings), settings.on
    options = dict(VARIANTS[variant])
    if options.get("deflation") == EIGHTH:
        options["deflation"] = settings.width // 8
    optimizer: MuonDist | torch.optim.AdamW
    if variant != ADAMW:
        groups = build_param_groups(model, split={"attn.qkv.weight": [settings.width] * 3})
        optimizer = MuonDist(groups, lr=lr, adam_lr=settings.rest_lr, weight_decay=0.1, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]

    def loss_of(source: Tensor, seed_of_batch: int) -> Tensor:
        tokens, targets = (t.to(on) for t in windows(source, settings.batch, settings.context, seed_of_batch))
        with torch.autocast(on.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
            loss: Tensor = model(tokens, targets)
        return loss

    counts, costs, sizes, losses, times, done = [], [], [], [], [], 0.0
    started = now(on)
    for step in range(min(settings.steps if settings.seconds is None else 10**9, most_steps or 10**9)):
        loss = loss_of(text, seed * 1_000_003 + step)
        loss.backward()
        done = step / settings.steps if settings.seconds is None else (now(on) - started) / settings.seconds
        share = min((step + 1) / 20, 1.0, 0.1 + 1.8 * max(0.0, 1 - done))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        before = _watched(optimizer) if step % RMS_EVERY == 0 else {}
        optimizer.step()
        if before:
            sizes.append(_size_of_updates(before))
        optimizer.zero_grad()
        losses.append(loss.detach())
        times.append(time.perf_counter() - started)
        if isinstance(optimizer, MuonDist):
            count, cost = spent(optimizer)
            counts.append(count)
            costs.append(cost)
        if settings.seconds is not None and done >= 1:
            break
    times[-1] = now(on) - started
    with torch.no_grad():
        evaluated = [loss_of(held_out, -1 - k).item() for k in range(max(1, EVALUATION_WINDOWS // settings.batch))]
    return Trained(
        variant=variant,
        lr=lr,
        seed=seed,
        equal_rms=equal_rms,
        settings=asdict(settings),
        parameters=sum(p.numel() for p in model.parameters()),
        loss=statistics.mean(evaluated),
        steps_of_ns=statistics.mean(counts) if counts else None,
        flops=statistics.mean(costs) if costs else None,
        rms=statistics.mean(sizes) if sizes else None,
        seconds=times[-1],
        curve=[(k + 1, at, float(loss)) for k, (at, loss) in enumerate(zip(times, torch.stack(losses).tolist(), strict=True))],
    )


def spent(optimizer: MuonDist) -> tuple[float, float]:
    """What the last step took: Newton–Schulz steps per matrix, weighted by what one costs, and FLOPs over those of five Jordan steps."""
    steps = total = base = 0.0
    for program in optimizer.engine.programs:
        for i, matrix in enumerate(program.domain.matrices):
            schedule, unit = program.adaptation.schedule_now(i), flops(matrix.rows, matrix.cols, 1)
            steps += len(schedule) * unit
            total += flops(matrix.rows, matrix.cols, len(schedule), deflation=schedule.deflation)
            base += unit
    return steps / base, total / (5 * base)


def _watched(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[Tensor, float]]:
    """Muon's parameters as decay leaves them, and what an update's singular values are multiplied by (match_rms_adamw)."""
    return {
        p: (p.detach() * (1 - group["lr"] * group["weight_decay"]), group["lr"] * 0.2)
        for group in optimizer.param_groups
        if group.get("algorithm") == "muon"
        for p in group["params"]
    }


def _size_of_updates(before: dict[Tensor, tuple[Tensor, float]]) -> float:
    """Root mean square of the singular values of unscaled updates: ‖Δ‖_F over lr · .2 · √max(m, n) · √min(m, n), for each matrix alike.

    A fused matrix of parts along one side has the same √(m·n), so parts need not be told apart where they are square.
    """
    squares = [float(torch.linalg.vector_norm(p.detach() - old) / factor) ** 2 / p.numel() for p, (old, factor) in before.items()]
    return math.sqrt(statistics.mean(squares))


def _draw(plt: Any, runs: Sequence[Trained], picture: str) -> None:
    """Training loss of the first seed over steps and over time, each point the mean of a fiftieth of the run."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name in VARIANTS:
        best = _best(r for r in runs if r.variant == name and not r.equal_rms)
        if not best:
            continue
        curve = best[0].curve
        size = max(1, len(curve) // 50)
        chunks = [curve[k : k + size] for k in range(0, len(curve), size)]
        loss = [statistics.mean(at[2] for at in chunk) for chunk in chunks]
        for ax, column in ((axes[0], 0), (axes[1], 1)):
            ax.plot([chunk[-1][column] for chunk in chunks], loss, label=name)
    axes[0].set(xlabel="steps", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="seconds")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
