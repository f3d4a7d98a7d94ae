"""`muon-dist bench associative-memory`: a task on which the number of Newton–Schulz steps visibly matters (arXiv 2602.05725).

W ∈ R^{K×K} stores K orthonormal pairs in M groups of C = K/M items; item j appears with p_j ∝ i(j)^−β/C, i its group, and its label
is noisy: p_{i|j} = (1−α)·1[i=j] + α/K. Cross-entropy of softmax(W) by columns (the pairs are taken as unit vectors), W₀ = 0.
T steps W −= η·update(∇L) without momentum, η = 1.5·ln K/T for Muon; gradient descent has the fixed rate 1/max p_j, half of what is
stable. Shown is the loss above the least possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..polar.newton_schulz import orthogonalize
from ..polar.polynomials import Schedule, schedule_for, widest_schedule
from ..show.picture import pyplot
from ..show.table import table, write_json
from ..spectrum.policy import choose_schedule

ITEMS, GROUPS, NOISE = 256, 32, 0.1
EXACT = Schedule((*widest_schedule(14).steps, *[(1.875, -1.25, 0.375)] * 4), "schatten8")


def run(*, horizons: list[int], betas: list[float], threads: int, picture: str | None, json_path: str | None) -> int:
    if len(horizons) < 2 or min(horizons) < 2 or min(betas) <= 1:
        raise ValueError(f"--horizons needs two or more numbers of steps, and --betas must be above 1; got {horizons} and {betas}")
    torch.set_num_threads(threads)
    horizons = sorted(set(horizons))
    results = []
    for beta in betas:
        rows = []
        for name in UPDATES:
            excess = [train(beta, horizon, name) for horizon in horizons]
            slope = _slope(horizons, excess)
            results.append({"beta": beta, "update": name, "horizons": horizons, "excess": excess, "slope": slope})
            rows.append((name, *[f"{e:.1e}" for e in excess], f"{slope:+.2f}"))
        print(f"\nβ = {beta:g}: excess loss after T steps, K = {ITEMS}, {GROUPS} groups, label noise {NOISE:g}")
        print(table(("update", *[f"T = {h}" for h in horizons], "slope"), rows, right=tuple(range(1, len(horizons) + 2))), flush=True)
        print(f"theory: Muon at most (ln K/T)², slope −2; gradient descent at least ln K/T^(1−1/β), slope {-(1 - 1 / beta):+.2f}")
    if picture is not None:
        draw(results, picture)
        print(f"\nwritten: {picture}")
    write_json(json_path, results)
    return 0


def _adaptive() -> Callable[[Tensor], Tensor]:
    """Measured at every tenth step: what covers all directions above a floor of 1e-6."""
    state: dict[str, object] = {"calls": 0}

    def update(gradient: Tensor) -> Tensor:
        if int(state["calls"]) % 10 == 0:  # type: ignore[call-overload]
            state["schedule"] = choose_schedule(gradient, coverage=0.99, tol=0.1, max_steps=14, floor=1e-6)
        state["calls"] = int(state["calls"]) + 1  # type: ignore[call-overload]
        schedule = state["schedule"]
        assert isinstance(schedule, Schedule)
        return orthogonalize(gradient, schedule=schedule)

    return update


def _by(schedule: Schedule) -> Callable[[], Callable[[Tensor], Tensor]]:
    return lambda: lambda gradient: orthogonalize(gradient, schedule=schedule)


UPDATES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "gradient descent": lambda: lambda gradient: gradient,
    "exact polar factor": _by(EXACT),
    "three Jordan steps": _by(schedule_for("jordan", 3)),
    "five Jordan steps": _by(schedule_for("jordan", 5)),
    "eight generated steps": _by(widest_schedule(8, 0.1)),
    "adaptive": _adaptive,
}


def train(beta: float, horizon: int, name: str) -> float:
    """The loss above its minimum after `horizon` steps."""
    weight = torch.arange(1, GROUPS + 1, dtype=torch.float64) ** -beta
    p = (weight / weight.sum()).repeat_interleave(ITEMS // GROUPS) / (ITEMS // GROUPS)  # of each item
    target = (1 - NOISE) * torch.eye(ITEMS, dtype=torch.float64) + NOISE / ITEMS  # target[i, j] = p_{i|j}
    least = -float((p * (target * target.log()).sum(0)).sum())
    w = torch.zeros(ITEMS, ITEMS, dtype=torch.float64)
    rate, update = 1.5 * math.log(ITEMS) / horizon, UPDATES[name]()
    if name == "gradient descent":
        rate = 1 / float(p.max())
    for _ in range(horizon):
        w -= rate * update((w.softmax(0) - target) * p)
    return -float((p * (target * w.log_softmax(0)).sum(0)).sum()) - least


def _slope(x: list[int], y: list[float]) -> float:
    """Of ln y against ln x."""
    a, b = torch.tensor(x).double().log(), torch.tensor(y).double().clamp_min(1e-300).log()
    return float(((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum())


def draw(results: list[dict[str, object]], path: str) -> None:
    plt = pyplot()

    betas = sorted({r["beta"] for r in results})  # type: ignore[type-var]
    figure, axes = plt.subplots(1, len(betas), figsize=(5.2 * len(betas), 4.2), layout="constrained", squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        for r in (r for r in results if r["beta"] == beta):
            axis.loglog(r["horizons"], r["excess"], marker="o", label=r["update"])
        axis.set(xlabel="steps T", ylabel="excess loss", title=f"associative memory, β = {beta:g}")
        axis.grid(alpha=0.3, which="both")
        axis.set_xticks(results[0]["horizons"], map(str, results[0]["horizons"]), minor=False)  # type: ignore[call-overload]
        axis.xaxis.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
