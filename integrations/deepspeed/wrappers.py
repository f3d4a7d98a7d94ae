"""Where DeepSpeed keeps the pieces of parameters: one description for each of its optimizer wrappers.

A wrapper replaces the parameters in the optimizer's groups by tensors of its own. Here they are **stores**: a store holds the
pieces that this rank has of some parameters, flattened one after the other (ZeRO), or one whole parameter (stage 0). A wrapper
steps its optimizer in one call, or in several, one per store; `Host.calls` lists the stores of each.

Written for DeepSpeed 0.19.8. Its private attributes are read only here, and what they say is compared with the parameters'
values before the first update.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank, get_world_size


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a store holds of one parameter: elements [start, stop) of its flattened tensor on this rank, from `offset` on.

    `values` returns what DeepSpeed's own copy has there, 1-D, in the model's dtype.
    """

    parameter: Tensor
    offset: int
    start: int
    stop: int
    values: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Store:
    """A tensor that DeepSpeed gives its optimizer to update.

    Attributes:
        tensor: 1-D for ZeRO's partitions, a whole parameter (or an fp32 copy of one) otherwise.
        flat: which of both.
        group: index of the parameter group it belongs to.
        pieces: every parameter of the group, those of which nothing lies here included, in an order equal on all ranks.
        ranks: the data-parallel ranks that share these parameters.
    """

    tensor: Tensor
    flat: bool
    group: int
    pieces: tuple[Piece, ...]
    ranks: ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Host:
    """A wrapper as MuonDist sees it.

    Attributes:
        calls: the stores that each call of `step()` updates, in the order of the calls.
        checks_gradients: DeepSpeed leaves out steps with a gradient that is not finite, on all ranks.
        pending_gradients: the reduced gradients on this rank that have not reached their stores yet, while the first call runs.
    """

    calls: tuple[tuple[Store, ...], ...]
    checks_gradients: bool
    pending_gradients: Callable[[], list[Tensor]]


def describe(wrapper: Any, param_groups: Sequence[dict[str, Any]], data_parallel: Callable[[Tensor], ProcessGroup]) -> Host:
    """The stores of a wrapper.

    Args:
        wrapper: what the engine calls its optimizer; the optimizer itself where there is no wrapper.
        param_groups: the groups of the optimizer inside.
        data_parallel: the ranks among which a parameter is replicated, where the wrapper doesn't tell.

    Raises:
        ValueError: a wrapper that is not known here.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return _stage_1_and_2(wrapper)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return _stage_3(wrapper)
    if isinstance(wrapper, BF16_Optimizer):
        return _bf16(wrapper)
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        stores = [
            _whole(master, p, i, data_parallel(p))
            for i, (masters, group) in enumerate(zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True))
            for master, p in zip(masters, group, strict=True)
        ]
        return Host(calls=(tuple(stores),), checks_gradients=False, pending_gradients=list)
    if isinstance(wrapper, torch.optim.Optimizer):
        stores = [_whole(p, p, i, data_parallel(p)) for i, g in enumerate(param_groups) for p in g["params"] if p.requires_grad]
        return Host(calls=(tuple(stores),), checks_gradients=False, pending_gradients=list)
    raise ValueError(f"DeepSpeed wraps the optimizer in {type(wrapper).__name__}, which MuonDist does not know")


def _whole(tensor: Tensor, p: Tensor, group: int, ranks: ProcessGroup) -> Store:
    piece = Piece(parameter=p, offset=0, start=0, stop=p.numel(), values=lambda: p.detach().reshape(-1))
    return Store(tensor=tensor, flat=False, group=group, pieces=(piece,), ranks=ranks)


def _partition_pieces(parameters: Sequence[Tensor], offsets: Sequence[int], first: int, size: int) -> tuple[Piece, ...]:
    """The pieces in elements [first, first + size) of parameters that lie at `offsets` of one flat tensor."""
    pieces = []
    for p, offset in zip(parameters, offsets, strict=True):
        start, stop = (min(max(edge - offset, 0), p.numel()) for edge in (first, first + size))
        pieces.append(
            Piece(parameter=p, offset=max(offset - first, 0) if stop > start else 0, start=start, stop=stop, values=_slice(p, start, stop))
        )
    return tuple(pieces)


def _slice(p: Tensor, start: int, stop: int) -> Callable[[], Tensor]:
    return lambda: p.detach().reshape(-1)[start:stop]


def _stage_1_and_2(wrapper: Any) -> Host:
    # p._hp_mapping would say the same, but it is wrong under round_robin_gradients
    calls = []
    for i, tensor in enumerate(wrapper.single_partition_of_fp32_groups):
        ranks, size = wrapper.real_dp_process_group[i], int(wrapper.partition_size[i])
        pieces = _partition_pieces(wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i], get_rank(ranks) * size, size)
        calls.append((Store(tensor=tensor, flat=True, group=i, pieces=pieces, ranks=ranks),))

    def pending() -> list[Tensor]:
        if wrapper.cpu_offload:
            return [t.grad for t in wrapper.single_partition_of_fp32_groups[1:] if t.grad is not None]
        later = range(1, len(wrapper.single_partition_of_fp32_groups))
        return [g for i in later for g in wrapper.averaged_gradients.get(i) or () if g is not None]

    # the norm alone is not acted on where the model is bf16
    checks = bool(wrapper.check_grad_overflow or (wrapper.compute_grad_norm and wrapper.dtype != torch.bfloat16))
    return Host(calls=tuple(calls), checks_gradients=checks, pending_gradients=pending)


def _bf16(wrapper: Any) -> Host:
    stores = []
    for i, tensor in enumerate(wrapper.fp32_groups_flat_partition):
        ranks, parameters = wrapper.real_dp_process_group[i], wrapper.bf16_groups[i]
        offsets = [0, *itertools.accumulate(p.numel() for p in parameters)][:-1]
        pieces = _partition_pieces(parameters, offsets, get_rank(ranks) * tensor.numel(), tensor.numel())
        stores.append(Store(tensor=tensor, flat=True, group=i, pieces=pieces, ranks=ranks))
    return Host(calls=(tuple(stores),), checks_gradients=True, pending_gradients=list)


def _stage_3(wrapper: Any) -> Host:
    calls = []
    for i, (tensor, parameters) in enumerate(zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)):
        ranks = getattr(parameters[0], "ds_process_group", wrapper.dp_process_group)
        pieces = []
        for p in parameters:
            _, offset, size = wrapper.grad_position[wrapper.get_param_id(p)]
            start, stop = (min((get_rank(ranks) + k) * size, p.ds_numel) for k in (0, 1))
            pieces.append(Piece(parameter=p, offset=offset, start=start, stop=stop, values=_partition_of(p, stop - start)))
        group = wrapper.sub_group_to_group_id[i]
        calls.append((Store(tensor=tensor, flat=True, group=group, pieces=tuple(pieces), ranks=ranks),))
    return Host(calls=tuple(calls), checks_gradients=True, pending_gradients=list)


def _partition_of(p: Any, numel: int) -> Callable[[], Tensor]:
    return lambda: p.ds_tensor.detach().reshape(-1)[:numel]


def whole_span(store: Store) -> tuple[int, tuple[int, int]]:
    """A flat store as a piece of all its ranks' stores in a row: their length, and the range of this one."""
    rank, size = get_rank(store.ranks), store.tensor.numel()
    return get_world_size(store.ranks) * size, (rank * size, (rank + 1) * size)
