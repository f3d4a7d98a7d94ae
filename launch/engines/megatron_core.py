"""megatron-core: its GPT, its DistributedDataParallel and optimizer wrappers, tensor parallelism, torch_dist checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from options import Options, micro_batches
from torch import Tensor

from muon_dist.example import megatron_host
from muon_dist.run import Checkpoint

from . import Engine, Read, Stopwatch, muon_settings


class Megatron(Engine):
    """A GPT of megatron-core, sized like the one of the other engines."""

    def __init__(self, options: Options, device: torch.device) -> None:
        from megatron.core import parallel_state

        self._options, self._device = options, device
        assert options.batch is not None and options.lr is not None and options.weight_decay is not None and options.clip is not None
        world = torch.distributed.get_world_size()
        if world % options.tp:
            raise ValueError(f"--tp {options.tp} does not divide the {world} ranks")
        self.micro_batch, self.accumulation = micro_batches(options.batch, options.micro_batch, world // options.tp)
        self._setup = megatron_host.Setup(
            tp=options.tp,
            dtype=options.precision or "fp32",
            distributed_optimizer=options.distributed_optimizer,
            layers=options.layers,
            hidden=options.width,
            heads=options.heads,
            groups=options.heads,
            ffn=4 * options.width,
            gated=False,
            micro_batches=self.accumulation,
            batch=self.micro_batch,
            context=options.context,
            vocabulary=options.vocabulary,
            clip=options.clip,
            seed=options.seed,
        )
        megatron_host.initialize(self._setup)
        self._chunks = megatron_host.make_model(self._setup)
        self.data_rank, self.data_ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        cut = parallel_state.get_tensor_model_parallel_world_size()
        self.parameters = sum(p.numel() * (cut if getattr(p, "tensor_model_parallel", False) else 1) for p in self._chunks[0].parameters())
        self.name = options.optimizer
        self.optimizer = self._make_optimizer()
        self._peak = options.lr if options.adam_lr is None else options.adam_lr
        self._norm: float | None = None
        self.stopwatch = Stopwatch(device)

    def _make_optimizer(self) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from muon_dist.integrations.megatron import MuonDistConfig, get_muon_dist_optimizer

        options = self._options
        common = {"weight_decay": options.weight_decay, "adam_beta2": 0.95}
        if self.name == "adamw":
            config = megatron_host.optimizer_config(self._setup, OptimizerConfig, lr=options.lr, **common)
            return get_megatron_optimizer(config, self._chunks)
        settings = {name: value for name, value in muon_settings(options).items() if name != "ns_steps"}
        muon = {f"muon_{name}": value for name, value in settings.items()}
        if options.adam_lr is not None:
            muon["muon_lr"] = options.lr
        config = megatron_host.optimizer_config(
            self._setup,
            MuonDistConfig,
            lr=options.lr if options.adam_lr is None else options.adam_lr,
            muon_num_ns_steps=options.ns_steps,
            muon_coefficient_type=None if options.adaptive else "quintic",
            muon_momentum=0.95,
            muon_nesterov=True,
            muon_scale_mode="spectral",
            muon_extra_scale_factor=0.2,
            **common,
            **muon,
        )
        return get_muon_dist_optimizer(config, self._chunks)

    def step(self, number: int, read: Read) -> Tensor:
        assert self._options.weight_decay is not None
        rate = self._peak * self._options.learning_rate_factor(number)
        megatron_host.set_rates(self.optimizer, rate, self._options.weight_decay)
        batches = (torch.cat([tokens, targets[:, -1:]], dim=1).to(self._device) for tokens, targets in map(read, range(self.accumulation)))
        loss, (_, norm, _) = megatron_host.train_step(
            self._setup, self._chunks, self.optimizer, number, lambda _: next(batches), around=self._timed
        )
        self._norm = None if norm is None else float(norm)
        assert loss is not None  # there is one pipeline stage
        return torch.tensor(loss, device=self._device)

    def _timed(self, step: Any) -> Any:
        self.stopwatch.start()
        result = step()
        self.stopwatch.stop()
        return result

    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return megatron_host.evaluate(self._setup, self._chunks, tokens.to(self._device), targets.to(self._device))

    def learning_rate(self) -> float:
        rate = float(self.optimizer.param_groups[0]["lr"])
        return rate if self._options.adam_lr is None or self._options.lr is None else rate * self._options.lr / self._options.adam_lr

    def gradient_norm(self) -> float | None:
        return self._norm

    def state_bytes(self) -> int:
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        states = [entry for each in chained if each.optimizer is not None for entry in each.optimizer.state.values()]
        return sum(v.numel() * v.element_size() for entry in states for v in entry.values() if isinstance(v, Tensor))

    def save(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._sharded(is_loading=False), str(folder))

    def load(self, checkpoint: Checkpoint) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._sharded(is_loading=True), str(checkpoint.path))
        self._chunks[0].module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
        if self._setup.distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        model = self._chunks[0].module.sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)}
