"""What train_gpt.py trains with: one small interface, and a file for each engine behind it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import Options
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dist.example.small_gpt import GPT
from muon_dist.run import Checkpoint

Read = Callable[[int], tuple[Tensor, Tensor]]  # number of a micro batch in its step -> tokens and targets, (windows, context) int64


class Engine(ABC):
    """A model and its optimizer at work on this rank. All methods are collective.

    Attributes:
        optimizer: has the state; MuonDist's, of any integration, has `schedules` and `plans` as well.
        name: of the optimizer: "muon_dist" or "adamw".
        data_rank, data_ranks: which part of every batch this rank reads, of how many.
        micro_batch, accumulation: windows that this rank takes at a time, and how often in one step.
        parameters: elements of the whole model.
        stopwatch: the time that the optimizer took.
    """

    optimizer: Any
    name: str
    data_rank: int
    data_ranks: int
    micro_batch: int
    accumulation: int
    parameters: int
    stopwatch: Stopwatch

    @abstractmethod
    def step(self, number: int, read: Read) -> Tensor:
        """Optimizer step `number`, from 0; the mean loss of this rank's windows, on the device."""

    @abstractmethod
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of this rank's windows, without gradients."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of model, optimizer and schedule."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Take over what was saved, maybe by another number of ranks."""

    @abstractmethod
    def learning_rate(self) -> float:
        """Of Muon's matrices, at the last step."""

    @abstractmethod
    def gradient_norm(self) -> float | None:
        """Of the whole model at the last step, before clipping; None where nobody computes it."""

    def skipped_steps(self) -> int:
        """Left out since this process began, because a gradient was not finite."""
        return int(getattr(self.optimizer, "skipped_steps", 0))

    def skipped_updates(self) -> int:
        """Of single matrices, left out since this process began because they could not be right."""
        return int(getattr(self.optimizer, "skipped_updates", 0))

    def state_bytes(self) -> int:
        """Of the optimizer's state on this rank."""
        held = (v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))
        return sum(t.numel() * t.element_size() for t in (v.to_local() if isinstance(v, DTensor) else v for v in held))


class Stopwatch:
    """Sums up the time between `start` and `stop`, on a GPU without making anybody wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.starting: Callable[[], None] = lambda: None  # is called before the optimizer begins
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._now: Any = None

    def start(self) -> None:
        self.starting()
        self._now = self._moment()

    def stop(self) -> None:
        self._spans.append((self._now, self._moment()))

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """The sum since the last call. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
            total = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        else:
            total = sum(end - begin for begin, end in self._spans)
        self._spans = []
        return float(total)


def make_engine(options: Options, device: torch.device, checkpoint: Checkpoint | None, working: Callable[[], None]) -> Engine:
    """The engine that the options name, with the checkpoint loaded. `working` is called once in a while where that takes long."""
    engine: Engine
    if options.engine == "torch":
        from .fsdp2 import FSDP2

        engine = FSDP2(options, device)
    elif options.engine == "deepspeed":
        from .deepspeed_zero import DeepSpeed

        engine = DeepSpeed(options, device, checkpoint, working)
    else:
        from .megatron_core import Megatron

        engine = Megatron(options, device)
    if checkpoint is not None:
        engine.load(checkpoint)
    return engine


def make_gpt(options: Options) -> GPT:
    """The model of the torch and DeepSpeed engines, the same on all ranks."""
    torch.manual_seed(options.seed)
    return GPT(layers=options.layers, width=options.width, heads=options.heads, context=options.context, vocabulary=options.vocabulary)


def muon_settings(options: Options) -> dict[str, Any]:
    """What MuonDist is asked for, beside learning rates and decay."""
    reports = {"telemetry_dir": options.out, "telemetry_sinks": options.sinks}
    if not options.adaptive:
        return {"ns_steps": options.ns_steps, "deflation": options.deflation, "rule": options.rule, **reports}
    return {
        "ns_steps": "adaptive",
        "accuracy": options.accuracy,
        "coverage": options.coverage,
        "burn_in": options.burn_in,
        "measure_every": options.measure_every,
        "deflation": options.deflation,
        "rule": options.rule,
        **reports,
    }


def qkv_rows(options: Options) -> dict[str, list[int]]:
    return {"attn.qkv.weight": [options.width] * 3}
