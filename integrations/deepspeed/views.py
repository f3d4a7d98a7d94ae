"""The stores of one call as views: one per parameter for Muon, one per flat store for AdamW, which takes a partition as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dist.sharding.layout import ShardLayout

from ..host_views import HostView
from . import tensor_parallel
from .wrappers import Piece, Store, whole_span


def views_of(
    stores: Sequence[Store],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    holders: Callable[[Any], Any],
    tensor_parallel_group: Any,
    device: torch.device,
) -> list[HostView]:
    """The views of the stores that DeepSpeed steps in one call.

    Args:
        stores: those of the call.
        groups: all parameter groups.
        names: of the model's parameters, by tensor.
        holders: from a store's ranks to all ranks that hold pieces of the same parameters.
        tensor_parallel_group: see `tensor_parallel`.
        device: where matrices are orthogonalised.
    """
    views = []
    for number, store in enumerate(stores):
        algorithm = groups[store.group]["algorithm"]
        if store.flat and algorithm == "adamw":
            numel, span = whole_span(store)
            layout = ShardLayout(global_shape=(numel,), span=span, group=store.ranks, device=device)
            name = f"adamw of group {store.group}, store {number}"
            views.append(
                HostView(tensor=store.tensor, span=None, name=name, layout=layout, group=store.group, reason="elementwise, as one tensor")
            )
            continue
        for piece in store.pieces:
            p, name = piece.parameter, names[piece.parameter]
            if algorithm == "adamw":
                layout = ShardLayout(global_shape=tuple(p.shape), group=store.ranks, device=device)
            else:
                layout = ShardLayout(
                    global_shape=tensor_parallel.whole_shape(p, name),
                    blocks=tensor_parallel.blocks(p, name, tensor_parallel_group),
                    span=(piece.start, piece.stop),
                    group=holders(store.ranks),
                    device=device,
                )
            held = _span(piece) if store.flat else None
            views.append(
                HostView(tensor=store.tensor, span=held, name=name, layout=layout, group=store.group, reason="as DeepSpeed's group says")
            )
    return views


def _span(piece: Piece) -> tuple[int, int]:
    return piece.offset, piece.offset + piece.stop - piece.start


def mismatch(stores: Sequence[Store], names: Mapping[Tensor, str]) -> str:
    """What is wrong with where DeepSpeed says the pieces lie, by their values; "" where all is right."""
    for store in stores:
        for piece in store.pieces:
            start, stop = _span(piece) if store.flat else (0, None)
            ours, theirs = store.tensor.detach().reshape(-1)[start:stop], piece.values()
            if ours.numel() != theirs.numel() or not torch.equal(ours.to(theirs.device, theirs.dtype), theirs):
                return (
                    f"{names[piece.parameter]} has other values than its piece of DeepSpeed's "
                    f"{tuple(store.tensor.shape)} tensor of group {store.group}, at {piece.offset}. Either the piece lies elsewhere, "
                    "or the model's weights were changed after deepspeed.initialize without the optimizer's refresh_fp32_params()"
                )
    return ""
