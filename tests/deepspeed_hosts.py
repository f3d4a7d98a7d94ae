"""DeepSpeed engines on CPU ranks: a model that ZeRO cuts at odd elements, and what an engine did to its whole matrices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from muon_dist.integrations.deepspeed.tensor_parallel import blocks, tensor_parallel_group, whole_shape
from torch import Tensor, nn

from .reference import ReferenceMuon

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at first use, for minutes

VOCABULARY = 23


class Net(nn.Module):
    """Matrices of odd shapes with biases between an embedding and a head; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 17)
        self.layers = nn.ModuleList(nn.Linear(n, m) for m, n in [(33, 17), (5, 33), (64, 5), (17, 64)])
        self.norm = nn.LayerNorm(17)
        self.lm_head = nn.Linear(17, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.lm_head(self.norm(x)).float().flatten(0, 1), (tokens * 7 + 3).flatten() % VOCABULARY)


MATRICES = {f"layers.{i}.weight" for i in range(4)}


def make_net(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def batch(step: int, data_rank: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * data_rank + micro)
    return torch.randint(0, VOCABULARY, (3, 6), generator=generator)


def config(
    stage: int, *, dtype: str = "fp32", params: dict[str, Any] | None = None, zero: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    result = {
        "train_micro_batch_size_per_gpu": 3,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **(zero or {})},
        "optimizer": {"type": "MuonDist", "params": {"lr": 0.5, "adam_lr": 1e-2, "weight_decay": 0.0, "ns_steps": 5, **(params or {})}},
        **more,
    }
    if dtype.startswith("bf16"):
        result["bf16"] = {"enabled": True}
    if dtype == "bf16_fp32":
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 8}
        get_accelerator().is_fp16_supported = lambda: True  # torch is able to, though DeepSpeed refuses it on most CPUs
    return result


def start(ds_config: dict[str, Any], model: nn.Module | None = None, **options: Any) -> Any:
    model = make_net() if model is None else model
    options.setdefault("model_parameters", list(model.parameters()) if "optimizer" not in options else None)
    return deepspeed.initialize(model=model, config=ds_config, **options)[0]


def train_step(engine: Any, step: int) -> float:
    """One optimizer step, with as many micro-batches as the engine accumulates."""
    loss = torch.zeros(())
    if hasattr(engine, "train_batch"):  # a pipeline, which accumulates by itself
        return float(engine.train_batch(engine.batches))
    for micro in range(engine.gradient_accumulation_steps()):
        loss = engine(batch(step, dist.get_rank(engine.data_parallel_group), micro).to(engine.device))
        engine.backward(loss)
        engine.step()
    return float(loss.detach())


def label(p: Any, name: str) -> str:
    """A parameter's name; an expert's says which expert-parallel rank it lives on, since all of them count from 0."""
    if getattr(p, "allreduce", True):
        return name
    from deepspeed.utils import groups

    return f"{name}@{groups._get_expert_parallel_rank(p.group_name)}"


def gather_whole(engine: Any, read: Callable[[Any, Any], Tensor | None]) -> dict[str, Tensor]:
    """Whole parameters, put together from `read(store, piece)` of every store on every rank, by label."""
    names = {p: name for name, p in engine.module.named_parameters()}
    group = tensor_parallel_group(engine.mpu)
    mine = []
    for store in engine.basic_optimizer.stores:
        for piece in store.pieces:
            value, p = read(store, piece), piece.parameter
            if value is not None:
                name = names[p]
                value = value.detach().float().reshape(-1).cpu().clone()
                mine.append((label(p, name), whole_shape(p, name), blocks(p, name, group), piece.start, value))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    tensors: dict[str, Tensor] = {}
    for name, shape, boxes, start, value in (entry for theirs in everyone for entry in theirs):
        whole = tensors.setdefault(name, torch.full(shape, float("nan")))
        where = [whole[tuple(slice(a, b) for a, b in box)] for box in boxes]
        shard = torch.cat([part.reshape(-1) for part in where])
        shard[start : start + len(value)] = value
        for part, new in zip(where, shard.split([part.numel() for part in where]), strict=True):
            part.copy_(new.view(part.shape))
    assert all(t.isfinite().all() for t in tensors.values())
    return tensors


def values_of(engine: Any) -> dict[str, Tensor]:
    """The whole masters."""
    return gather_whole(engine, lambda store, piece: piece_of(store, piece, store.tensor))


def piece_of(store: Any, piece: Any, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach()[piece.offset : piece.offset + piece.stop - piece.start] if store.flat else tensor.detach()


class Captured:
    """The whole reduced gradients that the engine's optimizer is given, step by step."""

    def __init__(self, engine: Any) -> None:
        self.engine, optimizer = engine, engine.basic_optimizer
        self._pieces: dict[int, dict[int, Tensor]] = {}
        self._step = optimizer.step

        def step(*args: Any) -> Any:
            for group in optimizer.param_groups:
                for t in group["params"]:
                    if t.grad is not None:
                        self._pieces[id(t)] = t.grad.detach().clone()
            return self._step(*args)

        optimizer.step = step

    def take(self) -> dict[str, Tensor]:
        """The gradients of the last step, whole."""
        result = gather_whole(self.engine, lambda store, piece: piece_of(store, piece, self._pieces.get(id(store.tensor))))
        self._pieces.clear()
        return result


def reference_for(
    engine: Any, params: dict[str, Any], matrices: set[str] = MATRICES, kind: type[ReferenceMuon] = ReferenceMuon
) -> ReferenceMuon:
    values = values_of(engine)
    reference = kind(
        values, {n: [p.shape[0]] for n, p in values.items() if n in matrices}, lr=params["lr"], weight_decay=params.get("weight_decay", 0.1)
    )
    return reference


def update_errors(
    engine: Any, params: dict[str, Any], steps: int, matrices: set[str] = MATRICES, kind: type[ReferenceMuon] = ReferenceMuon
) -> dict[str, float]:
    """Train, and compare every update with the reference's on the same reduced gradients: the worst relative error per parameter."""
    captured = Captured(engine)
    reference = reference_for(engine, params, matrices, kind)
    worst: dict[str, float] = {}
    for k in range(steps):
        before = values_of(engine)
        train_step(engine, k)
        gradients, after = captured.take(), values_of(engine)
        for name, p in reference.parameters.items():
            p.copy_(before[name])
        for name in gradients:
            reference.lr = params["lr"] if name in matrices else params["adam_lr"]
            reference.steps[name] += 1
            (reference.muon_step if name in matrices else reference.adamw_step)(name, gradients[name])
        for name, p in reference.parameters.items():
            wanted = p - before[name]
            assert wanted.norm() > 0, f"{name} did not move"
            worst[name] = max(worst.get(name, 0.0), float((after[name] - before[name] - wanted).norm() / wanted.norm()))
    return worst


def tensor_parallel(size: int) -> dict[str, Any]:
    return {
        "autotp_size": size,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [r".*layers\.(0|2)\.weight$"], "partition_type": "column"},
                {"patterns": [r".*layers\.(1|3)\.weight$"], "partition_type": "row"},
            ],
        },
    }
