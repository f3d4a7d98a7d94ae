"""What stands in a DeepSpeed config: the optimizer's "params", and settings of DeepSpeed that MuonDist refuses or completes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from muon_dist.groups import PLAN_KEYS, PlanOptions

from .. import settings

# What DeepSpeed decides, or what has no meaning under it
_NOT_HERE = {
    "params": "the model's parameters come from deepspeed.initialize",
    "layouts": "DeepSpeed tells where pieces lie",
    "process_group": "DeepSpeed tells who shares parameters",
    "replicate_momentum": "DeepSpeed keeps and saves the state",
    "nonfinite": "DeepSpeed decides which steps are left out",
}


def read_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's arguments and the patterns of `build_param_groups`, from what a config or a caller gave.

    Raises:
        ValueError: a key that nothing takes, with the nearest one that is taken, or a habit of DeepSpeed that can't be met.
    """
    arguments, patterns = settings.read_settings(given, _NOT_HERE, "DeepSpeed")
    complete = {**{k: v for k, v in settings.DEFAULTS.items() if k not in _NOT_HERE}, **arguments}
    with settings.naming(settings.names_given(given)):
        plan_options(complete)  # raises
    return complete, patterns


def plan_options(arguments: Mapping[str, Any]) -> PlanOptions:
    """Those of the optimizer's arguments that decide the plan."""
    return PlanOptions(**{key: arguments[key] for key in PLAN_KEYS})


def _offload(config: Any) -> Any:
    return config.zero_config.offload_optimizer


# (what is refused, whether a config asks for it, why)
REFUSED: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    (
        "zenflow",
        lambda c: c.zero_config.zenflow is not None,
        "it updates some columns of a matrix now and others later, so there is no momentum of a whole matrix",
    ),
    (
        "zero_hpz_partition_size > 1",
        lambda c: c.zero_config.zero_hpz_partition_size > 1,
        "ZeRO++'s secondary partitions are untested with it",
    ),
    (
        "zero_quantized_weights, zero_quantized_nontrainable_weights or zero_quantized_gradients",
        lambda c: (
            c.zero_config.zero_quantized_weights
            or c.zero_config.zero_quantized_gradients
            or c.zero_config.zero_quantized_nontrainable_weights
        ),
        "ZeRO++'s quantised communication is untested with it",
    ),
    (
        "an optimizer on NVMe",
        lambda c: _offload(c) is not None and _offload(c).device == "nvme",
        'matrices would be read from disk in every step. Use "device": "cpu"',
    ),
    (
        "parameters on NVMe",
        lambda c: c.zero_config.offload_param is not None and c.zero_config.offload_param.device == "nvme",
        "it is untested with it",
    ),
    (
        "offload_optimizer.ratio below 1",
        lambda c: _offload(c) is not None and _offload(c).ratio < 1,
        "the part that stays on the accelerator would be stepped by DeepSpeed's own AdamW",
    ),
    (
        "offload_optimizer.super_offload",
        lambda c: _offload(c) is not None and getattr(_offload(c), "super_offload", False),
        "it steps Adam in a process of its own",
    ),
    (
        "elastic_checkpoint",
        lambda c: c.zero_config.elastic_checkpoint,
        "it does not carry the spectra. Use a universal checkpoint to change the world size",
    ),
    (
        "bf16_master_weights_and_grads",
        lambda c: c.bfloat16_config.bf16_master_weights_and_grads,
        "an update is smaller than what bf16 masters can hold",
    ),
    (
        "fp16_master_weights_and_grads",
        lambda c: c.float16_config.fp16_master_weights_and_grads,
        "an update is smaller than what fp16 masters can hold",
    ),
    ("compile.deepcompile", lambda c: c.compile_config.deepcompile, "it moves pieces behind the optimizer's back"),
    (
        "expert_parallel (AutoEP)",
        lambda c: getattr(getattr(c, "expert_parallel_config", None), "enabled", False),
        "it is untested with it. DeepSpeed's MoE layers are supported",
    ),
    (
        "torch_autocast in fp16",
        lambda c: (
            c.torch_autocast_enabled and str(c.torch_autocast_dtype).endswith("float16") and "bfloat16" not in str(c.torch_autocast_dtype)
        ),
        "its loss scaler steps every group by itself. Use bf16",
    ),
)


def refuse_unsupported(config: Any) -> None:
    """Raise a ValueError for settings of DeepSpeed under which the update would be wrong, or was never seen to be right."""
    for setting, asked, reason in REFUSED:
        if asked(config):
            raise ValueError(f"MuonDist does not support {setting}: {reason}")


# Schedulers that write one absolute learning rate into every group
_ABSOLUTE_RATES = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr"),
    "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr"),
    "LRRangeTest": ("lr_range_test_min_lr",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}


def rates_per_group(scheduler: str | None, params: Mapping[str, Any] | None, ratios: list[float]) -> dict[str, Any] | None:
    """A scheduler's params with every learning rate as a list, one per group: the given rate times the group's ratio.

    A list that the user gave is left as it is, and so are schedulers that scale the rates they find.
    """
    if scheduler not in _ABSOLUTE_RATES or params is None:
        return None if params is None else dict(params)
    result = dict(params)
    if scheduler == "WarmupDecayLR":
        result.setdefault("warmup_max_lr", 1e-3)  # DeepSpeed's default, which it would write into every group
    for key in _ABSOLUTE_RATES[scheduler]:
        if isinstance(result.get(key), (int, float)):
            result[key] = [result[key] * ratio for ratio in ratios]
    return result
