"""What a Megatron user sets: a dataclass with fields for everything, how it reads as MuonDist's arguments, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from torch import nn

from muon_dist.groups import PLAN_KEYS, POLICY_KEYS, PlanOptions
from muon_dist.polar.coefficients import PUBLISHED, Coefficients

from ..settings import naming

NAME = "muon_dist"
# Fields whose default here is not that of Megatron's flag; the command line tells in GIVEN which of them were given.
TOLD_APART = ("muon_num_ns_steps", "muon_coefficient_type", "muon_tp_mode")
GIVEN = "muon_given"
PRECISIONS = ("low", "medium", "high", "highest")


@dataclass
class MuonDistSettings(OptimizerConfig):
    """Megatron's `OptimizerConfig` with what MuonDist takes beside it. The command line fills it from `--muon-*` flags.

    Fields that Megatron's Muon has keep their meaning; those below without a comment are described in `muon_dist.MuonDist`.
    """

    optimizer: str = NAME
    muon_num_ns_steps: int | str = "adaptive"  # type: ignore[assignment]  # or a number; 5 is Megatron's
    muon_nesterov: bool = False
    muon_coefficient_type: str | None = None  # type: ignore[assignment]  # None: "quintic" for a number of steps, generated ones for adaptive
    muon_tp_mode: str | None = None  # type: ignore[assignment]  # only Megatron's own Muon has modes
    muon_split_fc1: bool = True  # gate and up of a gated MLP are matrices of their own
    muon_lr: float | None = None  # learning rate of Muon's matrices while that of all others is lr; both follow the schedule
    muon_accuracy: str | None = None
    muon_coverage: float | None = None
    muon_tol: float | None = None
    muon_min_ns_steps: int | None = None
    muon_max_ns_steps: int | None = None
    muon_measure_every: int | None = None
    muon_burn_in: int | None = None
    muon_noise_floor: float | None = None
    muon_deflation: int | None = None
    muon_rule: str = "muon"
    muon_rule_options: dict[str, Any] | None = None
    muon_wire_dtype: str | None = None
    muon_bucket_mb: float = 64
    muon_placement: str = "owner"  # or "gram", "auto"
    muon_symmetric_kernels: int | None = None  # rows from which a Triton kernel takes symmetric products
    muon_params: Sequence[str] = field(default_factory=tuple)  # patterns of names that go to Muon whatever the rules say
    muon_adamw_params: Sequence[str] = field(default_factory=tuple)  # … and to AdamW
    muon_telemetry_dir: str | None = None
    muon_telemetry_sinks: Sequence[str] = field(default_factory=tuple)


# The coefficients that Megatron has, by its names
COEFFICIENTS = {row.megatron: row for row in PUBLISHED if row.megatron is not None}

# Arguments of `MuonDist` -> the flags that set them, for errors
FLAGS = {
    **{
        key: f"--muon-{key.replace('_', '-')}"
        for key in (*sorted(POLICY_KEYS), *PLAN_KEYS, "momentum", "nesterov", "deflation", "wire_dtype", "rule", "rule_options")
    },
    "ns_steps": "--muon-num-ns-steps",
    "extra_scale_factor": "--muon-extra-scale-factor",
    "floor": "--muon-noise-floor",
    "adam_betas": "--adam-beta1 and --adam-beta2",
    "adam_eps": "--adam-eps",
    "lr": "--lr",
    "weight_decay": "--weight-decay",
}

# Megatron's scales in ours: (adjust_lr_fn, what it is multiplied by)
SCALES = {
    "spectral": ("match_rms_adamw", 5.0),  # √max(out, in); "match_rms_adamw" is a fifth of it
    "unit_rms_norm": ("spectral", 1.0),  # √(out/in)
    "shape_scaling": ("original", 1.0),  # √max(1, out/in)
}


def coefficients(name: str, steps: int) -> tuple[Coefficients, ...]:
    """The first `steps` coefficients of a set, as Megatron's Muon takes them.

    Raises:
        ValueError: an unknown set, or fewer than one step.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"muon_coefficient_type={name!r}: choose one of {', '.join(COEFFICIENTS)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"muon_num_ns_steps must be a positive integer or 'adaptive', got {steps!r}")
    return COEFFICIENTS[name].first(steps)


def plan_options(config: MuonDistSettings) -> PlanOptions:
    """Those of the settings that decide the plan."""
    return PlanOptions(**{key: getattr(config, f"muon_{key}") for key in PLAN_KEYS})


def arguments(config: Any) -> dict[str, Any]:
    """What `muon_dist.MuonDist` is given for a config: learning rates aside, which Megatron's groups hold.

    Raises:
        ValueError: a setting of Megatron's Muon that MuonDist can't honour.
    """
    steps, name = config.muon_num_ns_steps, config.muon_coefficient_type
    if config.muon_scale_mode not in SCALES:
        raise ValueError(f"muon_scale_mode={config.muon_scale_mode!r}: choose one of {', '.join(SCALES)}")
    if steps == "adaptive":
        if name not in (None, "simple"):
            raise ValueError(
                f"muon_coefficient_type={name!r} is for a fixed muon_num_ns_steps: adaptive steps take generated coefficients "
                "(leave it out) or 'simple'"
            )
        polynomial: Any = None if name is None else "jordan"
    else:
        polynomial, steps = coefficients("quintic" if name is None else name, steps), 5  # a list says its own length
    precision = config.muon_fp32_matmul_prec
    if precision not in PRECISIONS:
        raise ValueError(f"muon_fp32_matmul_prec={precision!r}: choose 'low' or 'medium' (bf16 on a GPU), 'high' or 'highest'")
    with naming(FLAGS):
        plan_options(config)  # raises
    adjust, factor = SCALES[config.muon_scale_mode]
    return {
        "momentum": config.muon_momentum,
        "nesterov": bool(config.muon_nesterov or getattr(config, "muon_use_nesterov", False)),  # its name in 0.16
        "ns_steps": steps,
        "polynomial": polynomial,
        "adjust_lr_fn": adjust,
        "extra_scale_factor": factor * config.muon_extra_scale_factor,
        "compute_dtype": None if precision in ("low", "medium") else "fp32",
        "wire_dtype": config.muon_wire_dtype,
        "adam_betas": (config.adam_beta1, config.adam_beta2),
        "adam_eps": config.adam_eps,
        "accuracy": config.muon_accuracy,
        "coverage": config.muon_coverage,
        "tol": config.muon_tol,
        "min_ns_steps": config.muon_min_ns_steps,
        "max_ns_steps": config.muon_max_ns_steps,
        "measure_every": config.muon_measure_every,
        "burn_in": config.muon_burn_in,
        "noise_floor": config.muon_noise_floor,
        "deflation": config.muon_deflation,
        "rule": config.muon_rule,
        "rule_options": config.muon_rule_options,
    }


# (what is refused, whether it is asked for by (config, the first chunk's ddp_config, its model config), why)
REFUSED: tuple[tuple[str, Callable[[Any, Any, Any], Any], str], ...] = (
    (
        "muon_tp_mode",
        lambda c, d, m: c.muon_tp_mode is not None,
        "the update is that of the whole matrix at any tensor-parallel size. Leave it out",
    ),
    (
        "muon_use_syrk",
        lambda c, d, m: getattr(c, "muon_use_syrk", False),
        "it chooses a kernel of Megatron's Muon. --muon-symmetric-kernels ROWS is MuonDist's",
    ),
    (
        "muon_scalar_optimizer other than adam",
        lambda c, d, m: getattr(c, "muon_scalar_optimizer", "adam") != "adam",
        "what Muon doesn't take goes to AdamW",
    ),
    ("decoupled_weight_decay=False", lambda c, d, m: not c.decoupled_weight_decay, "its weight decay is decoupled, as AdamW's"),
    ("Megatron-FSDP", lambda c, d, m: getattr(d, "use_megatron_fsdp", False), "use the distributed optimizer"),
    (
        "models that Megatron's DistributedDataParallel doesn't wrap, such as torch FSDP2",
        lambda c, d, m: d is None or type(d).__name__.startswith("TorchFullySharded"),
        "it gives the distributed optimizer its buffers. muon_dist.MuonDist takes FSDP2's parameters, outside Megatron",
    ),
    ("optimizer_cpu_offload", lambda c, d, m: c.optimizer_cpu_offload, "momentum would be where Megatron's hybrid Adam keeps it"),
    (
        "use_precision_aware_optimizer",
        lambda c, d, m: c.use_precision_aware_optimizer,
        "its masters live inside Transformer Engine's FusedAdam",
    ),
    ("optimizer_cuda_graph", lambda c, d, m: getattr(c, "optimizer_cuda_graph", False), "steps of adaptive length can't be replayed"),
    (
        "use_layer_wise_distributed_optimizer",
        lambda c, d, m: getattr(c, "use_layer_wise_distributed_optimizer", False),
        "use the distributed optimizer (--use-distributed-optimizer), which shards momentum evenly",
    ),
    (
        "fp8 or fp4 parameters",
        lambda c, d, m: getattr(d, "fp8_param_gather", False) or getattr(m, "fp8_param", False) or getattr(m, "fp4_param", False),
        "it is untested with it. fp8 matrix products with bf16 parameters are no concern of the optimizer's",
    ),
    (
        "interleaved gate and up of experts with muon_split_fc1",
        lambda c, d, m: (
            c.muon_split_fc1
            and (
                getattr(m, "moe_mlp_glu_interleave_size", None) is not None
                or getattr(m, "moe_shared_expert_glu_interleave_size", None) is not None
            )
        ),
        "their rows alternate in blocks. Take them as one matrix: --muon-no-split-fc1",
    ),
    (
        "grad_norm_skip_threshold",
        lambda c, d, m: math.isfinite(getattr(c, "grad_norm_skip_threshold", math.inf)),
        "ranks without parameters don't leave a step out with the others, who would be waited for",
    ),
    (
        "qk_clip with the distributed optimizer",
        lambda c, d, m: getattr(m, "qk_clip", False) and c.use_distributed_optimizer,
        "Megatron clips whole masters, of which each rank has a piece. Leave out --use-distributed-optimizer",
    ),
    ("use_mup", lambda c, d, m: getattr(m, "use_mup", False), "Megatron would scale learning rates as for Adam"),
    ("use_kitchen", lambda c, d, m: getattr(m, "use_kitchen", False), "its layers don't say how gate and up are cut"),
)


def refuse_unsupported(config: Any, model_chunks: Sequence[nn.Module]) -> None:
    """Raise a ValueError for settings of Megatron under which the update would be wrong, or was never seen to be right."""
    ddp, model = getattr(model_chunks[0], "ddp_config", None), getattr(model_chunks[0], "config", None)
    for setting, asked, reason in REFUSED:
        if asked(config, ddp, model):
            raise ValueError(f"MuonDist does not support {setting} in Megatron: {reason}")


def completed(config: Any, source: Any = None) -> MuonDistSettings:
    """A `MuonDistSettings` from Megatron's own config and, for our fields, the namespace of its command line.

    Where MuonDist's default is another than Megatron's, Megatron's default counts as not given.
    """
    if isinstance(config, MuonDistSettings):
        return config
    names = {f.name for f in dataclasses.fields(MuonDistSettings)}
    kept = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name in names and f.init and not (f.name in TOLD_APART and getattr(config, f.name) == f.default)
    }
    unsaid = set(TOLD_APART) - set(getattr(source, GIVEN, ()))
    own = {name: getattr(source, name) for name in names - unsaid if name.startswith("muon_") and hasattr(source, name)}
    result = MuonDistSettings(**{**kept, **own})
    for name, value in vars(config).items():  # what it learned since, such as timers
        if name not in own and name not in TOLD_APART:
            setattr(result, name, value)
    result.optimizer = NAME
    return result
