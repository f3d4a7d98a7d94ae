"""State dicts of this optimizer and of torch's, read for the groups that an optimizer has now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .groups import POLICY_KEYS, STRUCTURE
from .polar.coefficients import JORDAN
from .roles import WRAPPERS


def translate_state(state_dict: Mapping[str, Any], current: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A state dict with complete groups, from this optimizer's or from `torch.optim.Muon`'s and `torch.optim.AdamW`'s.

    Hyperparameters come from the state dict, the structure of the groups from the current optimizer. Where both sides have the names of
    all parameters these tell which state is whose; else it is the order.

    Raises:
        ValueError: other groups or parameters, state of another algorithm, or an option of another optimizer that can't be honoured.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(current):
        raise ValueError(
            f"the state dict has {len(saved_groups)} parameter groups, this optimizer {len(current)}: build it with the same groups"
        )
    saved_groups = _by_name(saved_groups, current)
    groups = []
    for k, (saved, own) in enumerate(zip(saved_groups, current, strict=True)):
        saved = dict(saved)
        _refuse_other_algorithm(k, saved, own, state_dict["state"])
        if "ns_coefficients" in saved:  # torch.optim.Muon
            triple = tuple(saved.pop("ns_coefficients"))
            saved["polynomial"] = "jordan" if triple == JORDAN else triple
        for key in ("amsgrad", "maximize"):
            if saved.pop(key, False):
                raise ValueError(f"group {k} was saved with {key}=True, which MuonDist does not have")
        for key in ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            saved.pop(key, None)
        if (
            own["algorithm"] == "muon" and saved.get("ns_steps", own["ns_steps"]) != "adaptive"
        ):  # what only adaptive steps take was saved, or isn't there
            own = {**own, **dict.fromkeys(POLICY_KEYS & set(own))}
        structure = {key: own[key] for key in STRUCTURE - {"params"} if key in own}
        groups.append({**own, **saved, **structure, "params": saved["params"]})
    return {**state_dict, "param_groups": groups}


def _refuse_other_algorithm(k: int, saved: Mapping[str, Any], own: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    algorithm = own["algorithm"]
    entries = [state[i] for i in saved["params"] if i in state]
    foreign = "exp_avg" if algorithm == "muon" else "momentum_buffer"
    if algorithm == "muon" and saved.get("rule", "muon") != own.get("rule", "muon"):
        raise ValueError(
            f"group {k} was saved with rule={saved.get('rule', 'muon')!r}, but this optimizer's is {own.get('rule', 'muon')!r}, which "
            "keeps other state. Build the optimizer as it was saved, or start this one without its state, from the model's weights alone"
        )
    as_saved = saved.get("algorithm", algorithm)
    if any(foreign in entry for entry in entries) or (algorithm == "muon" and "betas" in saved):
        as_saved = "adamw" if algorithm == "muon" else "muon"
    if as_saved != algorithm:
        raise ValueError(
            f"group {k} was saved for {as_saved!r}, but this optimizer gives it to {algorithm!r}, whose state means something else. Build "
            f"the optimizer as it was saved, or start this one without its state, from the model's weights alone"
        )


def _by_name(saved_groups: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The saved groups in the order of the current ones, and in each the parameters; as they are where one side lacks names."""
    ours, theirs = ([_names(group) for group in groups] for groups in (current, saved_groups))
    if not all(map(_complete, ours, current)) or not all(map(_complete, theirs, saved_groups)):
        return list(saved_groups)
    place = {name: (group, i) for group, names in enumerate(theirs) for i, name in enumerate(names)}
    wanted = {name for names in ours for name in names}
    unlike = sorted(wanted ^ place.keys())
    if unlike:
        where = "this optimizer does not have" if unlike[0] in place else "the state dict does not have"
        raise ValueError(
            f"{where} {unlike[0]}{f' and {len(unlike) - 1} other parameters' if len(unlike) > 1 else ''} of the other. Build the optimizer "
            "with the same parameters; where only their names have changed, take 'param_names' out of the state dict's groups"
        )
    if len(place) != sum(map(len, theirs)):
        return list(saved_groups)
    result: list[Mapping[str, Any]] = []
    for k, names in enumerate(ours):
        source = place[names[0]][0] if names else k
        if any(place[name][0] != source for name in names) or len(theirs[source]) != len(names):
            raise ValueError(f"the parameters of group {k} were in several groups when they were saved: build the optimizer with the same")
        group = saved_groups[source]
        result.append({**group, "params": [group["params"][place[name][1]] for name in names]})
    return result


def _names(group: Mapping[str, Any]) -> list[str]:
    """Without what wrappers put into them; the first part is DistributedDataParallel's."""
    plain = (name.removeprefix("module.").split(".") for name in group.get("param_names") or ())
    return [".".join(part for part in parts if part not in WRAPPERS) for parts in plain]


def _complete(names: Sequence[str], group: Mapping[str, Any]) -> bool:
    return len(names) == len(group["params"]) and all(names)
