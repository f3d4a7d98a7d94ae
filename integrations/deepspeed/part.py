"""A part: the stores that DeepSpeed steps in one call, as a MuonDist on views of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import muon_dist
from muon_dist.binding import BoundParameter
from muon_dist.groups import GROUP_KEYS, STRUCTURE
from muon_dist.polar.polynomials import Schedule
from muon_dist.sharding.layout import ShardLayout

from . import tensor_parallel
from .wrappers import Piece, Store, whole_span

ADAMW_STATE = ("exp_avg", "exp_avg_sq")


class _Steps(muon_dist.MuonDist):
    """MuonDist that a host tells whether the step happens, where the host knows; it asks the gradients otherwise."""

    verdict: Tensor | None = None  # a bool, where the stores are

    def _agree_on_gradients(self, grads: dict[BoundParameter, Tensor | None]) -> dict[BoundParameter, Tensor]:
        if self.verdict is None:
            return super()._agree_on_gradients(grads)
        return dict.fromkeys(grads, self.verdict)


class Part:
    """Views of stores, one per parameter, and the optimizer that steps them.

    Momentum and AdamW's averages are one tensor per store, so that DeepSpeed can offload and save them; what the optimizer has
    are views of these. AdamW takes a flat store as it is.

    Args:
        stores: those of one call.
        groups: all parameter groups, which hold the hyperparameters.
        state: the state of each store, by tensor.
        spectra: the rows of measured spectra, by the names of parameters.
        names: of the model's parameters, by tensor.
        holders: from a store's ranks to all ranks that hold pieces of the same parameters.
        tensor_parallel_group: see `tensor_parallel`.
        device: where matrices are orthogonalised.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        spectra: dict[str, Tensor],
        names: Mapping[Tensor, str],
        holders: Callable[[Any], Any],
        tensor_parallel_group: Any,
        device: torch.device,
    ) -> None:
        self.stores, self._state, self._spectra, self._names = tuple(stores), state, spectra, names
        self._views: list[tuple[Store, Piece | None, nn.Parameter, str]] = []
        self._members: dict[int, list[tuple[str, nn.Parameter]]] = {}
        reasons: dict[int, list[str]] = {}
        layouts: dict[str, ShardLayout] = {}
        for number, store in enumerate(self.stores):
            algorithm = groups[store.group]["algorithm"]
            if store.flat and algorithm == "adamw":
                numel, span = whole_span(store)
                name = f"adamw of group {store.group}, store {number}"
                layout = ShardLayout(global_shape=(numel,), span=span, group=store.ranks, device=device)
                self._add(store, None, name, layout, layouts)
                reasons.setdefault(store.group, []).append("elementwise, as one tensor")
                continue
            for piece in store.pieces:
                name = names[piece.parameter]
                if algorithm == "adamw":
                    layout = ShardLayout(global_shape=tuple(piece.parameter.shape), group=store.ranks, device=device)
                else:
                    layout = ShardLayout(
                        global_shape=tensor_parallel.whole_shape(piece.parameter, name),
                        blocks=tensor_parallel.blocks(piece.parameter, name, tensor_parallel_group),
                        span=(piece.start, piece.stop),
                        group=holders(store.ranks),
                        device=device,
                    )
                self._add(store, piece, name, layout, layouts)
                reasons.setdefault(store.group, []).append("as DeepSpeed's group says")
        self._order = sorted(self._members)
        options = [
            {
                **{key: groups[i][key] for key in GROUP_KEYS[groups[i]["algorithm"]] - {"params", "param_names"} if key in groups[i]},
                "params": self._members[i],
                "reasons": reasons[i],
            }
            for i in self._order
        ]
        self.optimizer = _Steps(options, layouts=layouts, ns_steps=5)
        self._link_state()

    def _add(self, store: Store, piece: Piece | None, name: str, layout: ShardLayout, layouts: dict[str, ShardLayout]) -> None:
        view = nn.Parameter(self._of(store, piece, store.tensor.detach()))
        self._views.append((store, piece, view, name))
        self._members.setdefault(store.group, []).append((name, view))
        layouts[name] = layout

    @staticmethod
    def _of(store: Store, piece: Piece | None, tensor: Tensor) -> Tensor:
        """A piece's part of a tensor that is laid out as its store."""
        if not store.flat or piece is None:
            return tensor
        return tensor[piece.offset : piece.offset + piece.stop - piece.start]

    def mismatch(self) -> str:
        """What is wrong with where DeepSpeed says the pieces lie, by their values; "" where all is right."""
        for store, piece, _, _ in self._views:
            for held in store.pieces if piece is None else (piece,):
                ours = self._of(store, held, store.tensor.detach()).reshape(-1)
                theirs = held.values()
                if ours.numel() != theirs.numel() or not torch.equal(ours.to(theirs.device, theirs.dtype), theirs):
                    return (
                        f"{self._names[held.parameter]} has other values than its piece of DeepSpeed's "
                        f"{tuple(store.tensor.shape)} tensor of group {store.group}, at {held.offset}. Either the piece lies elsewhere, "
                        "or the model's weights were changed after deepspeed.initialize without the optimizer's refresh_fp32_params()"
                    )
        return ""

    def _link_state(self) -> None:
        """Point the views at their stores' state, where DeepSpeed may have put other tensors since."""
        for store, piece, view, name in self._views:
            kept, ours = self._state[store.tensor], self.optimizer.state[view]
            for key in ours.keys() - {"spectrum"}:
                ours[key] = kept[key] if key == "step" else self._of(store, piece, kept[key])
            if name in self._spectra and ours.get("spectrum") is not self._spectra[name]:
                ours["spectrum"] = self._spectra[name]
                self.optimizer._signature = None  # its controllers work on other rows

    def step(self, groups: Sequence[dict[str, Any]], verdict: Tensor | None) -> None:
        """Step what the stores hold by their gradients, with the hyperparameters of all `groups` as they are now."""
        self._link_state()
        for i, group in zip(self._order, self.optimizer.param_groups, strict=True):
            group.update({key: groups[i][key] for key in GROUP_KEYS[group["algorithm"]] - STRUCTURE})
        for store, piece, view, _ in self._views:
            view.data = self._of(store, piece, store.tensor.data)
            view.grad = None if store.tensor.grad is None else self._of(store, piece, store.tensor.grad)
        self.optimizer.verdict = verdict
        self.optimizer.step()
        for _, _, view, name in self._views:
            view.grad = None
            rows = self.optimizer.state[view].get("spectrum")
            if rows is not None:
                self._spectra[name] = rows
        if verdict is not None:
            for store in self.stores:
                if groups[store.group]["algorithm"] == "muon":  # AdamW counts by itself
                    self._state[store.tensor]["step"] += verdict

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        return self.optimizer.schedules

    def collect(self) -> None:
        """Write measurements that are under way into the spectra."""
        self.optimizer._collect_measurements()
