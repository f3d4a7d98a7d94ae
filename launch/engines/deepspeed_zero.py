"""DeepSpeed: the config says everything but the model and the data."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from options import Options
from torch import Tensor

from muon_dist.run import Checkpoint

from . import Engine, Read, Stopwatch, make_gpt, qkv_rows

TAG = "state"  # the folder inside a checkpoint that DeepSpeed writes
OPTIMIZERS = {"MuonDist": "muon_dist", "AdamW": "adamw"}  # as a config and as --optimizer names them
UNIVERSAL = "universal"  # the same for another number of ranks, made when it is needed


def read_config(path: str) -> dict[str, Any]:
    """A DeepSpeed config with MuonDist or AdamW as its optimizer.

    Raises:
        ValueError: it can't be read, or has another optimizer.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed-config {path} can't be read: {error}") from error
    kind = config.get("optimizer", {}).get("type") if isinstance(config, dict) else None
    if kind not in OPTIMIZERS:
        raise ValueError(f'--deepspeed-config {path}: its "optimizer" must be of type "MuonDist" or "AdamW", not {kind!r}')
    config["optimizer"].setdefault("params", {})
    return dict(config)


class DeepSpeed(Engine):
    """The GPT in a DeepSpeed engine."""

    def __init__(self, options: Options, device: torch.device, checkpoint: Checkpoint | None, working: Callable[[], None]) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        import muon_dist.integrations.deepspeed  # noqa: F401  # makes "MuonDist" known

        if device.type == "cpu":  # an all-reduce through shared memory, which would be compiled for minutes at first use
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert options.deepspeed_config is not None
        config = read_config(options.deepspeed_config)
        params = config["optimizer"]["params"]
        self.name = options.optimizer
        if self.name == "muon_dist":
            params.setdefault("split", qkv_rows(options))
            params.setdefault("telemetry_dir", options.out)
            params.setdefault("telemetry_sinks", options.sinks)
        elif device.type == "cpu":
            params.setdefault("torch_adam", True)  # DeepSpeed's own would be compiled
        self._universal = checkpoint is not None and checkpoint.about["world_size"] != dist.get_world_size()
        if self._universal:
            assert checkpoint is not None
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
            _convert(checkpoint, config, working)
        model = make_gpt(options)
        self.parameters = sum(p.numel() for p in model.parameters())
        self._engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
        self.optimizer = self._engine.basic_optimizer
        self._device = device
        group = self._engine.data_parallel_group
        self.data_rank, self.data_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.micro_batch = self._engine.train_micro_batch_size_per_gpu()
        self.accumulation = self._engine.gradient_accumulation_steps()
        self.stopwatch = Stopwatch(device)

    def step(self, number: int, read: Read) -> Tensor:
        total = torch.zeros((), device=self._device)
        for micro in range(self.accumulation):
            tokens, targets = (t.to(self._device) for t in read(micro))
            loss = self._engine(tokens, targets)
            self._engine.backward(loss)
            self.stopwatch.start()
            self._engine.step()
            self.stopwatch.stop()
            total += loss.detach().float() / self.accumulation
        return total

    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self._engine.eval()
        try:
            with torch.no_grad():
                loss: Tensor = self._engine(tokens.to(self._device), targets.to(self._device)).float()
        finally:
            self._engine.train()
        return loss

    def learning_rate(self) -> float:
        rates = self._engine.get_lr()
        groups = self._engine.optimizer.param_groups
        return float(next((rate for rate, group in zip(rates, groups, strict=False) if group.get("algorithm") == "muon"), rates[0]))

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, checkpoint: Checkpoint) -> None:
        found, _ = self._engine.load_checkpoint(str(checkpoint.path), tag=UNIVERSAL if self._universal else TAG)
        if found is None:
            raise ValueError(f"DeepSpeed finds no checkpoint in {checkpoint.path}")


def _convert(checkpoint: Checkpoint, config: dict[str, Any], working: Callable[[], None]) -> None:
    """Make DeepSpeed's universal form of a checkpoint, which any number of ranks can load, beside it. Rank 0 does; all learn of it."""
    told = [""]
    if dist.get_rank() == 0 and not (checkpoint.path / UNIVERSAL).exists():
        partial = checkpoint.path / f".{UNIVERSAL}-{os.getpid()}"
        command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
        command += ["--num_merge_workers", "1", "--input_folder", str(checkpoint.path / TAG), "--output_folder", str(partial)]
        if config.get("zero_optimization", {}).get("stage", 0) < 3:
            command.append("--inject_missing_state")
        with tempfile.TemporaryFile("w+") as output:
            converter = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
            while converter.poll() is None:
                working()  # the other ranks wait for this one
                time.sleep(0.2)
            output.seek(0)
            problem = output.read().strip()[-2000:]
        if converter.returncode == 0:
            partial.rename(checkpoint.path / UNIVERSAL)
        else:
            told = [f"DeepSpeed could not convert {checkpoint.path} for another number of ranks: {problem}"]
    dist.broadcast_object_list(told)
    if told[0]:
        raise ValueError(told[0])


def with_config(options: Options) -> Options:
    """Options with the optimizer that the DeepSpeed config names."""
    assert options.deepspeed_config is not None
    kind = read_config(options.deepspeed_config)["optimizer"]["type"]
    return dataclasses.replace(options, optimizer=OPTIMIZERS[kind])
