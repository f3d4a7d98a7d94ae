"""Parameter groups: what a user passes in, checked and completed, one algorithm and one matrix view per group."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .polar.matrix_view import MatrixView, matrices_of
from .polar.newton_schulz import dtype_named
from .polar.polynomials import Schedule, schedule_for
from .polar.products import SymmetricProducts, check_kernels, products_on
from .polar.scaling import update_scale
from .roles import says_nothing
from .routing import ALGORITHMS, Route, refuse_flattened, route_parameter
from .rules import RULES, matrix_rule, rule_of
from .sharding.layout import ShardLayout
from .sharding.owners import PLACEMENTS
from .spectrum.policy import Policy

# Keys that describe a group itself; a loaded state dict never changes them.
STRUCTURE = frozenset({"params", "param_names", "name", "algorithm", "rule", "reasons", "kind", "split", "transpose"})
# What only ns_steps="adaptive" takes; None stands for the default of `Policy`.
POLICY_KEYS = frozenset({"accuracy", "coverage", "tol", "min_ns_steps", "max_ns_steps", "measure_every", "burn_in", "noise_floor"})
MUON_KEYS = frozenset(
    {"lr", "weight_decay", "momentum", "nesterov", "ns_steps", "polynomial", "deflation", "adjust_lr_fn", "compute_dtype", "wire_dtype"}
    | {"eps", "extra_scale_factor"}
    | POLICY_KEYS
)
ADAMW_KEYS = frozenset({"lr", "weight_decay", "betas", "eps"})
GROUP_KEYS = {"muon": STRUCTURE | MUON_KEYS, "adamw": STRUCTURE - {"kind", "split", "transpose", "rule"} | ADAMW_KEYS}
RULE_KEYS = frozenset(key for rule in RULES.values() for key in rule.hyperparameters)  # of one rule or another
# What other libraries call a group's keys
MISNOMERS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "steps": "ns_steps",
    "num_ns_steps": "ns_steps",
    "epsilon": "eps",
    "beta": "momentum",
    "mu": "momentum",
    "use_muon": "algorithm",
    "adam_betas": "betas",
    "adam_eps": "eps",
}
NOT_OF_GROUPS = frozenset({"process_group", "layouts", "nonfinite", "telemetry_dir", "telemetry_sinks", "amsgrad", "maximize"})
SCHEDULER_KEYS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})  # written by LR schedulers


def read_groups(params: Iterable[Any], defaults: Mapping[str, Any], layouts: Mapping[str, ShardLayout]) -> list[dict[str, Any]]:
    """Groups of one algorithm and one matrix view each, complete with hyperparameters.

    Args:
        params: parameters, (name, parameter) pairs, or dicts whose "params" are either.
        defaults: the optimizer's arguments.
        layouts: name -> layout; where there is one, its shape routes the parameter.

    Raises:
        ValueError: nothing to optimise, a key or value that no algorithm takes, or a parameter that can't be routed.
    """
    _check_arguments(defaults)
    if isinstance(params, (set, frozenset)):
        raise ValueError("params is a set, whose order differs between ranks and runs; pass a list")
    if isinstance(params, Tensor):
        raise ValueError("params is a single tensor; pass an iterable of parameters, of (name, parameter), or of groups")
    items = list(params)
    if not items:
        raise ValueError("the optimizer got no parameters")
    given = items if all(isinstance(item, dict) for item in items) else [{"params": items}]
    groups = []
    for group in given:
        groups.extend(_read_group(group, defaults, layouts))
    for group in groups:
        check_group(group)
    return groups


def _read_group(group: Mapping[str, Any], defaults: Mapping[str, Any], layouts: Mapping[str, ShardLayout]) -> list[dict[str, Any]]:
    if "params" not in group:
        raise ValueError(f"a parameter group is a dict with 'params', got keys {sorted(group)}")
    members = group["params"]
    if isinstance(members, (set, frozenset)):
        raise ValueError("the parameters of a group are a set, whose order differs between ranks and runs; pass a list")
    members = [members] if isinstance(members, Tensor) else list(members)
    if not members and group.get("algorithm") is None:
        raise ValueError("a parameter group is empty and names no algorithm: leave it out, or say which")
    named: list[tuple[str, Tensor]] = []
    for k, member in enumerate(members):
        name, p = member if isinstance(member, tuple) and len(member) == 2 else ("", member)
        if not isinstance(p, Tensor) or not isinstance(name, str):
            raise ValueError(f"a parameter is a tensor or a (name, tensor) pair, got {type(p).__name__} in a group's place {k}")
        if p.is_complex():
            raise ValueError(f"{name or f'parameter {k}'} is complex, which MuonDist does not take; use its real view")
        named.append((name or (group.get("param_names") or [""] * len(members))[k], p))
    refuse_flattened(named)
    refuse_duplicates(name for name, _ in named)

    algorithm = group.get("algorithm")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: choose 'muon' or 'adamw'")
    options = {k: v for k, v in group.items() if k not in ("params", "param_names", "algorithm", "reasons")}
    rule = matrix_rule(options.get("rule", defaults["rule"]))
    _refuse_unknown(set(options), {algorithm} if algorithm else set(ALGORITHMS), defaults, rule.hyperparameters)
    reasons = group.get("reasons")
    parts: dict[tuple[str, MatrixView | None], dict[str, Any]] = {}
    if not named and algorithm is not None:  # an empty group stays, so that schedulers find as many as were given
        parts[(algorithm, MatrixView() if algorithm == "muon" else None)] = {"params": [], "reasons": []}
    for k, (name, p) in enumerate(named):
        shape = layouts[name].global_shape if name in layouts else tuple(p.shape)
        route = route_parameter(name, p, algorithm=algorithm, shape=shape)
        if route.view is not None:
            asked = {key: options[key] for key in ("kind", "split", "transpose") if options.get(key) is not None}
            view = MatrixView(**{"kind": route.view.kind, **_plain(asked)})
            matrices_of(shape, view, name or "a parameter")  # sizes that don't add up are said here
            route = Route(name=name, algorithm="muon", reason=route.reason, view=view)
        if algorithm is None and route.algorithm == "muon" and says_nothing(name, shape):
            _warn_of_name(name, shape)
        part = parts.setdefault((route.algorithm, route.view), {"params": [], "reasons": []})
        part["params"].append((name, p) if name else p)
        part["reasons"].append(reasons[k] if reasons else route.reason)
    _refuse_unknown(set(options), {algorithm for algorithm, _ in parts}, defaults, rule.hyperparameters)
    return [_complete(part, *key, options, defaults) for key, part in parts.items()]


@functools.cache
def _warn_of_name(name: str, shape: Sequence[int]) -> None:
    """Once for each."""
    warnings.warn(
        f"{name!r} of shape {tuple(shape)} could be an embedding or an output head by its name alone, and goes to Muon. Where modules are "
        "known they decide: MuonDist(build_param_groups(model), ...) instead of model.named_parameters()",
        stacklevel=6,
    )


def _refuse_unknown(keys: set[str], algorithms: set[str], arguments: Iterable[str], own: Iterable[str]) -> None:
    """Raise for keys that mean something elsewhere, or are all but one that is known; others are a user's own, and are kept."""
    known = set(own).union(*(GROUP_KEYS[a] for a in algorithms)) - {"params", "param_names", "algorithm", "reasons"}
    elsewhere = set().union(*GROUP_KEYS.values(), RULE_KEYS, PLAN_KEYS, arguments, NOT_OF_GROUPS)
    for key in sorted(keys - known - SCHEDULER_KEYS):
        meant = MISNOMERS.get(key) or next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)), None)
        if key in elsewhere or meant is not None:
            hint = f"did you mean {meant!r}?" if meant is not None else f"it takes {sorted(known)}"
            raise ValueError(f"a parameter group for {' and '.join(sorted(algorithms))} does not take {key!r}: {hint}")


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    split = asked.get("split")
    return {**asked, **({"split": tuple(split)} if isinstance(split, Sequence) and not isinstance(split, str) else {})}


def _complete(
    part: dict[str, Any], algorithm: str, view: MatrixView | None, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """One group with every hyperparameter of its algorithm; the user's options win over the optimizer's arguments."""
    prefix = "muon" if algorithm == "muon" else "adam"
    own = defaults[f"{prefix}_lr"]
    complete: dict[str, Any] = {**part, "algorithm": algorithm, "lr": defaults["lr"] if own is None else own}
    if algorithm == "muon":
        assert view is not None
        complete.update({key: defaults[key] for key in MUON_KEYS - {"lr"}})
        complete.update(kind=view.kind, split=view.split, transpose=view.transpose)
        rule = options.get("rule", defaults["rule"])
        if rule != "muon":  # torch.distributed.checkpoint refuses a checkpoint that lacks a key of a group, and old ones lack this one
            complete["rule"] = rule
        own_options = (defaults["rule_options"] or {}) if rule == defaults["rule"] else {}
        complete.update({**rule_of(complete).hyperparameters, **own_options})
    else:
        decay = defaults["adam_weight_decay"]
        complete.update(
            weight_decay=defaults["weight_decay"] if decay is None else decay, betas=defaults["adam_betas"], eps=defaults["adam_eps"]
        )
    complete.update({k: v for k, v in options.items() if k not in ("kind", "split", "transpose", "rule")})
    if isinstance(complete["lr"], Tensor):  # a scheduler writes into it, for each group by itself
        complete["lr"] = complete["lr"].clone()
    if algorithm == "adamw":
        complete["betas"] = tuple(complete["betas"]) if isinstance(complete["betas"], list) else complete["betas"]
    return complete


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raise where a name stands for two parameters; "" is no name."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"several parameters are called {twice[0]!r}: names tell parameters apart on all ranks, give each its own")


def align_group(group: dict[str, Any], known: Mapping[Tensor, tuple[str, str]]) -> None:
    """Bring a group's names and reasons in step with its "params", which a user may edit and a host may replace.

    `known` has the names and reasons of parameters that were seen before. Others take over the place of the one they replace.
    """
    members, names, reasons = group["params"], list(group.get("param_names") or ()), list(group["reasons"])
    told = [known.get(p) for p in members]
    if len(members) == len(reasons) and all(t is None or t == (*(names[k : k + 1] or [""]), reasons[k]) for k, t in enumerate(told)):
        return
    named = names if len(names) == len(members) else [""] * len(members)
    because = reasons if len(reasons) == len(members) else ["added to its group"] * len(members)
    pairs = [(named[k], because[k]) if t is None else t for k, t in enumerate(told)]
    taken = Counter(t[0] for t in told if t is not None)
    pairs = [("", reason) if t is None and taken[name] else (name, reason) for t, (name, reason) in zip(told, pairs, strict=True)]
    group["reasons"] = [reason for _, reason in pairs]
    if "param_names" in group:
        group["param_names"] = [name for name, _ in pairs]


def view_of(group: Mapping[str, Any]) -> MatrixView | None:
    """How the parameters of a complete group are read as matrices; None where they are not."""
    if group["algorithm"] != "muon":
        return None
    return MatrixView(kind=group["kind"], split=group["split"], transpose=group["transpose"])


def group_routes(group: Mapping[str, Any]) -> list[tuple[Route, Tensor]]:
    """Each parameter of a group with its route, in order."""
    view, members = view_of(group), group["params"]
    names = group.get("param_names") or [""] * len(members)
    return [
        (Route(name=name, algorithm=group["algorithm"] if p.requires_grad else "frozen", reason=reason, view=view), p)
        for name, reason, p in zip(names, group["reasons"], members, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Those arguments of `MuonDist` that are of no group: how matrices travel, who works on them, and how they are multiplied.

    Raises:
        ValueError: a value that can't be met.
    """

    bucket_mb: float = 64
    placement: str = "owner"
    symmetric_kernels: int | None = None

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement={self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        if isinstance(self.bucket_mb, bool) or not isinstance(self.bucket_mb, (int, float)) or not self.bucket_mb > 0:
            raise ValueError(f"bucket_mb must be a positive number of MiB, got {self.bucket_mb!r}")
        check_kernels(self.symmetric_kernels)

    @property
    def bucket_bytes(self) -> int:
        return int(self.bucket_mb * 2**20)

    def products_on(self, device_type: str) -> SymmetricProducts:
        """How symmetric products are taken on a kind of device.

        Raises:
            ValueError: not as asked for.
        """
        return products_on(device_type, self.symmetric_kernels)


PLAN_KEYS = tuple(field.name for field in fields(PlanOptions))


def _check_number(key: str, given: Any, high: float = math.inf) -> None:
    value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < high:
        raise ValueError(f"{key} must be a number in [0, {high}), got {given!r}")


def _check_betas(key: str, betas: Any) -> None:
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in betas):
        raise ValueError(f"{key} must be two numbers in [0, 1), got {betas!r}")


def _check_arguments(defaults: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the argument as it was given, before groups take it over under another name."""
    for key in ("lr", "weight_decay", "eps", "adam_eps"):
        _check_number(key, defaults[key])
    for key in ("muon_lr", "adam_lr", "adam_weight_decay"):
        if defaults[key] is not None:
            _check_number(key, defaults[key])
    _check_betas("adam_betas", defaults["adam_betas"])
    own, given = matrix_rule(defaults["rule"]).hyperparameters, defaults["rule_options"]
    if given is not None and (not isinstance(given, Mapping) or not set(given) <= set(own)):
        takes = f"has {', '.join(sorted(own))}" if own else "has none"
        raise ValueError(f"rule_options={given!r}: a mapping of the rule's own hyperparameters, and {defaults['rule']!r} {takes}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise a ValueError for a hyperparameter outside its range."""

    def number(key: str, high: float = math.inf) -> None:
        _check_number(key, group[key], high)

    number("lr")
    number("weight_decay")
    number("eps")
    if group["algorithm"] == "adamw":
        _check_betas("betas", group["betas"])
        return
    number("momentum", 1)
    rule_of(group).check(group)
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"nesterov must be True or False, got {group['nesterov']!r}")
    if policy_of(group) is None:
        fixed_schedule(group)
    update_scale(group["adjust_lr_fn"], 1, 1)
    number("extra_scale_factor")
    dtype_named(group["compute_dtype"], "compute_dtype")
    if dtype_named(group["wire_dtype"], "wire_dtype") == torch.float16:
        raise ValueError("wire_dtype can't be fp16: momentum of any size travels, and fp16 can't hold it. Use bf16 or fp32")


def policy_of(group: Mapping[str, Any]) -> Policy | None:
    """What a Muon group asked of adaptive step counts; None where its steps are fixed.

    Raises:
        ValueError: a value outside its range, or one that only adaptive step counts take beside fixed ones.
    """
    given = {key: group[key] for key in sorted(POLICY_KEYS) if group.get(key) is not None}
    if group["ns_steps"] != "adaptive":
        if given:
            raise ValueError(
                f"{', '.join(given)} only work with ns_steps='adaptive', but ns_steps is {group['ns_steps']!r}: give one or the other"
            )
        return None
    if "noise_floor" in given:
        given["floor"] = given.pop("noise_floor")
    if group["polynomial"] is not None:
        given["polynomial"] = group["polynomial"]
    return Policy(**given, deflation=group.get("deflation"))


def fixed_schedule(group: Mapping[str, Any]) -> Schedule | None:
    """The schedule of a group whose steps are fixed; None where they adapt."""
    if group["ns_steps"] == "adaptive":
        return None
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ValueError(f"ns_steps must be 'adaptive' or an integer, got {steps!r}")
    schedule = schedule_for("jordan" if group["polynomial"] is None else group["polynomial"], steps)
    return dataclasses.replace(schedule, deflation=0 if group.get("deflation") is None else group["deflation"])
