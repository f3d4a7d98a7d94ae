"""Train a GPT with MuonDist, under FSDP2, in DeepSpeed or in Megatron: a trainer to start from.

    torchrun --standalone --nproc_per_node 2 launch/train_gpt.py --steps 100 --out runs/a
    deepspeed --num_gpus 2 launch/train_gpt.py --engine deepspeed --deepspeed-config configs/deepspeed/zero2.json --out runs/b
    mpiexec -n 2 python launch/train_gpt.py --engine megatron --tp 2 --out runs/c
    srun --ntasks 8 python launch/train_gpt.py --config my.toml

Everything that a run leaves lies in --out: `log.jsonl` (a line per logged step, evaluation and checkpoint), `spectrum.jsonl` (what
MuonDist measured) and `checkpoints/`. `muon-dist watch OUT` shows a run while it goes, `muon-dist report OUT` makes a page of it.
launch/README.md tells how to start it anywhere, and what happens when a rank fails.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from data import Windows
from dry_run import dry_run
from engines import make_engine
from engines.deepspeed_zero import read_config, with_config
from log import Log, Meter
from options import OF_A_RUN, Options, flag, parse
from torch import Tensor

from muon_dist.run import (
    Checkpoint,
    Ranks,
    Watchdog,
    end_process_group,
    find_ranks,
    latest_checkpoint,
    save_checkpoint,
    start_process_group,
)
from muon_dist.run.checkpoints import claim, require_shared
from muon_dist.version import __version__


def main() -> None:
    options = parse()
    try:
        options = with_config(options) if options.engine == "deepspeed" else options
        ranks = find_ranks()
        if options.dry_run:
            if ranks.rank == 0:
                dry_run(options, ranks)
            return
        log = Log(options, ranks)
        device = start_process_group(ranks, timeout=2 * options.rank_timeout + 60)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"train_gpt.py: {error}") from error
    with Signals() as signals, Watchdog(ranks, timeout=options.rank_timeout, ending=log.failed) as watchdog:
        Trainer(options, ranks, device, watchdog, signals, log).train()
    end_process_group()


class Trainer:
    """One run on this rank: from the beginning or the newest checkpoint, to the last step or a signal. All methods are collective."""

    def __init__(self, options: Options, ranks: Ranks, device: torch.device, watchdog: Watchdog, signals: Signals, log: Log) -> None:
        self.options, self.ranks, self.device, self.watchdog, self.signals, self.log = options, ranks, device, watchdog, signals, log
        self.mark("start")
        agree({flag(name): value for name, value in dataclasses.asdict(options).items()}, "was started with")
        require_shared(options.out)
        self.lock = claim(options.out)
        self.data = Windows.of(options)
        self.sources = sources_of(options, self.data)
        agree(self.sources, "reads")
        self.resumed = find_checkpoint(options, self.sources, log)
        self.engine = make_engine(options, device, self.resumed, working=lambda: self.mark("start"))
        self.engine.stopwatch.starting = lambda: self.mark("optimizer")
        self.batch = self.engine.micro_batch * self.engine.accumulation * self.engine.data_ranks  # windows in a step
        self.step, self.position = 0, 0  # optimizer steps taken, windows read
        if self.resumed is not None:
            self.step, self.position = self.resumed.step, int(self.resumed.about["windows"])
        self.first = self.step
        self.saved_at = None if self.resumed is None else self.step

    def train(self) -> None:
        options, log = self.options, self.log
        log.start(self.engine, self.data, self.device, self.resumed, tokens_per_step=self.batch * options.context)
        meter = Meter(self.device)
        while self.step < options.steps and not self.signals.agreed():
            began = time.perf_counter()
            loss = self.engine.step(self.step, self.training_part)
            self.step, self.position = self.step + 1, self.position + self.batch
            meter.add(loss, time.perf_counter() - began)
            if self.step == self.first + 1:
                log.plan(self.engine)
            if self.is_time(options.log_every):
                log.step(self.step, meter, self.engine, self.position * options.context)
            log.show(self.step)
            if options.eval_every and self.is_time(options.eval_every):
                self.evaluate()
            if options.save_every and self.is_time(options.save_every):
                self.save()
        if self.step < options.steps:
            if self.step != self.saved_at:
                self.save()
            log.end(f"{self.signals.name} came: saved after step {self.step}; the same command goes on from there")
        else:
            log.end("finished")

    def mark(self, phase: str) -> None:
        self.watchdog.mark(phase, getattr(self, "step", 0))

    def is_time(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.options.steps

    def training_part(self, micro: int) -> tuple[Tensor, Tensor]:
        """What this rank takes of a micro batch, whose windows follow each other across ranks."""
        self.mark("data")
        first = self.position + (micro * self.engine.data_ranks + self.engine.data_rank) * self.engine.micro_batch
        part = self.data.training_windows(first, self.engine.micro_batch)
        self.mark("forward and backward")
        return part

    def evaluate(self) -> None:
        began, total, count = time.perf_counter(), torch.zeros((), device=self.device), 0
        share = self.engine.data_ranks * self.engine.micro_batch
        for first in range(0, self.options.eval_batches * self.batch, share):
            self.mark("evaluation")
            part = self.data.evaluation_windows(first + self.engine.data_rank * self.engine.micro_batch, self.engine.micro_batch)
            total, count = total + self.engine.evaluate(*part).float(), count + 1
        dist.all_reduce(total)
        self.log.evaluation(self.step, float(total) / (count * dist.get_world_size()), time.perf_counter() - began)

    def save(self) -> None:
        self.mark("checkpoint")
        began, options = time.perf_counter(), self.options
        versions = {"version": __version__, "torch": torch.__version__}
        about = {"windows": self.position, "world_size": self.ranks.world_size, "options": dataclasses.asdict(options), **versions}
        about["sources"] = self.sources
        syncs = self.ranks.local_rank == 0
        path = save_checkpoint(options.checkpoints, self.step, self.engine.save, about, keep=options.keep, syncs=syncs)
        self.saved_at = self.step
        self.log.checkpoint(self.step, path, time.perf_counter() - began)
        self.mark("checkpoint")


class Signals:
    """SIGTERM and SIGUSR1 ask all ranks to save and end, whichever rank they reach."""

    def __init__(self) -> None:
        self._caught = self._agreed = 0
        self._asked: tuple[Any, torch.Tensor] | None = None  # a reduction under way, and its tensor

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number

    def agreed(self) -> bool:
        """Whether a signal had reached any rank by the last call. Collective, on the host; nothing is waited for."""
        if self._asked is not None:
            work, told = self._asked
            work.wait()
            self._agreed = int(told)
        told = torch.tensor(self._caught)
        self._asked = (dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True), told)
        return self._agreed > 0

    @property
    def name(self) -> str:
        """Of the signal that all ranks agreed on."""
        return signal.Signals(self._agreed).name


def agree(mine: dict[str, Any], what: str) -> None:
    """See that all ranks have the same of everything.

    Raises:
        ValueError: on all of them: what differs, and what it is where.
    """
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    for rank, theirs in enumerate(told):
        for name, value in told[0].items():
            if theirs[name] != value:
                raise ValueError(f"rank {rank} {what} {name} {theirs[name]}, rank 0 {value}: give all the same")


def sources_of(options: Options, data: Windows) -> dict[str, Any]:
    """What files hold that a run depends on: its data, by a fingerprint, and the optimizer of a DeepSpeed config."""
    found: dict[str, Any] = {"data with the fingerprint": data.fingerprint()}
    if options.deepspeed_config is not None:
        found["a DeepSpeed config with the optimizer"] = read_config(options.deepspeed_config)["optimizer"]
    return found


def find_checkpoint(options: Options, sources: dict[str, Any], log: Log) -> Checkpoint | None:
    """The newest whole checkpoint of this run, the same on all ranks.

    Raises:
        ValueError: it is of a run with another model, data, seed or DeepSpeed optimizer; none is whole; --resume is never.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [latest_checkpoint(options.checkpoints)]
    dist.broadcast_object_list(found)
    checkpoint, problems = found[0]
    for problem in problems:
        log.say(f"{problem}; it is passed over")
    if checkpoint is None and problems:
        raise ValueError(f"none of the checkpoints in {options.checkpoints} is whole: remove them to begin anew, or choose another --out")
    if checkpoint is None:
        return None
    if options.resume == "never":
        raise ValueError(f"{options.checkpoints} has {checkpoint.path.name}, and --resume is never: choose another --out, or remove it")
    saved, now = checkpoint.about["options"], dataclasses.asdict(options)
    for name in OF_A_RUN:
        if saved.get(name, now[name]) != now[name]:
            raise ValueError(
                f"{checkpoint.path} is of a run with {flag(name)} {saved[name]}, not {now[name]}: choose another --out, or the same flags"
            )
    for name, value in sources.items():  # DeepSpeed goes on with the optimizer's settings of the checkpoint, whatever the config says now
        if checkpoint.about["sources"].get(name) != value:
            raise ValueError(
                f"{checkpoint.path} is of a run that read {name} {checkpoint.about['sources'].get(name)}, and now it is {value}: choose "
                "another --out, or the same file"
            )
    changed = [name for name in now if saved.get(name) != now[name] and name not in ("out", "dry_run", "resume")]
    for name in changed:
        log.say(f"since the checkpoint {flag(name)} changed from {saved.get(name)} to {now[name]}")
    return checkpoint


if __name__ == "__main__":
    main()
