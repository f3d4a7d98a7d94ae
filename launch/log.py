"""What a run tells: lines of JSON for `muon-dist watch` and `report`, plain lines or a progress bar for people, and other sinks.

Rank 0 writes. A record has a "type": start, plan, step, evaluation, checkpoint, end; a run that was resumed has several starts.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import Windows
from engines import Engine
from options import Options
from torch import Tensor

from muon_dist.run import Checkpoint, Ranks
from muon_dist.run.lines import append_lines
from muon_dist.sharding.tasks import SLICED
from muon_dist.telemetry import Sinks
from muon_dist.version import __version__, installed_versions

BAR = 24  # characters


class Meter:
    """What happened since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self._loss, self._steps, self._seconds = torch.zeros((), device=device), 0, 0.0

    def add(self, loss: Tensor, seconds: float) -> None:
        self._loss += loss
        self._steps += 1
        self._seconds += seconds

    def read(self) -> tuple[float, int, float]:
        """The mean loss over steps and ranks, the number of steps, and their seconds. Collective; waits for the device."""
        began = time.perf_counter()
        total = self._loss.clone()
        dist.all_reduce(total)
        result = float(total) / self._steps / dist.get_world_size()
        steps, seconds = self._steps, self._seconds + time.perf_counter() - began
        self._loss.zero_()
        self._steps, self._seconds = 0, 0.0
        return result, steps, seconds


class Log:
    """The log of a run. `start` and `step` are collective; the other methods do something on rank 0 only."""

    def __init__(self, options: Options, ranks: Ranks) -> None:
        self._options, self._ranks = options, ranks
        self._path = Path(options.out) / "log.jsonl"
        self._first = ranks.rank == 0
        self._terminal = self._first and sys.stdout.isatty()
        self._sinks = Sinks(options.out, options.sinks)  # all ranks check
        self._tokens_per_step = 0
        self._begun = False  # until then the lines are those of another run
        self._last = ""

    def say(self, text: str) -> None:
        """A line for people."""
        if self._first:
            print(text if not self._last else f"\n{text}", flush=True)
            self._last = ""

    def _write(self, kind: str, record: dict[str, Any], values: dict[str, float | None] | None = None) -> None:
        if self._first:
            append_lines(self._path, [{"type": kind, "time": round(time.time(), 3), **record}])
            if values:
                self._sinks.log(record["step"], {f"train/{name}": v for name, v in values.items() if v is not None}, "train/step")

    def start(self, engine: Engine, data: Windows, device: torch.device, resumed: Checkpoint | None, *, tokens_per_step: int) -> None:
        """Say what runs where. Collective: it asks every rank for its host."""
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        self._tokens_per_step, self._begun = tokens_per_step, True
        if not self._first:
            return
        step = 0 if resumed is None else resumed.step
        if resumed is None:  # nothing of an earlier run goes on here
            for left in (self._path, *self._path.parent.glob("spectrum*.jsonl")):
                left.unlink(missing_ok=True)
        self._write(
            "start",
            {
                "step": step,
                "options": dataclasses.asdict(self._options),
                "optimizer": engine.name,
                "parameters": engine.parameters,
                "tokens_per_step": tokens_per_step,
                "data": {"tokens": len(data.tokens), "windows": data.training, "held_out": data.held_out},
                "environment": _environment(self._ranks, device, len(set(hosts))),
            },
        )
        ways = {
            "torch": "FSDP2",
            "deepspeed": f"DeepSpeed, {self._options.deepspeed_config}",
            "megatron": f"Megatron, TP {self._options.tp}",
        }
        self.say(f"{self._ranks.world_size} ranks on {device.type}, {len(set(hosts))} host(s), from {self._ranks.source}")
        self.say(
            f"{engine.name}, {ways[self._options.engine]}: {engine.parameters / 1e6:.1f} M parameters, {tokens_per_step:,} tokens a step "
            f"({engine.data_ranks} × {engine.micro_batch} windows of {self._options.context}, {engine.accumulation} time(s)); "
            f"{data.training * self._options.context / 1e6:.1f} M tokens of data"
        )
        if resumed is not None:
            moved = "" if resumed.about["world_size"] == self._ranks.world_size else f", saved by {resumed.about['world_size']} ranks"
            self.say(f"going on from {resumed.path}{moved}")

    def plan(self, engine: Engine) -> None:
        """Who orthogonalises what, as rank 0 knows it once the optimizer has met the others."""
        domains = []
        for ranks, plan in getattr(engine.optimizer, "plans", []):
            matrices = [
                {"name": task.name, "shape": list(task.shape), "owner": None if owner == SLICED else ranks[owner], "flops": task.flops}
                for task, owner in zip(plan.matrices, plan.owners, strict=True)
            ]
            loads = [{"rank": rank, **dataclasses.asdict(load)} for rank, load in zip(ranks, plan.loads(), strict=True)]
            domains.append({"matrices": matrices, "ranks": loads, "buckets": len(plan.buckets), "imbalance": plan.imbalance()})
        self._write("plan", {"domains": domains, "state_bytes": engine.state_bytes()})

    def step(self, step: int, meter: Meter, engine: Engine, tokens: int) -> None:
        """A line about the steps since the last one. Collective."""
        loss, steps, seconds = meter.read()
        inside, norm, skipped = engine.stopwatch.seconds(), engine.gradient_norm(), engine.skipped_steps()
        left_out = engine.skipped_updates()
        values = {
            "loss": _finite(loss),
            "lr": engine.learning_rate(),
            "gradient_norm": None if norm is None else _finite(norm),
            "seconds": seconds / steps,  # of one step
            "optimizer_seconds": inside / steps,
            "tokens_per_second": self._tokens_per_step * steps / seconds,
            "skipped_steps": skipped,
            "skipped_updates": left_out,
        }
        self._write("step", {"step": step, "steps": steps, "tokens": tokens, **values}, values)
        skips = (f"  {skipped} skipped" if skipped else "") + (f"  {left_out} updates left out" if left_out else "")
        left = (self._options.steps - step) * seconds / steps
        self._last = (
            f"loss {loss:.3f}  lr {values['lr']:.2g}  {values['tokens_per_second']:,.0f} tokens/s  optimizer {inside / seconds:.0%}{skips}"
            f"  {_clock(left)} left"
        )
        if self._first and not self._terminal:
            print(f"step {step:{len(str(self._options.steps))}}/{self._options.steps}  {self._last}", flush=True)
            self._last = ""

    def show(self, step: int) -> None:
        """The progress bar of a terminal."""
        if self._terminal:
            done = BAR * step // self._options.steps
            bar = "█" * done + "·" * (BAR - done)
            print(f"\r\x1b[2K{bar} {step}/{self._options.steps}  {self._last}", end="", flush=True)

    def evaluation(self, step: int, loss: float, seconds: float) -> None:
        self._write("evaluation", {"step": step, "loss": _finite(loss), "seconds": seconds}, {"evaluation_loss": loss})
        self.say(f"evaluation after step {step}: loss {loss:.4f}")

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        if self._first:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            self._write("checkpoint", {"step": step, "path": str(path), "bytes": size, "seconds": seconds})
            self.say(f"saved {path}: {size / 1e6:.1f} MB in {seconds:.1f} s")

    def end(self, reason: str) -> None:
        """Why the run ended."""
        self._write("end", {"reason": reason})
        self.say(reason if reason != "finished" else f"finished; muon-dist report {self._options.out} makes a page of it")

    def failed(self, reason: str) -> None:
        """Which rank ended the run, as the watchdog has just said; nothing before it has begun."""
        if self._begun:
            self._write("end", {"reason": reason, "failed": True})


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _environment(ranks: Ranks, device: torch.device, hosts: int) -> dict[str, Any]:
    others = installed_versions(("torch", "numpy", "deepspeed", "megatron-core"))
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "launcher": ranks.launcher,
        "world_size": ranks.world_size,
        "hosts": hosts,
        "device": f"{device.type}: {kind}",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "packages": {"muon_dist": __version__, "python": platform.python_version(), **others},
    }
