"""The groups of a DeepSpeed optimizer: what the engine's model tells of every parameter, and experts by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from muon_dist.routing import as_patterns, build_param_groups, matches

from .tensor_parallel import local_shape, whole_shape


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    items = list(params)
    return [dict(item) for item in items] if items and all(isinstance(item, dict) for item in items) else [{"params": items}]


def groups_by_name(engine: Any, params: Iterable[Any], patterns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups in which the engine's model tells every parameter's name, route and reading as matrices."""
    model = engine.module
    names = {p: name for name, p in model.named_parameters()}
    shapes = {name: whole_shape(p, name) for p, name in names.items()}
    asked = dict(patterns)
    taken = [*as_patterns(asked.get("muon"), "muon"), *as_patterns(asked.get("adamw"), "adamw")]
    symbols = [name for name in _symbol_weights(model) if not any(matches(pattern, name) for pattern in taken)]
    asked["adamw"] = [*as_patterns(asked.get("adamw"), "adamw"), *map(_exactly, symbols)]
    routed = {}
    for group in build_param_groups(model, shapes=shapes, **asked):
        view: dict[str, Any] = {key: group[key] for key in ("kind", "split", "transpose") if key in group}
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True):
            routed[name] = (group["algorithm"], view, reason)
    result: list[dict[str, Any]] = []
    for group in as_groups(params):
        options = {key: value for key, value in group.items() if key != "params"}
        parts: dict[Any, dict[str, Any]] = {}
        for member in group["params"]:
            p = member[1] if isinstance(member, tuple) else member
            if p not in names:
                raise ValueError(f"a parameter of shape {local_shape(p)} in model_parameters does not belong to the model")
            if not p.requires_grad:
                continue
            algorithm, view, reason = routed[names[p]]
            if "algorithm" in options:
                algorithm, view, reason = options["algorithm"], {}, "asked for"
            part = parts.setdefault(
                (algorithm, tuple(view.items())), {**options, **view, "algorithm": algorithm, "params": [], "reasons": []}
            )
            part["params"].append((names[p], p))
            part["reasons"].append(reason)
        result += parts.values()
    return result


def _exactly(name: str) -> str:
    """A pattern that matches this name alone, brackets and all."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name) if any(c in "*?[" for c in name) else f"[{name[0]}]{name[1:]}"


def _symbol_weights(model: nn.Module) -> list[str]:
    """The weights of AutoTP's embeddings and output heads, which are not torch's classes any more."""
    from deepspeed.module_inject import layers

    kinds = tuple(
        getattr(layers, kind)
        for kind in ("EmbeddingLayer", "VocabParallelEmbedding", "HiddenParallelEmbedding", "VocabParallelLinear", "LmHeadLinearAllreduce")
        if hasattr(layers, kind)
    )
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "weight", None) is not None
    ]


def split_experts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in which experts are by themselves, each expert-parallel size with its name, as DeepSpeed's wrappers expect."""
    result = []
    for group in groups:
        parts: dict[str | None, dict[str, Any]] = {}
        for name, reason, p in zip(group["param_names"], group["reasons"], group["params"], strict=True):
            expert = None if getattr(p, "allreduce", True) else p.group_name
            part = parts.setdefault(expert, {**group, "params": [], "param_names": [], "reasons": []})
            part["params"].append(p)
            part["param_names"].append(name)
            part["reasons"].append(reason)
        for expert, part in parts.items():
            result.append(part if expert is None else {**part, "moe": True, "name": expert})
    return result
