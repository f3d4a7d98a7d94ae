"""gpu.md: what `bash tests/gpu.sh` saw, as tables for a README."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """The whole page, from what gpu.json holds."""
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "cuda", "triton", "python") if record[name])
    lines = [f"# {record['device']}", "", f"{versions}{'; the smallest sizes (--quick)' if record['quick'] else ''}.", ""]
    lines += _table(("part", "state", "seconds"), [(p["name"], p["state"], f"{p['seconds']:.0f}") for p in record["parts"]])
    for part in record["parts"]:
        lines += ["", f"## {part['name']}: {part['question']}".rstrip(": "), ""]
        if part["state"] == "did not fit":
            lines.append("It did not fit into the time that was left.")
        elif part["state"] == "cut off":
            lines.append(f"It was cut off after {part['seconds']:.0f} s; {part['name']}.txt has what it printed.")
        elif "tests" in part:
            lines.append(", ".join(f"{count} {kind}" for kind, count in part["tests"].items()) or "No test ran.")
            lines += [f"- {line}" for line in part["told"]]
        elif part["state"] == "wrong":
            lines.append(f"It failed: {(part['printed'].strip().splitlines() or ['nothing was printed'])[-1]}")
        else:
            lines += WRITERS[part["name"]](part["figures"])
    if not record["matplotlib"]:
        lines += ["", "No pictures: matplotlib is missing. training.json has what they would show."]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _spread(above: list[float], below: list[float]) -> str:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def _ns(figures: dict[str, Any]) -> list[str]:
    names = [name for name in figures["shapes"][0]["seconds"] if name != "chosen"]
    rows = []
    for each in figures["shapes"]:
        m, n = each["shape"]
        ratios = [_spread(each["seconds"]["chosen"], each["seconds"][name]) for name in names]
        share = each["useful_flops_per_second"] / figures["product_flops_per_second"]
        rows.append((f"{each['batch']} × {m} × {n}", "+".join(map(str, each["segments"])), *ratios, f"{share:.0%}"))
    lines = _table(("matrices", "Gram segments", *(f"over {name}" for name in names), "of a product's rate"), rows)
    lines += [
        "",
        f"A product does {figures['product_flops_per_second'] / 1e12:.3g} TFLOP/s; {figures['dtype']}, {figures['rounds']} rounds.",
    ]
    if kernels := figures.get("symmetric_kernels"):
        rows = [
            (
                f"{each['shape'][0]} × {each['shape'][1]}",
                each["product"],
                _spread(each["kernel_over_torch"], [1.0] * len(each["kernel_over_torch"])),
                *(f"{error:.1e}" for error in each["errors"]),
            )
            for each in kernels
        ]
        lines += ["", *_table(("matrix", "product", "the Triton kernel over torch's product", "its error", "torch's"), rows)]
    return lines


def _step(figures: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for run in figures["runs"]:
        median = run["median_seconds"]
        peers = [("peer", run["peer"]), *([("AdamW (fused)", "torch's fused AdamW")] if "AdamW (fused)" in median else [])]
        rows = [
            (name, f"{median[name] * 1e3:.2f} ms", *(_spread(run["seconds"][name], run["seconds"][peer]) for peer, _ in peers))
            for name in run["seconds"]
        ]
        lines += _table((f"{run['ranks']} rank(s)", "step", *(f"over {name}" for _, name in peers)), rows)
        parts = ", ".join(f"{name} {value / run['parts']['all']:.0%}" for name, value in run["parts"].items() if name != "all")
        host = statistics.median(run["host_seconds"]) * 1e3
        lines += ["", f"Five steps: the host is done after {host:.2f} ms. Of one step's {run['parts']['all']:.2f} ms: {parts}."]
        lines.append(f"Adaptive steps: {run['steps']:.2f} on average.")
    return lines


def _overhead(figures: dict[str, Any]) -> list[str]:
    rows = [(name, f"{share:.2%}") for name, share in figures["shares"].items()]
    return _table(("part", f"share of a step of {figures['milliseconds']:.1f} ms"), rows)


def _training(figures: dict[str, Any]) -> list[str]:
    rows, runs = [], figures["runs"]
    for run in runs:
        steps, seconds, _ = run["curve"][-1]
        marks = [_loss_at(run["curve"], 1, share * seconds) for share in (0.25, 0.5, 1.0)]
        spent = ("", "") if run["flops"] is None else (f"{run['steps_of_ns']:.2f}", f"{run['flops']:.2f}×")
        times = (str(steps), f"{seconds / steps * 1e3:.1f}")
        rows.append((run["variant"], *spent, *times, *(f"{loss:.3f}" for loss in marks), f"{run['loss']:.4f}"))
    over_time = ("loss at ¼ of the time", "at ½", "at the end", "held-out loss")
    heads = ("", "Newton–Schulz steps", "FLOPs over five", "steps", "ms a step", *over_time)
    common = min(run["curve"][-1][0] for run in runs)
    same = ", ".join(f"{run['variant']} {_loss_at(run['curve'], 0, common):.3f}" for run in runs)
    return [
        *_table(heads, rows),
        "",
        f"{runs[0]['parameters'] / 1e6:.0f} M parameters, {runs[0]['settings']['dtype']}. "
        f"Training loss after {common} steps of each: {same}.",
    ]


def _loss_at(curve: list[list[float]], column: int, until: float) -> float:
    """The mean of the last twentieth of what came before `until`."""
    before = [loss for *at, loss in curve if at[column] <= until] or [curve[0][2]]
    return statistics.mean(before[-max(1, len(before) // 20) :])


def _probes(figures: dict[str, Any]) -> list[str]:
    rows = [
        (
            str(p["size"]),
            p["what"],
            f"{p['ratio']:.3g}" if "ratio" in p else f"failed: {p['failed'].splitlines()[0][:80]}",
            p.get("unit", ""),
        )
        for p in figures["probes"]
    ]
    return _table(("rows", "what", "time", "in units of"), rows)


WRITERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "ns": _ns,
    "step": _step,
    "overhead": _overhead,
    "training": _training,
    "probes": _probes,
}
