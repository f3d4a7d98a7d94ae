"""DeepSpeed's own Muon on the model of the other tests, and whole parameters of any engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.muon import original_muon
from torch import Tensor, nn

from .. import deepspeed_hosts as hosts

SETTINGS = {"lr": 0.5, "adam_lr": 1e-2, "momentum": 0.95, "weight_decay": 0.0, "torch_adam": True}


def config(stage: int, *, params: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    # on a CPU its Newton–Schulz takes half precision, whose noise would hide what is looked for
    original_muon.ns_compute_dtype = lambda ns_method="gram": torch.float32
    result = hosts.config(stage, **more)
    result["optimizer"] = {"type": "Muon", "params": {**SETTINGS, **(params or {})}}
    result.setdefault("gradient_clipping", 0.0)
    if stage == 3:
        result["zero_optimization"]["reduce_scatter"] = False  # it asks for that
    return result


def whole(engine: Any) -> dict[str, Tensor]:
    """Every parameter as the model has it, by name."""
    result = {}
    for name, p in engine.module.named_parameters():
        if hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p]):
                result[name] = p.detach().float().clone()
        else:
            result[name] = p.detach().float().clone()
    return result


def change(ds_config: dict[str, Any], steps: int = 1, model: nn.Module | None = None) -> dict[str, Tensor]:
    """What training makes of every matrix that Muon has."""
    engine = hosts.start(ds_config, model)
    before = whole(engine)
    for k in range(steps):
        hosts.train_step(engine, k)
    after = whole(engine)
    return {name: after[name] - before[name] for name in sorted(hosts.MATRICES)}


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The worst relative difference of any matrix."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def size(update: dict[str, Tensor]) -> float:
    return sum(float(t.square().sum()) for t in update.values()) ** 0.5
