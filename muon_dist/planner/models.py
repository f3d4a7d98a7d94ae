"""Models as the command line knows them: a config in configs/models/, or a module that can be imported."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..optimizer import MuonDist
from ..routing import Route, build_param_groups


@dataclass(frozen=True, kw_only=True)
class ModelParameter:
    """A parameter's name and whole shape, its route, and how tensor parallelism would cut it.

    `cut` is the dimension that tensor-parallel ranks share, or None; `shards` limits the pieces, since key and value heads
    can't be cut finer than they are.
    """

    name: str
    shape: tuple[int, ...]
    route: Route
    cut: int | None = None
    shards: int | None = None


def model_parameters(model: str) -> list[ModelParameter]:
    """The parameters of a model config (a path that ends in .json) or of an importable module ("package.module:Class").

    Raises:
        ValueError: no such file or module, or a config that lacks something.
    """
    return _from_config(Path(model)) if model.endswith(".json") else _from_module(model)


def active_share(model: str, parameters: Sequence[ModelParameter]) -> float:
    """The share of a model's parameters that a token passes through: below 1 where a config has experts."""
    config = json.loads(Path(model).read_text()) if model.endswith(".json") else {}
    if not config.get("num_experts"):
        return 1.0
    numels = {p.name: math.prod(p.shape) for p in parameters}
    experts = sum(numel for name, numel in numels.items() if ".experts." in name)
    return 1 - experts / sum(numels.values()) * (1 - config["num_experts_per_tok"] / config["num_experts"])


def _from_config(path: Path) -> list[ModelParameter]:
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"can't read the model config {path}: {error}") from error
    return parameters_of(config, str(path))


def parameters_of(config: dict[str, Any], path: str) -> list[ModelParameter]:
    """The parameters of a model config; `path` is what errors call it.

    Raises:
        ValueError: a config that lacks something.
    """
    architectures = {"llama": _llama, "gpt": _gpt}
    if config.get("architecture") not in architectures:
        raise ValueError(f"{path}: 'architecture' must be one of {sorted(architectures)}, got {config.get('architecture')!r}")
    try:
        entries = architectures[config["architecture"]](config)
    except KeyError as error:
        raise ValueError(f"{path}: the config lacks {error}") from error
    groups = [{"params": [(name, nn.Parameter(torch.empty(shape, device="meta")))], **options} for name, shape, options, _ in entries]
    routes = {route.name: route for route in MuonDist(groups).routes}
    return [ModelParameter(name=name, shape=shape, route=routes[name], **cut) for name, shape, _, cut in entries]


Entry = tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]


def _llama(c: dict[str, Any]) -> list[Entry]:
    """Names and shapes of Hugging Face's LlamaForCausalLM; with `num_experts`, mixtures of experts after `num_dense_layers` layers."""
    hidden, inner, kv_heads = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"]
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, kv_heads * head
    entries: list[Entry] = [("model.embed_tokens.weight", (c["vocab_size"], hidden), {}, {"cut": 0})]
    for k in range(c["num_hidden_layers"]):
        at = f"model.layers.{k}"
        entries += [
            (f"{at}.self_attn.q_proj.weight", (q, hidden), {}, {"cut": 0}),
            (f"{at}.self_attn.k_proj.weight", (kv, hidden), {}, {"cut": 0, "shards": kv_heads}),
            (f"{at}.self_attn.v_proj.weight", (kv, hidden), {}, {"cut": 0, "shards": kv_heads}),
            (f"{at}.self_attn.o_proj.weight", (hidden, q), {}, {"cut": 1}),
            *(_gated(f"{at}.mlp", hidden, inner) if k < c.get("num_dense_layers", 0) or not c.get("num_experts") else _experts(at, c)),
            (f"{at}.input_layernorm.weight", (hidden,), {}, {}),
            (f"{at}.post_attention_layernorm.weight", (hidden,), {}, {}),
        ]
    entries.append(("model.norm.weight", (hidden,), {}, {}))
    if not c.get("tie_word_embeddings", False):
        entries.append(("lm_head.weight", (c["vocab_size"], hidden), {}, {"cut": 0}))
    return entries


def _gated(at: str, hidden: int, inner: int) -> list[Entry]:
    return [
        (f"{at}.gate_proj.weight", (inner, hidden), {}, {"cut": 0}),
        (f"{at}.up_proj.weight", (inner, hidden), {}, {"cut": 0}),
        (f"{at}.down_proj.weight", (hidden, inner), {}, {"cut": 1}),
    ]


def _experts(at: str, c: dict[str, Any]) -> list[Entry]:
    """A layer's router, its experts as stacks, which tensor-parallel ranks share by whole experts, and the experts that all tokens take."""
    experts, hidden, inner = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
    shared = c.get("num_shared_experts", 0) * inner
    return [
        (f"{at}.mlp.gate.weight", (experts, hidden), {"algorithm": "adamw"}, {}),
        (f"{at}.mlp.experts.gate_up_proj", (experts, 2 * inner, hidden), {"split": (inner, inner)}, {"cut": 0, "shards": experts}),
        (f"{at}.mlp.experts.down_proj", (experts, hidden, inner), {}, {"cut": 0, "shards": experts}),
        *(_gated(f"{at}.mlp.shared_experts", hidden, shared) if shared else []),
    ]


def _gpt(c: dict[str, Any]) -> list[Entry]:
    """Names and shapes of the GPT in launch/train_gpt.py."""
    d = c["hidden_size"]
    entries: list[Entry] = [("wte.weight", (c["vocab_size"], d), {}, {"cut": 0}), ("wpe.weight", (c["max_position_embeddings"], d), {}, {})]
    for k in range(c["num_hidden_layers"]):
        at = f"blocks.{k}"
        entries += [
            (f"{at}.norm1.weight", (d,), {}, {}),
            (f"{at}.attn.qkv.weight", (3 * d, d), {"split": (d, d, d)}, {"cut": 0}),
            (f"{at}.attn.proj.weight", (d, d), {}, {"cut": 1}),
            (f"{at}.norm2.weight", (d,), {}, {}),
            (f"{at}.mlp.up.weight", (4 * d, d), {}, {"cut": 0}),
            (f"{at}.mlp.down.weight", (d, 4 * d), {}, {"cut": 1}),
        ]
    return [*entries, ("norm.weight", (d,), {}, {}), ("lm_head.weight", (c["vocab_size"], d), {}, {"cut": 0})]


def _from_module(path: str) -> list[ModelParameter]:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        raise ValueError(f"{path!r} is neither a .json config nor a module path such as 'package.module:Class'")
    if os.getcwd() not in sys.path:  # a user's own modules, as `python -m` finds them
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"can't import {path!r}: {error}") from error
    try:
        with torch.device("meta"):
            config_class = getattr(factory, "config_class", None)  # Hugging Face models are built from their default config
            model = factory(config_class()) if config_class is not None else factory()
    except Exception as error:  # whatever a user's module raises, it is about that module
        raise ValueError(
            f"{path!r} can't be called without arguments: {type(error).__name__}: {error}. Point to a function that returns the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path!r} gives {type(model).__name__}, not a torch.nn.Module")
    routes = {route.name: route for route in MuonDist(build_param_groups(model)).routes}
    frozen = Route(name="", algorithm="frozen", reason="requires_grad is False")
    return [ModelParameter(name=name, shape=tuple(p.shape), route=routes.get(name, frozen)) for name, p in model.named_parameters()]
