"""Where Megatron's optimizer wrappers keep their pieces of parameters, and how the one with flat buffers saves momentum.

A wrapper replaces the parameters in its optimizer's groups by tensors of its own: fp32 copies, or with the distributed optimizer
shards of them, cut where the data-parallel ranks meet in a buffer. Written for megatron-core 0.16.1 and 0.19.2; private
attributes of the wrappers are read only here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor in a wrapper's groups: elements [start, stop) of a parameter's flattened tensor on this rank.

    `values` returns what the model has there, 1-D.
    """

    parameter: Tensor
    tensor: Tensor
    start: int
    stop: int
    group: int
    values: Callable[[], Tensor]


def pieces(wrapper: Any) -> list[Piece]:
    """What a wrapper steps on this rank, in the order of its groups.

    Raises:
        ValueError: a wrapper that is not known here.
    """
    if isinstance(wrapper, DistributedOptimizer):
        halves = (
            (wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
            (wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups),
        )
        found = []
        for models, shards in halves:
            for group, (parameters, tensors) in enumerate(zip(models, shards, strict=True)):
                for p, tensor in zip(parameters, tensors, strict=True):
                    held = wrapper._get_model_param_range_map(p)["param"]
                    found.append(_piece(p, tensor, held.start, held.end, group))
        return sorted(found, key=lambda piece: piece.group)
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        originals = {id(p.main_param): p for group in wrapper.float16_groups for p in group}
    elif isinstance(wrapper, FP32Optimizer):
        originals = {}
    else:
        raise ValueError(f"Megatron wraps the optimizer in {type(wrapper).__name__}, which MuonDist does not know")
    return [
        whole_piece(originals.get(id(tensor), tensor), tensor, group, numel=tensor.numel())
        for group, options in enumerate(wrapper.optimizer.param_groups)
        for tensor in options["params"]
    ]


def whole_piece(p: Tensor, tensor: Tensor, group: int, *, numel: int) -> Piece:
    """The first `numel` elements of a parameter: all of it, or nothing."""
    return _piece(p, tensor, 0, numel, group)


def _piece(p: Tensor, tensor: Tensor, start: int, stop: int, group: int) -> Piece:
    def values() -> Tensor:
        return p.detach().reshape(-1)[start:stop]

    return Piece(parameter=p, tensor=tensor, start=start, stop=stop, group=group, values=values)


def absent(wrapper: Any, present: Sequence[Piece]) -> list[Tensor]:
    """The parameters of a wrapper of which nothing lies on this rank."""
    if not isinstance(wrapper, DistributedOptimizer):
        return []
    here = {id(piece.parameter) for piece in present}
    return [p for buffer in wrapper.buffers for p in buffer.params if id(p) not in here]


class FlatBuffers(DistributedOptimizer):
    """Megatron's distributed optimizer around MuonDist: its checkpoints hold AdamW's two averages for every parameter.

    Momentum is saved as `exp_avg`, beside an `exp_avg_sq` of zeros for the parameters that Muon trains.
    """

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        main, state = self._main_param_and_state(model_param)
        if "momentum_buffer" in state:
            zeros = torch.zeros(main.shape, dtype=main.dtype, device="cpu")
            return {"param": main, "exp_avg": state["momentum_buffer"], "exp_avg_sq": zeros}
        return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        main, state = self._main_param_and_state(model_param)
        main.copy_(tensors["param"])
        if "momentum_buffer" in state:
            state["momentum_buffer"].copy_(tensors["exp_avg"])
        else:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(tensors[key])

    def _main_param_and_state(self, model_param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group, place = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][place]
        return main, self.optimizer.state[main]
