"""`muon-dist spectrum RUN`: what a run measured, as a table per matrix and a picture."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..spectrum.moments import QUANTILES
from ..telemetry import read_run
from .picture import pyplot
from .table import mean_of_known, table, write_json

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#7f7f7f")


def run(directory: str, picture: str | None, json_path: str | None) -> int:
    records = read_run(directory)
    last = {r["name"]: r for r in records}
    rows = []
    for name, r in last.items():
        sigma = [_number(r[f"sigma_{q:g}"]) for q in QUANTILES]
        covered = "–" if r["coverage"] is None else f"{r['coverage']:.2f}"
        rows.append(
            (name, r["kind"] or "–", f"{r['depth']:.2f}", "×".join(map(str, r["shape"])), r["step"], r["ns_steps"], covered, *sigma)
        )
    header = ("matrix", "kind", "depth", "shape", "measured at", "steps", "coverage", *[f"σ at {q:g}" for q in QUANTILES])
    print(table(header, rows, right=tuple(range(4, len(header)))))
    total, five = (sum(r[key] for r in last.values()) for key in ("flops", "flops_of_five_steps"))
    print(f"\nσ: singular value at rank ⌈q·r⌉ from the top over ‖M‖_F; < where not resolved. {len(records)} measurements.")
    print(f"Newton–Schulz of these {len(last)} matrices: {total / five:.2f}× the FLOPs of five steps.")
    path = Path(picture) if picture else Path(directory if Path(directory).is_dir() else Path(directory).parent) / "spectrum.png"
    if picture or importlib.util.find_spec("matplotlib"):
        draw(records, path)
        print(f"written: {path}")
    else:
        print("no picture: matplotlib is not installed")
    write_json(json_path, list(last.values()))
    return 0


def _number(value: float | None) -> str:
    return "<" if value is None else f"{value:.1e}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Median quantiles over steps; the median singular value over depth at the end; steps and coverage over steps."""
    plt = pyplot()
    import numpy as np

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    steps = sorted({r["step"] for r in records})
    cycle = [steps[int(k)] for k in np.linspace(0, len(steps) - 1, min(12, len(steps)) + 1)] if len(steps) > 1 else [*steps, steps[0] + 1]
    bins: dict[int, list[dict[str, Any]]] = defaultdict(list)  # steps are staggered between matrices: average over parts of the run
    for r in records:
        bins[min(max(0, int(np.searchsorted(cycle, r["step"], side="right")) - 1), len(cycle) - 2)].append(r)
    places = [float(np.mean([r["step"] for r in bins[k]])) for k in sorted(bins)]
    for q, colour in zip(QUANTILES, COLOURS, strict=False):
        known = [[r[f"sigma_{q:g}"] for r in bins[k] if r[f"sigma_{q:g}"] is not None] for k in sorted(bins)]
        points = [(p, float(np.median(v))) for p, v in zip(places, known, strict=True) if v]
        if points:
            axes[0].semilogy(*zip(*points, strict=True), marker=".", color=colour, label=f"q = {q:g}")
    axes[0].set(xlabel="step", ylabel="σ / ‖M‖_F", title="quantiles over steps (median of matrices)")
    last = {r["name"]: r for r in records}.values()
    for kind, colour in zip(sorted({r["kind"] or "other" for r in last}), COLOURS, strict=False):
        own = sorted((r["depth"], r["sigma_0.5"]) for r in last if (r["kind"] or "other") == kind and r["sigma_0.5"] is not None)
        if own:
            axes[1].semilogy(*zip(*own, strict=True), marker="o", markersize=4, color=colour, label=kind)
        counts = [[r["ns_steps"] for r in bins[k] if (r["kind"] or "other") == kind] for k in sorted(bins)]
        taken = [(p, float(np.mean(v))) for p, v in zip(places, counts, strict=True) if v]
        axes[2].plot(*zip(*taken, strict=True), marker=".", color=colour, label=kind)
    axes[1].set(xlabel="relative depth", ylabel="σ at q = .5 / ‖M‖_F", title="median singular value over depth, at the end")
    coverage = [
        (p, v) for p, k in zip(places, sorted(bins), strict=True) if (v := mean_of_known([r["coverage"] for r in bins[k]])) is not None
    ]
    axes[2].set(xlabel="step", ylabel="Newton–Schulz steps", title="steps by kind; dashed: coverage", ylim=(0, None))
    beside = axes[2].twinx()
    if coverage:
        beside.plot(*zip(*coverage, strict=True), "k--", linewidth=1)
    beside.set(ylim=(0, 1.05), ylabel="coverage")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
