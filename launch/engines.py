"""What train_gpt.py trains with: the same model and data under torch's FSDP2 or in a DeepSpeed engine."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist import MuonDist, build_param_groups
from muon_dist.bench.small_gpt import GPT


@dataclass
class Engine:
    """One optimizer at work.

    Attributes:
        take_step: one optimizer step on this rank's (tokens, targets): the loss, and the seconds that updating the weights took.
        optimizer: whose state is counted; MuonDist's tells how many steps it skipped.
        lr: the peak learning rate, for the report.
        shard, shards: which part of the data this rank reads, of how many.
        batch: windows per rank and step.
    """

    take_step: Callable[[Tensor, Tensor], tuple[Tensor, float]]
    optimizer: torch.optim.Optimizer
    lr: float
    shard: int
    shards: int
    batch: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def telemetry_folder(options: argparse.Namespace) -> Path:
    return Path(options.out) / "telemetry"


def muon_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What this script asks of MuonDist. Both periods are far below their defaults, for runs this short."""
    return {"burn_in": 10, "measure_every": 20, "telemetry_dir": str(telemetry_folder(options))}


def qkv_rows(options: argparse.Namespace) -> dict[str, list[int]]:
    return {"attn.qkv.weight": [options.width] * 3}


def with_fsdp2(name: str, model: GPT, device: torch.device, options: argparse.Namespace) -> Engine:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer: torch.optim.Optimizer
    if name == "MuonDist":
        lr = 4e-3 if options.lr is None else options.lr
        groups = build_param_groups(model, split=qkv_rows(options))
        optimizer = MuonDist(groups, lr=lr, weight_decay=0.1, **muon_settings(options))
    else:
        lr = options.adamw_lr
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, options.steps))

    def take_step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        synchronize(device)
        started = time.perf_counter()
        optimizer.step()
        synchronize(device)
        seconds = time.perf_counter() - started
        schedule.step()
        optimizer.zero_grad()
        return loss, seconds

    return Engine(take_step, optimizer, lr, dist.get_rank(), dist.get_world_size(), options.batch)


def warm_up_and_decay(step: int, steps: int) -> float:
    """Up over the first tenth, down to a tenth over the last half, linearly."""
    return min((step + 1) / max(1, steps // 10), 1.0, 0.1 + 1.8 * (steps - step) / steps)


def with_deepspeed(name: str, model: GPT, device: torch.device, options: argparse.Namespace) -> Engine:
    """The config says everything: batch, schedule, clipping, and the optimizer. AdamW takes MuonDist's place in the second run."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import muon_dist.integrations.deepspeed  # noqa: F401  # makes "MuonDist" known

    if device.type == "cpu":  # an all-reduce through shared memory, which would be compiled for minutes at first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = read_config(options.deepspeed_config)
    if name == "MuonDist":
        params = config["optimizer"]["params"]
        if options.lr is not None:
            params["lr"] = options.lr
        for key, value in {"split": qkv_rows(options), **muon_settings(options)}.items():
            params.setdefault(key, value)
    else:
        params = {"lr": options.adamw_lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]

    def take_step(tokens: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        total, inside = torch.zeros((), device=device), 0.0
        micro_batches = engine.gradient_accumulation_steps()
        for t, wanted in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            loss = engine(t, wanted)
            engine.backward(loss)
            synchronize(device)
            started = time.perf_counter()
            engine.step()
            synchronize(device)
            inside += time.perf_counter() - started
            total += loss.detach().float() / micro_batches
        return total, inside

    group = engine.data_parallel_group
    batch = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()
    return Engine(take_step, engine.basic_optimizer, params.get("lr", 1e-3), dist.get_rank(group), dist.get_world_size(group), batch)


def read_config(path: str) -> dict[str, Any]:
    """A DeepSpeed config whose optimizer is MuonDist; SystemExit with the reason otherwise."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"--deepspeed_config {path} can't be read: {error}") from error
    if config.get("optimizer", {}).get("type") != "MuonDist":
        raise SystemExit(f'--deepspeed_config {path}: its "optimizer" must be of type "MuonDist"')
    config["optimizer"].setdefault("params", {})
    return dict(config)
