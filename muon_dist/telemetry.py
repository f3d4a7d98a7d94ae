"""What a run reports of its matrices: a line of JSON per measurement or update, and TensorBoard or Weights & Biases where asked.

Every rank of a domain knows what was measured, so its first rank writes and nothing is gathered. One file per domain:
`spectrum.jsonl` for the one that has global rank 0, `spectrum.rank<N>.jsonl` for others (pipeline stages, expert groups).
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .adaptation import Adaptation
from .domain import Domain
from .run.lines import append_lines, read_lines
from .spectrum.moments import QUANTILES
from .spectrum.policy import FIVE
from .spectrum.scaling_law import layer_kind
from .version import __version__

SENT = (  # to sinks, besides quantiles
    *("ns_steps", "deflation", "error", "error_of_five_steps", "coverage", "flops"),
    *("update_rms", "weight_rms", "update_to_weight", "skipped_steps", "skipped_updates"),
)
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # sink -> the package it needs


class Telemetry:
    """Writes measurements to a directory.

    Args:
        directory: made where it doesn't exist. None: no JSON lines.
        sinks: besides JSON lines, any of "tensorboard" and "wandb".
        send: is called with the step and the values of every measurement, by name, for a host that has sinks of its own.

    Raises:
        ValueError: a directory that can't be written, an unknown sink, or one whose package is missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        sinks: Sequence[str] = (),
        send: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is None and sinks:
            raise ValueError(f"telemetry_sinks={list(sinks)} needs a telemetry_dir as well")
        if self.directory is not None:
            self._check_writable(self.directory)
        self._sinks = Sinks("" if self.directory is None else self.directory, sinks)
        self.send = send
        self._begun: set[int] = set()
        self._failed = False

    @staticmethod
    def _check_writable(directory: Path) -> None:
        existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(
                f"telemetry_dir {str(directory)!r} can't be written: {existing} is not a directory that this process may write to"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "send": None}

    def write(self, domain: Domain, adaptation: Adaptation, decided: Iterable[int], params: int) -> None:
        """Report the matrices that were decided anew; only the domain's first rank does something.

        Args:
            params: elements of all parameters of this optimizer, for scaling laws.
        """
        if domain.me == 0 and not self._failed:
            self._write(domain, [{**line, "params": params} for line in _lines(domain, adaptation, set(decided))], params)

    def report(self, domain: Domain, lines: Sequence[dict[str, Any]], params: int) -> None:
        """Report lines that have a "type", a "step" and for what is of one matrix a "name"; only the domain's first rank does something."""
        if domain.me == 0 and not self._failed:
            self._write(domain, lines, params)

    def _write(self, domain: Domain, lines: Sequence[dict[str, Any]], params: int) -> None:
        try:
            if self.directory is not None:
                self._append(self.directory, domain, lines, params)
            for line in lines:
                self._send(line)
        except Exception as error:  # a full disk, a folder that is gone, a service: other ranks would wait for one that ends here
            self._failed = True
            warnings.warn(f"telemetry could not be written, and is not written any more; training goes on: {error!r}", stacklevel=2)

    def _append(self, directory: Path, domain: Domain, lines: Sequence[dict[str, Any]], params: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        about: list[dict[str, Any]] = []
        if domain.ranks[0] not in self._begun:
            self._begun.add(domain.ranks[0])
            sizes = {"params": params, "matrices": len(domain.matrices), "ranks": len(domain.ranks)}
            about.append({"type": "run", "version": __version__, **sizes})
        append_lines(directory / ("spectrum.jsonl" if domain.ranks[0] == 0 else f"spectrum.rank{domain.ranks[0]}.jsonl"), [*about, *lines])

    def _send(self, line: dict[str, Any]) -> None:
        values = {key: v for key, v in line.items() if key.startswith("sigma") or key in SENT}
        of = f"muon_dist/{line['name']}/" if "name" in line else "muon_dist/"
        values = {f"{of}{key}": v for key, v in values.items() if v is not None}
        if self.send is not None:
            self.send(line["step"], values)
        self._sinks.log(line["step"], values, "muon_dist/step")


class Sinks:
    """TensorBoard and Weights & Biases, as far as they are asked for.

    Args:
        directory: where they keep their files.
        names: any of "tensorboard" and "wandb".

    Raises:
        ValueError: an unknown sink, or one whose package is missing.
    """

    def __init__(self, directory: str | os.PathLike[str], names: Sequence[str]) -> None:
        if isinstance(names, str) or not set(names) <= set(PACKAGES):
            raise ValueError(f"telemetry_sinks is a list of {' and '.join(map(repr, PACKAGES))}, got {names!r}")
        for name in names:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise ValueError(f"telemetry_sinks={list(names)} needs the package {PACKAGES[name]}, which is not installed")
        self.names = tuple(names)
        self._directory = str(directory)
        self._writer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}  # a copied optimizer opens its own

    def log(self, step: int, values: Mapping[str, float], step_name: str) -> None:
        """Values by name at a step; W&B counts steps by itself and gets this one under `step_name`."""
        if "tensorboard" in self.names:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._directory)
            for key, v in values.items():
                self._writer.add_scalar(key, v, step)
            self._writer.flush()
        if "wandb" in self.names:
            import wandb

            (wandb.run or wandb.init(dir=self._directory)).log({**values, step_name: step})


def _lines(domain: Domain, adaptation: Adaptation, decided: set[int]) -> Iterator[dict[str, Any]]:
    i = -1
    for b in domain.parameters:
        for part, matrix in enumerate(b.matrices):
            i += 1
            if i not in decided:
                continue
            decision, work = adaptation.decision_of(i), adaptation.work_of(i)
            schedule = adaptation.schedules[i]
            numbers = {
                "error": decision.error,
                "error_of_five_steps": decision.error_of_five,
                "coverage": decision.coverage,
                "below_floor": decision.below,
                **{f"sigma_{q:g}": sigma for q, sigma in zip(QUANTILES, decision.quantiles, strict=True)},
            }
            yield {
                "type": "matrix",
                "step": adaptation.taken(i),
                "name": domain.plan.matrices[i].name,
                "kind": layer_kind(b.name, part, len(b.matrices)),
                "depth": b.depth,
                "shape": [matrix.rows, matrix.cols],
                "rank": work.rank,
                "ns_steps": len(schedule),
                "deflation": schedule.deflation,
                "measurements": decision.measurements,
                **{key: None if math.isnan(value) else value for key, value in numbers.items()},
                "flops": work.flops(schedule),
                "flops_of_five_steps": work.flops(FIVE),
            }


def known_at(records: Sequence[dict[str, Any]], steps: Sequence[float]) -> list[list[dict[str, Any]]]:
    """For every step the last measurement of each matrix by then, so that curves are of the same matrices all along."""
    found: list[list[dict[str, Any]]] = []
    known: dict[str, dict[str, Any]] = {}
    rest = sorted(records, key=lambda r: r["step"])
    for step in steps:
        while rest and rest[0]["step"] <= step:
            record = rest.pop(0)
            known[record["name"]] = record
        found.append(list(known.values()))
    return found


def read_updates(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The last report of every matrix's update in a run's directory, by name; none where there is none."""
    found: dict[str, dict[str, Any]] = {}
    for path in _files(directory):
        for record in read_lines(path):
            if record.get("type") == "update" and record["step"] >= found.get(record["name"], record)["step"]:
                found[record["name"]] = record
    return found


def _files(directory: str | os.PathLike[str]) -> list[Path]:
    root = Path(directory)
    return [root] if root.is_file() else sorted(root.glob("spectrum*.jsonl"))


def read_run(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The measurements in a run's directory, by step and name; where a resumed run repeats one, the last counts.

    Raises:
        ValueError: no telemetry there, or a line that is not JSON.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for path in _files(directory):
        for record in read_lines(path):
            if record.get("type") == "matrix":
                found[(record["step"], record["name"])] = record
    if not found:
        raise ValueError(
            f"{directory} has no measurements: train with MuonDist(ns_steps='adaptive', telemetry_dir={str(directory)!r}) first"
        )
    return [found[key] for key in sorted(found)]
