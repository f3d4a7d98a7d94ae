"""`muon-dist fit RUN…`: scaling laws of singular values, from runs of several sizes or from a CSV."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..show.picture import pyplot
from ..show.table import table
from ..spectrum.moments import QUANTILES
from ..spectrum.scaling_law import COLUMNS, Law, Observation, ScalingLaws, read_observations, shipped_laws
from ..telemetry import read_run

SETTLED = 0.25  # a quantile has settled once it stays within this of its final value, relative


def run(sources: list[str], *, q: float, picture: str | None, csv_path: str | None) -> int:
    if q not in QUANTILES:
        raise ValueError(f"--q is one of {', '.join(f'{x:g}' for x in QUANTILES)}, got {q:g}")
    observations: list[Observation] = []
    for source in sources:
        if source.endswith(".csv"):
            observations += read_observations(source)
            continue
        records = read_run(source)
        observations += stable_quantiles(records)
        settled = [
            s for name in {r["name"] for r in records} if (s := settles_at([r for r in records if r["name"] == name], q)) is not None
        ]
        if settled:
            print(f"{source}: σ at {q:g} within {SETTLED:.0%} of its end from step {statistics.median(settled):.0f} on (median matrix)")
    laws = ScalingLaws(observations)
    paper = shipped_laws()
    rows = []
    for law in (x for x in laws.laws if x.q == q):
        theirs = min((x for x in paper.laws if x.q == q and x.kind == law.kind), key=lambda x: abs(x.depth - law.depth), default=None)
        beside = "–" if theirs is None else f"{theirs.by_params.alpha:.2f} ± {theirs.by_params.alpha_deviation:.2f} ({theirs.depth:g})"
        a, b = law.by_params, law.by_rank
        rows.append(
            (
                law.kind,
                f"{law.depth:.2f}",
                a.count,
                f"{a.constant:.3g}",
                _alpha(a.alpha, a.alpha_deviation),
                beside,
                _alpha(b.alpha, b.alpha_deviation),
            )
        )
    print(f"\nσ_q = C·M^−α at q = {q:g}, M in parameters; ± one standard error. Rank-normalised: σ_q·√r = C·r^−α.")
    print(table(("kind", "depth", "sizes", "C", "α", "the paper's α (at depth)", "α, rank-normalised"), rows, right=(1, 2, 3)))
    if csv_path is not None:
        with Path(csv_path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((o.kind, f"{o.depth:g}", f"{o.params:g}", o.rank, f"{o.q:g}", f"{o.sigma:.4e}") for o in observations)
        print(f"written: {csv_path}")
    if picture is not None:
        draw([law for law in laws.laws if law.q == q], [o for o in observations if o.q == q], picture, q)
        print(f"written: {picture}")
    return 0


def _alpha(alpha: float, deviation: float) -> str:
    return f"{alpha:+.2f} ± {deviation:.2f}"


def stable_quantiles(records: list[dict[str, Any]]) -> list[Observation]:
    """The median of every quantile over the last third of a run; matrices of one kind and depth are averaged in the logarithm."""
    end = max(r["step"] for r in records)
    found: dict[tuple[str, float, float, int, float], list[float]] = defaultdict(list)
    for name in sorted({r["name"] for r in records}):
        late = [r for r in records if r["name"] == name and r["step"] > end * 2 / 3]
        for q in QUANTILES:
            known = [r[f"sigma_{q:g}"] for r in late if r[f"sigma_{q:g}"] is not None]
            if known and len(known) == len(late):  # where some are below the resolution, the rest would be biased
                first = late[0]
                key = (first["kind"] or "other", round(first["depth"], 4), float(first["params"]), int(first["rank"]), q)
                found[key].append(statistics.median(known))
    return [Observation(*key[:4], key[4], float(np.exp(np.mean(np.log(values))))) for key, values in sorted(found.items())]


def settles_at(records: list[dict[str, Any]], q: float) -> int | None:
    """The first measured step from which on a matrix's quantile stays near its final value (the median of its last third)."""
    known = [(r["step"], r[f"sigma_{q:g}"]) for r in sorted(records, key=lambda r: r["step"]) if r[f"sigma_{q:g}"] is not None]
    if len(known) < 3:
        return None
    final = statistics.median(v for _, v in known[-max(1, len(known) // 3) :])
    away = [k for k, (_, v) in enumerate(known) if abs(v / final - 1) > SETTLED]
    return int(known[min(away[-1] + 1, len(known) - 1) if away else 0][0])


def draw(laws: list[Law], observations: list[Observation], path: str, q: float) -> None:
    plt = pyplot()

    kinds = sorted({law.kind for law in laws})
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 3.8), layout="constrained", squeeze=False, sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [law for law in laws if law.kind == kind]
        for law, shade in zip(own, np.linspace(0.25, 0.95, len(own)), strict=True):
            colour = plt.get_cmap("viridis")(1 - shade)
            points = [(o.params, o.sigma) for o in observations if o.kind == kind and o.depth == law.depth]
            x = np.geomspace(min(p for p, _ in points), 3 * max(p for p, _ in points), 30)
            line = [law.by_params.predict(v) for v in x]
            axis.loglog(
                *zip(*points, strict=True), "o", color=colour, markersize=4, label=f"depth {law.depth:.2f}: α = {law.by_params.alpha:.2f}"
            )
            axis.loglog(x, [y for y, _ in line], color=colour)
            band = [np.exp(0 if np.isnan(d) else d) for _, d in line]
            low, high = ([y * b**sign for (y, _), b in zip(line, band, strict=True)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(title=kind, xlabel="parameters M")
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel(f"σ at q = {q:g} / ‖M‖_F")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
