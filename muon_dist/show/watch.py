"""`muon-dist watch RUN`: a run as it goes, from what it logs: loss, speed, the optimizer's share, error and steps per kind of layer."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from .run_log import RunLog, duration, read_log
from .table import mean_of_known, si, table

BAR = 30  # characters


def run(folder: str, every: float, once: bool) -> int:
    """Show it again and again until it ends; once where the output is no terminal."""
    if every <= 0:
        raise ValueError(f"--every must be a positive number of seconds, got {every}")
    live = sys.stdout.isatty() and not once
    try:
        while True:
            log = read_log(folder)
            text = render(log)
            print(f"\x1b[H\x1b[2J{text}\n\nagain every {every:g} s; Ctrl-C ends this, not the run" if live else text, flush=True)
            if not live or log.end is not None:
                return 0
            time.sleep(every)
    except KeyboardInterrupt:
        return 0


def render(log: RunLog) -> str:
    """The state of a run as text."""
    start, environment = log.starts[-1], log.starts[-1]["environment"]
    options = log.options
    lines = [
        f"{log.name}: {log.state()}",
        f"{start['optimizer']} in {options['engine']}, {si(start['parameters'])} parameters, {environment['world_size']} rank(s) on "
        f"{environment['hosts']} host(s), from {environment['launcher']}"
        + (f", resumed {len(log.starts) - 1} time(s)" if len(log.starts) > 1 else ""),
        "",
    ]
    if not log.steps:
        return "\n".join([*lines, "no step has been logged yet"])
    last = log.steps[-1]
    done = BAR * last["step"] // options["steps"]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    left = (options["steps"] - last["step"]) * last["seconds"]
    lines += [
        f"{'█' * done}{'·' * (BAR - done)} step {last['step']} of {options['steps']}, {duration(left)} left",
        f"loss {loss}{_evaluation(log)}, learning rate {last['lr']:.3g}, gradient norm {_or_none(last['gradient_norm'])}",
        f"{last['tokens_per_second']:,.0f} tokens/s, {last['seconds']:.3g} s a step, of which the optimizer takes "
        f"{last['optimizer_seconds'] / last['seconds']:.0%}; {last['skipped_steps']} step(s) skipped",
        _checkpoint(log),
    ]
    if log.matrices:
        covered, (error, five) = log.mean_coverage(), log.mean_errors()
        average = statistics.mean(r["ns_steps"] for r in log.last_matrices)
        lines += [
            "",
            f"Newton–Schulz: {average:.1f} steps on average, {log.flops_over_five():.2f}× the FLOPs of five Jordan steps",
            f"error {_or_none(error)}, of five Jordan steps {_or_none(five)}; coverage {'–' if covered is None else f'{covered:.2f}'}",
            table(
                ("kind", "matrices", "steps", "deflated", "error", "of five", "coverage", "σ at .5 / ‖M‖_F"),
                _kinds(log),
                right=(1, 2, 3, 4, 5, 6, 7),
            ),
        ]
    else:
        lines.append(f"Newton–Schulz: {options['ns_steps']} steps for all" if options["ns_steps"] not in (None, "adaptive") else "")
    return "\n".join(lines).rstrip()


def _evaluation(log: RunLog) -> str:
    if not log.evaluations:
        return ""
    last = log.evaluations[-1]
    return f" ({_or_none(last['loss'])} on held-out data after step {last['step']})"


def _checkpoint(log: RunLog) -> str:
    if not log.checkpoints:
        return "no checkpoint yet"
    last = log.checkpoints[-1]
    return f"last checkpoint: after step {last['step']}, {si(last['bytes'], 'B')}, {duration(time.time() - last['time'])} ago"


def _kinds(log: RunLog) -> list[tuple[Any, ...]]:
    rows = []
    for kind, records in log.by_kind().items():
        steps = sorted(r["ns_steps"] for r in records)
        deflated = sorted(r["deflation"] for r in records)
        means = (mean_of_known([r[key] for r in records]) for key in ("error", "error_of_five_steps", "coverage"))
        sigmas = [r["sigma_0.5"] for r in records if r["sigma_0.5"] is not None]
        rows.append(
            (
                kind,
                len(records),
                str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]}–{steps[-1]}",
                str(deflated[0]) if deflated[0] == deflated[-1] else f"{deflated[0]}–{deflated[-1]}",
                *("–" if mean is None else f"{mean:.2f}" for mean in means),
                f"{statistics.median(sigmas):.1e}" if sigmas else "–",
            )
        )
    return rows


def _or_none(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
