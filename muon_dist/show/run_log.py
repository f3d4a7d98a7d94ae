"""What a run's folder tells: `log.jsonl`, which the trainer wrote, and the spectra beside it. For `watch` and `report`."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..run.lines import read_lines
from ..telemetry import read_run
from .table import mean_of_known


@dataclass
class RunLog:
    """One run, resumed or not: what a resumed one did again counts once.

    Attributes:
        starts: the first start and every resumption.
        steps, evaluations, checkpoints: by step.
        end: why it ended; None while it runs, and where nobody was left to say so.
        plan: owners and costs; None before the first step.
        matrices: measurements by step and name, as `muon_dist.telemetry.read_run` gives them; empty without adaptive steps.
        changed: when a line was written last, seconds since 1970.
    """

    name: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    matrices: list[dict[str, Any]] = field(default_factory=list)
    changed: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The flags of the last start."""
        return dict(self.starts[-1]["options"])

    @property
    def last_matrices(self) -> list[dict[str, Any]]:
        """The last measurement of every matrix."""
        return list({record["name"]: record for record in self.matrices}.values())

    def by_kind(self) -> dict[str, list[dict[str, Any]]]:
        """The last measurements by kind of layer."""
        kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.last_matrices:
            kinds[record["kind"] or "other"].append(record)
        return dict(sorted(kinds.items()))

    def optimizer_share(self, last: int = 10) -> float:
        """Of a step's time, over the last logged steps; the very first one binds and is left out where there are others."""
        steps = (self.steps[1:] or self.steps)[-last:]
        total = sum(step["seconds"] * step["steps"] for step in steps)
        return sum(step["optimizer_seconds"] * step["steps"] for step in steps) / total if total else 0.0

    def flops_over_five(self) -> float | None:
        """Newton–Schulz FLOPs of the matrices measured, over those of five steps each; None where nothing was measured."""
        last = self.last_matrices
        return sum(r["flops"] for r in last) / sum(r["flops_of_five_steps"] for r in last) if last else None

    def mean_coverage(self) -> float | None:
        """The mean of what the last measurements say is covered."""
        return mean_of_known([r["coverage"] for r in self.last_matrices])

    def mean_errors(self) -> tuple[float | None, float | None]:
        """The means of what the last measurements say of the error, and of that of five Jordan steps."""
        last = self.last_matrices
        return mean_of_known([r["error"] for r in last]), mean_of_known([r["error_of_five_steps"] for r in last])

    def state(self) -> str:
        """Running, ended and why, or silent for how long."""
        if self.end is not None:
            return ("failed: " if self.end.get("failed") else "") + str(self.end["reason"])
        silence = time.time() - self.changed
        usual = max((step["seconds"] * step["steps"] for step in self.steps[-10:]), default=60.0)
        return "running" if silence < max(60.0, 5 * usual) else f"silent for {duration(silence)}: it may have been killed"


def read_log(folder: str) -> RunLog:
    """Read a run's folder.

    Raises:
        ValueError: there is no log, or one that can't be read.
    """
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no log.jsonl: name the --out folder of a run of launch/train_gpt.py")
    run = RunLog(name=Path(folder).name or folder, changed=path.stat().st_mtime)
    lists = {"step": run.steps, "evaluation": run.evaluations, "checkpoint": run.checkpoints}
    for record in read_lines(path):
        kind = record.get("type")
        if kind == "start":
            for each in lists.values():  # what came after the checkpoint is done again
                each[:] = [r for r in each if r["step"] <= record["step"]]
            run.starts.append(record)
            run.end = None
        elif kind == "plan":
            run.plan = record
        elif kind == "end":
            run.end = record
        elif kind in lists:
            lists[kind].append(record)
    if not run.starts:
        raise ValueError(f"{path} has no start: the run has not begun yet")
    try:
        reached = max((step["step"] for step in run.steps), default=0)
        run.matrices = [r for r in read_run(folder) if r["step"] <= reached + run.options["log_every"]]
    except ValueError as error:
        if "has no measurements" not in str(error):
            raise
    return run


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
