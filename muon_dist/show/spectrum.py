"""`muon-dist spectrum RUN`: what a run measured, as a table per matrix and a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..spectrum.moments import QUANTILES
from ..telemetry import known_at, read_run, read_updates
from .picture import pyplot
from .table import mean_of_known, median_of_all, table, write_json

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#7f7f7f")


def run(directory: str, picture: str | None, json_path: str | None) -> int:
    updates = read_updates(directory)
    if updates:
        _show_updates(updates)
    try:
        records = read_run(directory)
    except ValueError:
        if not updates:
            raise
        print("no spectra: they are measured where step counts adapt")
        return 0
    last = {r["name"]: r for r in records}
    rows = []
    for name, r in last.items():
        sigma = [_number(r[f"sigma_{q:g}"]) for q in QUANTILES]
        known = ("–" if r[key] is None else f"{r[key]:.2f}" for key in ("error", "error_of_five_steps", "coverage"))
        shape, cost = "×".join(map(str, r["shape"])), f"{r['flops'] / r['flops_of_five_steps']:.2f}×"
        rows.append((name, r["kind"] or "–", f"{r['depth']:.2f}", shape, r["step"], r["ns_steps"], r["deflation"], *known, cost, *sigma))
    heads = ("matrix", "kind", "depth", "shape", "measured at", "steps", "deflated", "error", "of five", "coverage", "FLOPs")
    header = (*heads, *[f"σ at {q:g}" for q in QUANTILES])
    print(table(header, rows, right=tuple(range(4, len(header)))))
    total, five = (sum(r[key] for r in last.values()) for key in ("flops", "flops_of_five_steps"))
    print("\nerror: root mean square of (gain − 1) over the directions above the noise floor, beside that of five Jordan steps.")
    print(f"σ: singular value at rank ⌈q·r⌉ from the top over ‖M‖_F; < where not resolved. {len(records)} measurements.")
    print(f"Newton–Schulz of these {len(last)} matrices: {total / five:.2f}× the FLOPs of five Jordan steps, each in its cheapest form.")
    path = Path(picture) if picture else Path(directory if Path(directory).is_dir() else Path(directory).parent) / "spectrum.png"
    if picture or importlib.util.find_spec("matplotlib"):
        draw(records, path)
        print(f"written: {path}")
    else:
        print("no picture: matplotlib is not installed")
    write_json(json_path, list(last.values()))
    return 0


def _show_updates(updates: dict[str, dict[str, Any]]) -> None:
    """What the last reported step did to every matrix."""
    rows = []
    for name, r in updates.items():
        ratio = "–" if r["update_to_weight"] is None else f"{r['update_to_weight']:.1e}"
        rows.append((name, "×".join(map(str, r["shape"])), r["step"], f"{r['update_rms']:.1e}", f"{r['weight_rms']:.1e}", ratio))
    print(table(("matrix", "shape", "at step", "update", "weights", "ratio"), rows, right=(2, 3, 4, 5)))
    print("\nupdate, weights: root mean square, without weight decay. ratio: of their norms.\n")


def _number(value: float | None) -> str:
    return "<" if value is None else f"{value:.1e}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Median quantiles over steps; the median singular value over depth at the end; error, and cost by kind, over steps."""
    plt = pyplot()

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4), layout="constrained")
    steps = sorted({r["step"] for r in records})
    known = known_at(records, steps)  # every matrix counts at every step, with its last measurement
    for q, colour in zip(QUANTILES, COLOURS, strict=False):
        values = [median_of_all([r[f"sigma_{q:g}"] for r in at]) for at in known]
        points = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
        hidden = sum(r[f"sigma_{q:g}"] is None for r in known[-1]) / len(known[-1])
        label = f"q = {q:g}" + (f", {hidden:.0%} below the resolution" if hidden else "")
        if points:
            axes[0].semilogy(*zip(*points, strict=True), marker=".", color=colour, label=label)
    axes[0].set(xlabel="step", ylabel="σ / ‖M‖_F", title="quantiles over steps (median of all matrices)")
    last = known[-1]
    for kind, colour in zip(sorted({r["kind"] or "other" for r in last}), COLOURS, strict=False):
        own = sorted((r["depth"], r["sigma_0.5"]) for r in last if (r["kind"] or "other") == kind and r["sigma_0.5"] is not None)
        if own:
            axes[1].semilogy(*zip(*own, strict=True), marker="o", markersize=4, color=colour, label=kind)
        mine = [(step, [r for r in at if (r["kind"] or "other") == kind]) for step, at in zip(steps, known, strict=True)]
        cost = [(step, sum(r["flops"] for r in at) / sum(r["flops_of_five_steps"] for r in at)) for step, at in mine if at]
        axes[3].plot(*zip(*cost, strict=True), marker=".", color=colour, label=kind)
    axes[1].set(xlabel="relative depth", ylabel="σ at q = .5 / ‖M‖_F", title="median singular value over depth, at the end")
    for key, label, style in (("error", "as chosen", "-"), ("error_of_five_steps", "five Jordan steps", "--")):
        means = [(step, v) for step, at in zip(steps, known, strict=True) if (v := mean_of_known([r[key] for r in at])) is not None]
        if means:
            axes[2].plot(*zip(*means, strict=True), "k" + style, label=label)
    axes[2].set(xlabel="step", ylabel="rms of (gain − 1)", title="error, mean of all matrices", ylim=(0, None))
    axes[3].set(xlabel="step", ylabel="FLOPs over five Jordan steps", title="cost by kind", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
