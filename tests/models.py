"""Small models with awkward shapes, the placements they are tested under, and how a test reads whole tensors from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

ODD = [(33, 17), (5, 64), (1, 9), (3, 3), (64, 5), (48, 40), (2, 7), (17, 33), (40, 48), (40, 48)]
WIDE = [(33, 17), (5, 64), (17, 33), (9, 7), (48, 41), (41, 48)]  # odd, but no side shorter than four ranks need
EVEN = [(32, 16), (8, 64), (64, 8), (48, 40), (40, 48), (40, 48)]


SHAPES = {"odd": ODD, "wide": WIDE, "even": EVEN}


class Bank(nn.Module):
    """Independent linear layers, (out, in) each; its loss gives every one of them a gradient of its own."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=dtype) for m, n in shapes)

    def forward(self, seed: int) -> Tensor:
        total: Tensor | float = 0.0
        for k, layer in enumerate(self.layers):
            generator = torch.Generator().manual_seed(1000 * seed + k)
            x = torch.randn(6, layer.in_features, generator=generator, dtype=torch.float64)
            y = layer(x.to(layer.weight.dtype))
            y = y.full_tensor() if isinstance(y, DTensor) else y
            total = total + (y.sin() * (1 + torch.arange(y.shape[-1], dtype=y.dtype))).sum()
        return total  # type: ignore[return-value]


def make_bank(shapes: list[tuple[int, int]], dtype: torch.dtype) -> Bank:
    torch.manual_seed(7)
    return Bank(shapes, dtype)


def place(model: nn.Module, placement: str) -> nn.Module:
    """The model as a trainer would have it: sharded, replicated or both, over all ranks."""
    world = dist.get_world_size()
    if placement == "replicas":
        return nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if placement in ("fsdp2", "fsdp2_dim1"):
        mesh = init_device_mesh("cpu", (world,))
        where = (lambda p: Shard(1) if p.ndim == 2 else None) if placement == "fsdp2_dim1" else None
        for layer in list(model.layers)[::2]:
            fully_shard(layer, mesh=mesh, shard_placement_fn=where)
        return fully_shard(model, mesh=mesh, shard_placement_fn=where)
    if placement == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    if placement in ("tp", "fsdp2_tp"):
        mesh = init_device_mesh("cpu", (1, world) if placement == "tp" else (2, world // 2), mesh_dim_names=("dp", "tp"))
        styles = {f"layers.{k}": (ColwiseParallel, RowwiseParallel)[k % 2] for k in range(len(model.layers))}
        plan = {name: style(input_layouts=Replicate(), output_layouts=Replicate()) for name, style in styles.items()}
        parallelize_module(model, mesh["tp"], plan)
        return model if placement == "tp" else fully_shard(model, mesh=mesh["dp"])
    if placement == "mixed":  # every other layer sharded, the rest plain replicas
        mesh = init_device_mesh("cpu", (world,))
        for layer in list(model.layers)[::2]:
            fully_shard(layer, mesh=mesh)
        return model
    raise ValueError(placement)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}


def backward(model: nn.Module, seed: int, placement: str) -> None:
    """One backward on this rank's own data where the placement averages over data, on shared data elsewhere."""
    model.zero_grad()
    rank = dist.get_rank() if dist.is_initialized() else 0
    if placement in ("tp", "fsdp2_tp"):
        seed = seed * 10 + (rank // max(1, dist.get_world_size() // 2) if placement == "fsdp2_tp" else 0)
    else:
        seed = seed * 10 + rank
    model(seed).backward()
    if placement == "mixed":
        average_replicas(model)


def average_replicas(model: nn.Module) -> None:
    """What DDP does for plain parameters that no wrapper looks after."""
    for p in model.parameters():
        if not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def muon_names(parameters: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: [p.shape[0]] for name, p in parameters.items() if p.ndim == 2}


def relative_errors(before: Any, after: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖Δ − Δ_ref‖ / ‖Δ_ref‖ per parameter, from values before and after the step."""
    result = {}
    for name, b in before.items():
        reference = expected[name] - b
        result[name] = float(((after[name] - b) - reference).norm() / reference.norm().clamp_min(1e-300))
    return result


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
