"""`muon-dist report RUN …`: one self-contained HTML page of a run, with others beside it, and a table in the terminal.

The page is `report.html` with the figures put in; it loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from ..spectrum.moments import QUANTILES
from ..telemetry import known_at
from .run_log import RunLog, duration, read_log
from .table import mean_of_known, median_of_all, si, table

BINS = 24  # most points of a curve over the run for what matrices measure at different steps
SUMMARY = ("run", "optimizer", "step", "peak lr", "loss", "held out", "tokens/s", "optimizer share", "state per rank", "skipped")


def run(folders: list[str], out: str | None) -> int:
    logs = [read_log(folder) for folder in folders]
    for log, folder in zip(logs, folders, strict=True):
        if sum(other.name == log.name for other in logs) > 1:
            log.name = folder
    rows = [_summary(log) for log in logs]
    print(table(SUMMARY, rows, right=tuple(range(2, len(SUMMARY)))))
    print("loss: mean of the last logged tenth. optimizer share: of a step's time, the first logged steps left out.")
    path = Path(out) if out is not None else Path(folders[0]) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(logs))
    print(f"written: {path}")
    return 0


def page(logs: list[RunLog]) -> str:
    """The HTML of a page about the first run, with the curves of the others beside its own."""
    template = (resources.files(__package__) / "report.html").read_text()
    data = json.dumps(content(logs), allow_nan=False).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(logs[0].name)).replace("{{data}}", data)


def _tail(log: RunLog) -> list[dict[str, Any]]:
    return log.steps[-max(1, len(log.steps) // 10) :]


def _final_loss(log: RunLog) -> float | None:
    known = [(s["loss"], s["steps"]) for s in _tail(log) if s["loss"] is not None]
    return sum(loss * n for loss, n in known) / sum(n for _, n in known) if known else None


def _summary(log: RunLog) -> tuple[str, ...]:
    loss, held = _final_loss(log), log.evaluations[-1]["loss"] if log.evaluations else None
    steps = log.steps[1:] or log.steps
    peak = max((s["lr"] for s in log.steps), default=0.0)
    return (
        log.name,
        log.starts[-1]["optimizer"],
        str(log.steps[-1]["step"] if log.steps else 0),
        f"{peak:.3g}",
        "–" if loss is None else f"{loss:.3f}",
        "–" if held is None else f"{held:.3f}",
        f"{statistics.median(s['tokens_per_second'] for s in steps):,.0f}" if steps else "–",
        f"{log.optimizer_share(last=len(log.steps)):.1%}",
        si(log.plan["state_bytes"], "B") if log.plan else "–",
        str(log.steps[-1]["skipped_steps"] if log.steps else 0),
    )


def content(logs: list[RunLog]) -> dict[str, Any]:
    """Everything that the page shows, as JSON."""
    first = logs[0]
    summary = dict(zip(SUMMARY, _summary(first), strict=True))
    over_five, covered, (error, five) = first.flops_over_five(), first.mean_coverage(), first.mean_errors()
    return {
        "state": first.state(),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "tiles": [
            {"name": "step", "value": f"{summary['step']} of {first.options['steps']}"},
            {"name": "loss", "value": summary["loss"]},
            {"name": "held-out loss", "value": summary["held out"]},
            {"name": "tokens/s (median)", "value": summary["tokens/s"]},
            {"name": "optimizer's share of a step", "value": summary["optimizer share"]},
            {"name": "optimizer state per rank", "value": summary["state per rank"]},
            {"name": "Newton–Schulz FLOPs over five Jordan steps", "value": "–" if over_five is None else f"{over_five:.2f}×"},
            {"name": "mean error (five Jordan steps)", "value": "–" if error is None or five is None else f"{error:.2f} ({five:.2f})"},
            {"name": "mean coverage", "value": "–" if covered is None else f"{covered:.2f}"},
            {"name": "skipped steps", "value": summary["skipped"]},
        ],
        "runs": [
            {
                "name": log.name,
                "optimizer": log.starts[-1]["optimizer"],
                "steps": [[s["step"], s["loss"]] for s in log.steps],
                "evaluations": [[s["step"], s["loss"]] for s in log.evaluations],
                "lr": [[s["step"], s["lr"]] for s in log.steps],
                "norm": [[s["step"], s["gradient_norm"]] for s in log.steps],
                "speed": [[s["step"], s["tokens_per_second"]] for s in log.steps],
                "share": [[s["step"], s["optimizer_seconds"] / s["seconds"]] for s in log.steps],
            }
            for log in logs
        ],
        "columns": SUMMARY,
        "summaries": [_summary(log) for log in logs],
        "resumed": [s["step"] for s in first.starts[1:]],
        "spectra": _spectra(first),
        "layers": _layers(first),
        "kinds": _kinds(first),
        "plan": _plan(first),
        "checkpoints": [[c["step"], si(c["bytes"], "B"), f"{c['seconds']:.2f} s", str(c["path"])] for c in first.checkpoints[-20:]],
        "starts": [
            [
                s["step"],
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s["time"])),
                s["environment"]["launcher"],
                s["environment"]["world_size"],
                s["environment"]["hosts"],
                s["environment"]["device"],
            ]
            for s in first.starts
        ],
        "ran": duration((first.end["time"] if first.end else first.changed) - first.starts[0]["time"]),
        "options": {name: value for name, value in first.options.items() if value is not None},
        "packages": first.starts[-1]["environment"]["packages"],
        "platform": first.starts[-1]["environment"]["platform"],
    }


def _spectra(log: RunLog) -> dict[str, Any]:
    """Medians over matrices of quantiles, the share of those not resolved, and means of steps, error and cost, over the run.

    At every point each matrix counts with its last measurement by then.
    """
    if not log.matrices:
        return {"quantiles": [], "unresolved": [], "steps": [], "errors": [], "cost": []}
    places = sorted({r["step"] for r in log.matrices})
    if len(places) > BINS:
        places = [places[k * (len(places) - 1) // (BINS - 1)] for k in range(BINS)]
    known = known_at(log.matrices, places)

    def curve(name: str, average: Callable[[list[dict[str, Any]]], float | None], kind: str | None = None) -> dict[str, Any]:
        own = [[r for r in records if kind is None or (r["kind"] or "other") == kind] for records in known]
        return {"name": name, "points": [[place, average(records)] for place, records in zip(places, own, strict=True) if records]}

    def mean(key: str) -> Callable[[list[dict[str, Any]]], float | None]:
        return lambda records: mean_of_known([r[key] for r in records])

    def median(key: str) -> Callable[[list[dict[str, Any]]], float | None]:
        return lambda records: median_of_all([r[key] for r in records])

    def unknown(key: str) -> Callable[[list[dict[str, Any]]], float | None]:
        return lambda records: sum(r[key] is None for r in records) / len(records)

    kinds = sorted({r["kind"] or "other" for r in log.matrices})
    return {
        "quantiles": [curve(f"{q:g}", median(f"sigma_{q:g}")) for q in QUANTILES],
        "unresolved": [curve(f"{q:g}", unknown(f"sigma_{q:g}")) for q in QUANTILES],
        "steps": [curve(kind, mean("ns_steps"), kind) for kind in kinds],
        "errors": [curve("as chosen", mean("error")), curve("five Jordan steps", mean("error_of_five_steps"))],
        "cost": [
            curve(kind, lambda records: sum(r["flops"] for r in records) / sum(r["flops_of_five_steps"] for r in records), kind)
            for kind in kinds
        ],
    }


def _layers(log: RunLog) -> list[dict[str, Any]]:
    """The last measurement of every matrix."""
    keys = (
        "name",
        "kind",
        "depth",
        "shape",
        "step",
        "ns_steps",
        "deflation",
        "error",
        "error_of_five_steps",
        "coverage",
        "flops",
        "flops_of_five_steps",
    )
    return [
        {**{key: r[key] for key in keys}, "sigmas": [r[f"sigma_{q:g}"] for q in QUANTILES]}
        for r in sorted(log.last_matrices, key=lambda r: (r["depth"], r["kind"] or "other", r["name"]))
    ]


def _kinds(log: RunLog) -> list[list[Any]]:
    rows = []
    for kind, records in log.by_kind().items():
        steps = [r["ns_steps"] for r in records]
        errors = [mean_of_known([r[key] for r in records]) for key in ("error", "error_of_five_steps")]
        cost = sum(r["flops"] for r in records) / sum(r["flops_of_five_steps"] for r in records)
        span = str(min(steps)) if min(steps) == max(steps) else f"{min(steps)}–{max(steps)}"
        rows.append([kind, len(records), span, *("–" if e is None else f"{e:.2f}" for e in errors), f"{cost:.2f}×"])
    return rows


def _plan(log: RunLog) -> list[dict[str, Any]]:
    """Per domain of rank 0: imbalance, buckets, what every rank does, and the dearest matrices."""
    domains = []
    for domain in log.plan["domains"] if log.plan else []:
        owned: dict[int, int] = {}
        for matrix in domain["matrices"]:
            owned[matrix["owner"]] = owned.get(matrix["owner"], 0) + 1
        ranks = sorted(domain["ranks"], key=lambda r: -r["flops"])
        domains.append(
            {
                "imbalance": domain["imbalance"],
                "buckets": domain["buckets"],
                "matrices": len(domain["matrices"]),
                "count": len(ranks),
                "ranks": [
                    [
                        r["rank"],
                        owned.get(r["rank"], 0),
                        si(r["flops"], "FLOP"),
                        si(r["bytes_sent"], "B"),
                        si(r["bytes_received"], "B"),
                        si(r["peak_bytes"], "B"),
                    ]
                    for r in ranks[:16]
                ],
            }
        )
    return domains
