"""What Megatron says of a parameter: its name in the whole model, its matrices, and the blocks of it that a rank's tensor holds.

Megatron stores the rows of a fused projection interleaved: for every query group its q rows, then k, then v; for every head of
multi-latent attention its k rows, then v. The whole parameter is described here with these rows sorted by matrix, [Q; K; V], so
that every matrix is a box of it. A rank's tensor is then a list of blocks, in the order in which it stores them:

    two query groups     what rank 0 of TP 2 stores     blocks of [Q; K; V]
    q₀ k₀ v₀ q₁ k₁ v₁    q₀ k₀ v₀                       rows of Q, rows of K, rows of V
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from muon_dist.sharding.layout import Box, whole

LAYER = re.compile(r"(^|\.)layers\.\d+$")
LOCAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)|(\.experts\.linear_fc\d\.(?:weight|bias))(\d+)()$")
PACKED_EXPERTS = re.compile(r"\.experts\.(weight[12]|linear_fc\d\.weight)$")
EXPERT = re.compile(r"\.experts\.")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A weight whose rows belong to several matrices.

    Attributes:
        parts: rows of each matrix in one unit.
        repeats: units, one after the other.
        cut_by_part: tensor parallelism cuts every part by itself, not the rows as they come.
        separate: the parts are matrices of their own; else they only say how the rows are cut.
    """

    parts: tuple[int, ...]
    repeats: int = 1
    cut_by_part: bool = False
    separate: bool = True

    @property
    def rows(self) -> int:
        return self.repeats * sum(self.parts)

    @property
    def split(self) -> tuple[int, ...]:
        """Rows of every matrix."""
        return tuple(self.repeats * part for part in self.parts)

    def held(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """The rows, sorted by matrix, that one of `ranks` tensor-parallel ranks stores, in its order."""
        starts = [0, *itertools.accumulate(self.split)]
        if self.cut_by_part:
            shares = [part // ranks for part in self.split]
            return [(start + rank * share, start + (rank + 1) * share) for start, share in zip(starts, shares, strict=False)]
        low, high = (self.rows * r // ranks for r in (rank, rank + 1))
        unit, intervals = sum(self.parts), []
        for k in range(low // unit, -(-high // unit)):
            first = k * unit
            for start, part in zip(starts, self.parts, strict=False):
                a, b = max(low, first) - first, min(high, first + part) - first
                if a < b:
                    intervals.append((start + k * part + a, start + k * part + b))
                first += part
        return intervals


@dataclass(frozen=True, kw_only=True)
class WholeParameter:
    """A parameter as all its tensor-parallel ranks hold it together.

    Attributes:
        shape: its whole shape, rows sorted by matrix.
        split: rows of every matrix in it; None: it is one matrix.
        blocks: the boxes of it whose flattened concatenation is this rank's tensor.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...] | None
    blocks: tuple[Box, ...]


def fused_rows(name: str, p: Any, config: Any, *, tensor_parallel: int, split_qkv: bool, split_fc1: bool) -> Fused | None:
    """How the rows of a weight belong to matrices, by its name and its module's config; None where they are of one.

    Args:
        config: the `TransformerConfig` of the module that the weight belongs to.
        tensor_parallel: ranks that share the weight.
        split_qkv, split_fc1: whether fused attention projections, and gate and up of a gated MLP, are matrices of their own.
    """
    module = name.rsplit(".", 2)[-2] if "." in name else ""
    heads = config.num_attention_heads
    if module == "linear_qkv":
        groups, channels = config.num_query_groups or heads, config.kv_channels
        gate = 1 + bool(getattr(config, "attention_output_gate", False))
        return Fused(parts=(heads // groups * channels,) * gate + (channels, channels), repeats=groups, separate=split_qkv)
    if module == "linear_kv":  # cross-attention
        return Fused(parts=(config.kv_channels, config.kv_channels), repeats=heads, separate=split_qkv)
    if module == "linear_kv_up_proj":
        return Fused(parts=(config.qk_head_dim, config.v_head_dim), repeats=heads, separate=split_qkv)
    if module == "linear_kv_down_proj":
        return Fused(parts=(config.kv_lora_rank, config.qk_pos_emb_head_dim), separate=split_qkv)
    if module == "linear_qkv_down_proj":
        return Fused(parts=(config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim), separate=split_qkv)
    if module == "linear_fc1" and config.gated_linear_unit:
        half = p.shape[0] * tensor_parallel // 2
        return Fused(parts=(half, half), cut_by_part=True, separate=split_fc1)
    sizes = getattr(p, "partition_sizes", None)
    if sizes is not None:  # Mamba's in_proj: sizes on this rank
        return Fused(parts=tuple(int(size) * tensor_parallel for size in sizes), cut_by_part=True, separate=False)
    return None


def cut_dimension(p: Any, module: nn.Module) -> int | None:
    """The dimension along which tensor-parallel ranks hold different pieces of a weight; None where all hold it whole.

    A layer's class decides where it says: Transformer Engine marks every weight as cut, also those that are duplicated, and those of
    grouped row-parallel layers along the wrong dimension; megatron-core 0.16 leaves that as it is.
    """
    classes = [base.__name__ for base in type(module).__mro__]
    if any("RowParallel" in name for name in classes):
        return 1
    if any("ColumnParallel" in name for name in classes):
        return 0
    if "TELinear" in classes or not getattr(p, "tensor_model_parallel", False):
        return None
    dim = int(getattr(p, "partition_dim", -1))
    return dim if dim >= 0 else None


def whole_parameter(name: str, p: Any, fused: Fused | None, *, dim: int, rank: int, ranks: int) -> WholeParameter:
    """The whole parameter and this rank's blocks of it.

    Args:
        name: for errors.
        p: the tensor on this rank, with Megatron's attributes.
        fused: see `fused_rows`.
        dim: along which it is cut, where it is.
        rank, ranks: among the tensor-parallel ranks that share it; 0 and 1 where they hold it whole.

    Raises:
        ValueError: a fused weight whose rows don't add up, or that is cut along another dimension or with an unknown stride.
    """
    shape = tuple(size * (ranks if d == dim else 1) for d, size in enumerate(p.shape))
    if fused is not None and fused.rows != shape[0]:
        raise ValueError(
            f"{name} has {shape[0]} rows, but its config says {fused.repeats} × {fused.parts}: it can't be told which rows belong to "
            "which matrix. Give its module the config that it was built with"
        )
    split = fused.split if fused is not None and fused.separate else None
    if ranks > 1 and dim > 0:
        if fused is not None and fused.separate:
            raise ValueError(f"{name} is cut along dimension {dim}, but its fused matrices lie along the rows: this is not supported")
        share = p.shape[dim]
        box = (*whole(shape[:dim]), (rank * share, (rank + 1) * share), *whole(shape[dim + 1 :]))
        return WholeParameter(shape=shape, split=None, blocks=(box,))
    if fused is None:
        stride = getattr(p, "partition_stride", 1)
        if ranks > 1 and stride != 1:
            raise ValueError(f"{name} is cut with partition_stride {stride}, but nothing says which matrices it holds: not supported")
        rows = [(rank * p.shape[0], (rank + 1) * p.shape[0])]
    else:
        rows = fused.held(rank, ranks)
    return WholeParameter(shape=shape, split=split, blocks=tuple((interval, *whole(shape[1:])) for interval in rows))


def model_parameters(
    model_chunks: Sequence[nn.Module], *, expert_rank: int, expert_ranks: int
) -> Iterator[tuple[str, Tensor, Any, nn.Module]]:
    """The trainable parameters of this rank: (name in the whole model, parameter, its module's config, its module).

    Layers and experts are numbered over all pipeline stages and expert-parallel ranks, so a name is the same wherever its
    parameter lies.

    Raises:
        ValueError: two parameters of one name, or experts packed into one tensor.
    """
    seen: dict[str, Tensor] = {}
    for chunk in model_chunks:
        modules = dict(chunk.named_modules())
        renamed = _numbered_layers(modules)
        for local_name, p in chunk.named_parameters():
            if not p.requires_grad:
                continue
            owner, _, leaf = local_name.rpartition(".")
            name = f"{renamed(owner)}.{leaf}" if owner else leaf
            name = re.sub(r"^(module\.)+", "", name)
            config = _config_of(owner, modules)
            if PACKED_EXPERTS.search(name):
                raise ValueError(
                    f"{name} packs all local experts into one tensor, which MuonDist does not support: use Transformer Engine's grouped "
                    "GEMM without --moe-use-legacy-grouped-gemm and moe_single_grouped_weight, or leave out --moe-grouped-gemm"
                )
            if not getattr(p, "allreduce", True) and config.num_moe_experts:
                name = _numbered_expert(name, expert_rank * (config.num_moe_experts // expert_ranks))
            if seen.setdefault(name, p) is not p:
                raise ValueError(f"two parameters are called {name}: MuonDist can't tell them apart")
            yield name, p, config, modules[owner]


def _numbered_layers(modules: Mapping[str, nn.Module]) -> Any:
    """A function from a module's path in this rank's model to its path in the whole model."""
    prefixes = {}
    for path, module in modules.items():
        number = getattr(module, "layer_number", None)
        if LAYER.search(path) and isinstance(number, int):
            prefixes[path] = f"{path.rpartition('.')[0]}.{number - 1}"

    def renamed(path: str) -> str:
        parts = path.split(".")
        for k in range(len(parts), 0, -1):
            prefix = ".".join(parts[:k])
            if prefix in prefixes:
                return ".".join([prefixes[prefix], *parts[k:]])
        return path

    return renamed


def _numbered_expert(name: str, first: int) -> str:
    def number(match: re.Match[str]) -> str:
        before, index, after = match.group(1, 2, 3) if match.group(1) else match.group(4, 5, 6)
        return f"{before}{first + int(index)}{after}"

    return LOCAL_EXPERT.sub(number, name)


def _config_of(path: str, modules: Mapping[str, nn.Module]) -> Any:
    """The config of the nearest module that has one."""
    while True:
        config = getattr(modules[path], "config", None)
        if config is not None:
            return config
        if not path:
            raise ValueError("no module of the model has a config: MuonDist needs models of megatron-core")
        path = path.rpartition(".")[0]
