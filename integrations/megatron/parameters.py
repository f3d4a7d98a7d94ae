"""Every parameter of a rank's model: where it goes and why, and where its pieces lie among the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from muon_dist.rendezvous import gather_objects, meet
from muon_dist.routing import Route, as_patterns, matches, route_parameter
from muon_dist.sharding.layout import ShardLayout

from ..host_views import all_holders
from .layout import EXPERT, WholeParameter, cut_dimension, fused_rows, model_parameters, whole_parameter
from .settings import MuonDistSettings


@dataclass(frozen=True, kw_only=True)
class Described:
    """A parameter of this rank's model, and what becomes of it. `numel`: of the whole parameter."""

    name: str
    parameter: Tensor
    route: Route
    layout: Callable[[int, int], ShardLayout]  # from the elements of its tensor that a rank stores
    split: tuple[int, ...] | None
    numel: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Megatron's process groups that matter here, by its names."""

    tp: Any
    pp: Any
    ep: Any
    dp_cp: Any
    expt_tp: Any
    expt_dp: Any


def groups_of(given: ProcessGroupCollection | None) -> Groups:
    collection = ProcessGroupCollection.use_mpu_process_groups() if given is None else given
    found = {name: getattr(collection, name, None) for name in ("tp", "pp", "ep", "dp_cp", "expt_tp", "expt_dp")}
    if found["dp_cp"] is None:  # Megatron takes it so where there is no context parallelism
        found["dp_cp"] = getattr(collection, "dp", None)
    missing = [name for name, group in found.items() if group is None]
    if missing:
        raise ValueError(
            f"pg_collection has no {', '.join(missing)}: MuonDist must know who shares parameters. Set them, of one rank if need be"
        )
    return Groups(**found)


def current_device() -> torch.device:
    """Where Megatron's collectives want their tensors."""
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe(model_chunks: Sequence[nn.Module], config: MuonDistSettings, groups: Groups) -> dict[Tensor, Described]:
    """Every trainable parameter of this rank's model: its route, and its layout from the elements that a rank stores. Collective."""
    expert_parallel = groups.ep
    parameters = list(
        model_parameters(model_chunks, expert_rank=dist.get_rank(expert_parallel), expert_ranks=dist.get_world_size(expert_parallel))
    )
    asked = _asked([name for name, *_ in parameters], config)
    made: dict[tuple[int, ...], Any] = {}
    holders: dict[bool, Any] = {}
    result = {}
    for name, p, module_config, module in parameters:
        expert = not getattr(p, "allreduce", True)
        tensor_parallel, data_parallel = (groups.expt_tp, groups.expt_dp) if expert else (groups.tp, groups.dp_cp)
        if getattr(p, "is_gtp_weight_remat", False):
            raise ValueError(f"{name} is sharded by generalised tensor parallelism (GTP), which MuonDist does not support")
        route = _route(name, p, module, asked.get(name))
        dim = cut_dimension(p, module)
        ranks = 1 if dim is None else dist.get_world_size(tensor_parallel)
        if route.algorithm == "adamw":
            layout, split = _elementwise(tuple(p.shape), data_parallel), None
        else:
            if expert not in holders:
                holders[expert] = all_holders(data_parallel, tensor_parallel, made)
            if dim is not None and not expert and EXPERT.search(name) and dist.get_world_size(groups.expt_tp) != ranks:
                raise ValueError(
                    f"{name} is cut over {dist.get_world_size(groups.expt_tp)} expert-tensor-parallel ranks, but this megatron-core takes "
                    f"it for a dense parameter of {ranks}: set expert_tensor_parallel_size to the tensor-parallel size, or use expert "
                    "parallelism"
                )
            fused = fused_rows(
                name, p, module_config, tensor_parallel=ranks, split_qkv=config.muon_split_qkv, split_fc1=config.muon_split_fc1
            )
            rank = dist.get_rank(tensor_parallel) if ranks > 1 else 0
            whole = whole_parameter(name, p, fused, dim=dim or 0, rank=rank, ranks=ranks)
            layout, split = _fragment(whole, holders[expert]), whole.split
        result[p] = Described(name=name, parameter=p, route=route, layout=layout, split=split, numel=ranks * p.numel())
    return result


def _elementwise(shape: tuple[int, ...], group: Any) -> Callable[[int, int], ShardLayout]:
    return lambda start, stop: ShardLayout(global_shape=shape, span=(start, stop), group=group)


def _fragment(whole: WholeParameter, group: Any) -> Callable[[int, int], ShardLayout]:
    return lambda start, stop: ShardLayout(global_shape=whole.shape, blocks=whole.blocks, span=(start, stop), group=group)


def _route(name: str, p: Any, module: nn.Module, asked: tuple[str, str] | None) -> Route:
    """Where a parameter goes: what was asked for; else matrices to Muon as in Megatron's own, but for embeddings of any kind."""
    if asked is not None:
        route = route_parameter(name, p, algorithm=asked[0])
        return Route(name=name, algorithm=route.algorithm, reason=f"asked for by {asked[1]!r}", view=route.view)
    if getattr(p, "is_embedding_or_output_parameter", False):
        return Route(name=name, algorithm="adamw", reason="embedding or output head, as Megatron marks it")
    if getattr(p, "use_muon", True) is False:
        return Route(name=name, algorithm="adamw", reason="use_muon is False, as Megatron marks it")
    if p.ndim != 2:
        return Route(name=name, algorithm="adamw", reason=f"{p.ndim}-D: not a matrix")
    return route_parameter(name, p, module=module)


def _asked(names: Sequence[str], config: MuonDistSettings) -> dict[str, tuple[str, str]]:
    """What the patterns ask for: name -> (algorithm, pattern). Collective: a pattern may match on another pipeline stage only.

    Raises:
        ValueError: a pattern that matches nothing on any rank, or two that match one name.
    """
    patterns = [
        (kind, pattern)
        for kind, flag in (("muon", "muon_params"), ("adamw", "muon_adamw_params"))
        for pattern in as_patterns(getattr(config, flag), flag)
    ]
    if not patterns:
        return {}
    hits = {pattern: [name for name in names if matches(pattern, name)] for _, pattern in patterns}
    anywhere = torch.tensor([bool(hits[pattern]) for _, pattern in patterns], dtype=torch.int32, device=current_device())
    meet(range(dist.get_world_size()))
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    result: dict[str, tuple[str, str]] = {}
    for (algorithm, pattern), hit in zip(patterns, anywhere.tolist(), strict=True):
        if not hit:
            raise ValueError(f"the pattern {pattern!r} matches no trainable parameter. Names look like {', '.join(names[:4])}")
        for name in hits[pattern]:
            if name in result:
                raise ValueError(f"{name} is matched by {result[name][1]!r} and by {pattern!r}: make the patterns disjoint")
            result[name] = (algorithm, pattern)
    return result


def whole_model(described: Iterable[Described], groups: Groups) -> tuple[list[str], int]:
    """The names of all Muon's parameters and the elements of all parameters, over pipeline stages and experts. Collective."""
    sizes: dict[str, int] = {}
    muon: set[str] = set()
    for each in described:
        sizes[each.name] = each.numel
        if each.route.algorithm == "muon":
            muon.add(each.name)
    for group in (groups.pp, groups.ep):
        if dist.get_world_size(group) > 1:
            told = gather_objects((sizes, muon), group)
            sizes = {name: numel for theirs, _ in told for name, numel in theirs.items()}
            muon = {name for _, theirs in told for name in theirs}
    return sorted(muon), sum(sizes.values())
