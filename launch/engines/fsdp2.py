"""torch's FSDP2: parameters, gradients and optimizer state in shards, in one process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from options import Options, micro_batches
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from muon_dist import MuonDist, build_param_groups
from muon_dist.run import Checkpoint

from . import Engine, Read, Stopwatch, make_gpt, muon_settings, qkv_rows


class FSDP2(Engine):
    """The GPT under `fully_shard`, block by block."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self._options, self._device = options, device
        self.data_rank, self.data_ranks = dist.get_rank(), dist.get_world_size()
        assert options.batch is not None and options.lr is not None and options.weight_decay is not None
        self.micro_batch, self.accumulation = micro_batches(options.batch, options.micro_batch, self.data_ranks)
        self.model = make_gpt(options).to(device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        mesh = init_device_mesh(device.type, (self.data_ranks,))
        policy = MixedPrecisionPolicy()
        if options.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.name = options.optimizer
        self.optimizer: torch.optim.Optimizer
        if self.name == "muon_dist":
            groups = build_param_groups(self.model, split=qkv_rows(options))
            rates: dict[str, Any] = {"lr": options.lr, "adam_lr": options.adam_lr, "weight_decay": options.weight_decay}
            self.optimizer = MuonDist(groups, **rates, **muon_settings(options))
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._norm: Tensor | None = None
        self.stopwatch = Stopwatch(device)

    def step(self, number: int, read: Read) -> Tensor:
        total = torch.zeros((), device=self._device)
        for micro in range(self.accumulation):
            self.model.set_requires_gradient_sync(micro + 1 == self.accumulation)  # type: ignore[operator]  # fully_shard added it
            tokens, targets = (t.to(self._device) for t in read(micro))
            loss = self.model(tokens, targets) / self.accumulation
            loss.backward()
            total += loss.detach()
        assert self._options.clip is not None
        self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip or float("inf"))
        factor = self._options.learning_rate_factor(number)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.stopwatch.start()
        self.optimizer.step()
        self.stopwatch.stop()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens.to(self._device), targets.to(self._device))
        return loss

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def gradient_norm(self) -> float | None:
        if self._norm is None:
            return None
        return float(self._norm.full_tensor() if isinstance(self._norm, DTensor) else self._norm)

    def save(self, folder: Path) -> None:
        state_dict_saver.save(self._state(), checkpoint_id=folder)

    def load(self, checkpoint: Checkpoint) -> None:
        given = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=checkpoint.path)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, given, strict=True):
            group.update(settings)  # the flags of now, not those of the checkpoint

    def _state(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
