"""Megatron models on CPU ranks, and what an optimizer did to their whole matrices.

Whole parameters are put together here from Megatron's own attributes, not by the layouts under test: pieces of a flat buffer by
data-parallel rank, shards by tensor-parallel rank, and the rows of a fused projection as Megatron's attention reads them.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.example.megatron_host import Setup, everyone, initialize, make_model, optimizer_config, set_rates, train_step

from .reference import ReferenceMuon

PLAIN = {"muon_num_ns_steps": 5, "muon_coefficient_type": "simple", "muon_momentum": 0.95, "muon_nesterov": True}


def start(setup: Setup, **given: Any) -> tuple[list[Any], Any]:
    """A model's chunks and MuonDist for them."""
    from muon_dist.integrations.megatron import MuonDistConfig, get_muon_dist_optimizer

    initialize(setup)
    chunks = make_model(setup)
    config = optimizer_config(setup, MuonDistConfig, **{**PLAIN, **given})
    return chunks, get_muon_dist_optimizer(config, chunks)


def pieces_of(optimizer: Any, read: Any) -> dict[str, list[tuple[int, Tensor]]]:
    """(first element in this rank's tensor, values) of every piece that lies here, by name; `read` gives its values, 1-D."""
    result: dict[str, list[tuple[int, Tensor]]] = {}
    for inside in optimizer.inside:
        for piece in inside.pieces:
            value = read(inside, piece)
            if value is not None:
                name = inside.described[piece.parameter].name
                result.setdefault(name, []).append((piece.start, value.detach().float().reshape(-1).cpu().clone()))
    return result


def whole_tensors(chunks: list[Any], optimizer: Any, read: Any) -> dict[str, Tensor]:
    """Whole parameters as Megatron stores them at TP 1, from `read(inside, piece)` on every rank."""
    from megatron.core import parallel_state as ps

    about = {}
    for inside in optimizer.inside:
        for p, described in inside.described.items():
            expert = not getattr(p, "allreduce", True)
            cut = getattr(p, "tensor_model_parallel", False) and p.partition_dim >= 0
            group = ps.get_expert_tensor_parallel_group() if expert else ps.get_tensor_model_parallel_group()
            about[described.name] = (
                tuple(p.shape),
                p.partition_dim if cut else None,
                "linear_fc1" in described.name and chunks[0].config.gated_linear_unit,
                dist.get_rank(group),
            )
    told = everyone((about, pieces_of(optimizer, read)))
    shards: dict[str, dict[int, Tensor]] = {}
    facts: dict[str, Any] = {}
    for theirs, held in told:
        for name, pieces in held.items():
            shape, dim, gated, rank = theirs[name]
            facts[name] = (dim, gated)
            shard = shards.setdefault(name, {}).setdefault(rank, torch.full(shape, float("nan")))
            for first, values in pieces:
                shard.view(-1)[first : first + len(values)] = values
    result = {}
    for name, by_rank in shards.items():
        dim, gated = facts[name]
        parts = [by_rank[rank] for rank in sorted(by_rank)]
        if dim is None:
            whole = parts[0]
        elif gated:
            halves = [part.chunk(2, dim=dim) for part in parts]
            whole = torch.cat([half for k in (0, 1) for half in (pair[k] for pair in halves)], dim=dim)
        else:
            whole = torch.cat(parts, dim=dim)
        assert whole.isfinite().all(), f"{name} is not whole"
        result[name] = whole
    return result


def values_of(chunks: list[Any], optimizer: Any) -> dict[str, Tensor]:
    """The whole fp32 masters."""
    return whole_tensors(chunks, optimizer, lambda inside, piece: piece.tensor)


class Captured:
    """The whole gradients that the optimizers inside are given: reduced, unscaled and clipped."""

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        self.chunks, self.optimizer = chunks, optimizer
        self.grads: dict[int, Tensor] = {}
        for inside in optimizer.inside:
            original = inside.step

            def step(*args: Any, inside: Any = inside, original: Any = original) -> Any:
                self.grads.update({id(piece.tensor): piece.tensor.grad.detach().clone() for piece in inside.pieces})
                return original(*args)

            inside.step = step

    def take(self) -> dict[str, Tensor]:
        result = whole_tensors(self.chunks, self.optimizer, lambda inside, piece: self.grads.get(id(piece.tensor)))
        self.grads.clear()
        return result


def sorted_rows(name: str, whole: Tensor, config: Any) -> tuple[Tensor, list[int]]:
    """A weight with the rows of every fused matrix together, as attention and MLP read them, and the rows of each matrix."""
    if "linear_qkv." in name:
        groups, channels = config.num_query_groups, config.kv_channels
        sizes = [config.num_attention_heads // groups * channels, channels, channels]
    elif "linear_kv_up_proj" in name:
        groups, sizes = config.num_attention_heads, [config.qk_head_dim, config.v_head_dim]
    elif "linear_kv_down_proj" in name:
        groups, sizes = 1, [config.kv_lora_rank, config.qk_pos_emb_head_dim]
    elif "linear_fc1" in name and config.gated_linear_unit:
        groups, sizes = 1, [whole.shape[0] // 2] * 2
    else:
        return whole, [whole.shape[0]]
    parts = [part.reshape(-1, whole.shape[1]) for part in whole.view(groups, -1, whole.shape[1]).split(sizes, dim=1)]
    return torch.cat(parts), [part.shape[0] for part in parts]


def update_errors(
    setup: Setup,
    chunks: list[Any],
    optimizer: Any,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    separate: bool = True,
    scale: float = 5.0,
    reference: dict[str, Any] | None = None,
    kind: type[ReferenceMuon] = ReferenceMuon,
) -> dict[str, float]:
    """Train, and compare every update with the reference's on the same gradients: the worst relative error per parameter.

    Args:
        separate: fused projections are several matrices.
        scale: what the learning rate of Muon's matrices is multiplied by; 5 makes the reference's .2·√max Megatron's √max.
        reference: arguments of the reference that differ.
        kind: the reference.
    """
    from megatron.core.utils import get_model_config

    config, captured = get_model_config(chunks[0]), Captured(chunks, optimizer)

    def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: sorted_rows(name, t, config)[0] if t.ndim == 2 else t for name, t in tensors.items()}

    first = values_of(chunks, optimizer)
    muon = {}
    for told in everyone({r.name: r.algorithm for r in optimizer.routes}):
        for name, algorithm in told.items():
            if algorithm == "muon":
                muon[name] = sorted_rows(name, first[name], config)[1] if separate else [first[name].shape[0]]
    naive = kind(fold(first), muon, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999), **(reference or {}))
    worst: dict[str, float] = {}
    for k in range(steps):
        set_rates(optimizer, lr, weight_decay)
        before = fold(values_of(chunks, optimizer))
        train_step(setup, chunks, optimizer, k)
        gradients, after = fold(captured.take()), fold(values_of(chunks, optimizer))
        for name, p in naive.parameters.items():
            p.copy_(before[name])
        for name, gradient in gradients.items():
            naive.steps[name] += 1
            naive.lr = lr * scale if name in muon else lr  # the reference scales by .2·√max, Megatron by √max
            naive.weight_decay = (weight_decay if gradient.ndim > 1 else 0.0) / (naive.lr / lr)
            (naive.muon_step if name in muon else naive.adamw_step)(name, gradient)
        for name, p in naive.parameters.items():
            wanted = p - before[name]
            assert wanted.norm() > 0, f"{name} did not move"
            worst[name] = max(worst.get(name, 0.0), float((after[name] - before[name] - wanted).norm() / wanted.norm()))
    return worst


def model_equals_masters(chunks: list[Any], optimizer: Any) -> bool:
    """Whether the model has the masters' values, rounded, and all of it on every data-parallel rank where nothing is overlapped."""
    from megatron.core import parallel_state

    if not chunks[0].ddp_config.overlap_param_gather:
        dense, expert = parallel_state.get_data_parallel_group(), parallel_state.get_expert_data_parallel_group()
        for p in chunks[0].parameters():
            copies = everyone(p.detach(), dense if getattr(p, "allreduce", True) else expert)
            if not all(torch.equal(copy, copies[0]) for copy in copies):
                return False
    masters = values_of(chunks, optimizer)
    theirs = whole_tensors(chunks, optimizer, lambda inside, piece: piece.parameter.detach().reshape(-1)[piece.start : piece.stop])
    dtype = next(chunks[0].parameters()).dtype
    return all(torch.equal(masters[name].to(dtype).float(), theirs[name]) for name in masters)
