"""Settings as hosts' configs have them: keys and values of `MuonDist` in a user's words, and errors that name what was given."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import muon_dist
from muon_dist.groups import MISNOMERS

# What muon_dist.MuonDist takes, with its defaults
DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(muon_dist.MuonDist.__init__).parameters.items()
    if p.default is not inspect.Parameter.empty
}

# build_param_groups' own
PATTERNS = ("muon", "adamw", "split", "transpose")
# Names that users of AdamW write, and ours
RENAMED = {"betas": "adam_betas", "eps": "adam_eps", "muon_eps": "eps"}
# Habits that are met anyway with these values
_MET = {"torch_adam": (True, False), "adam_w_mode": (True,), "fp32_optimizer_states": (True,), "foreach": (True, None)}
# Other optimizers' own
_FOREIGN = {
    "ns_method": "it chooses a code path of DeepSpeed's own Muon. Remove it",
    "max_grad_norm": "clipping is the host's: use its setting for that",
    "bias_correction": "AdamW is always bias-corrected. Remove it",
}


def read_settings(given: Mapping[str, Any], not_here: Mapping[str, str], host: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's arguments and the patterns of `build_param_groups`, from what a config or a caller gave.

    "betas" and "eps" are AdamW's, as everywhere; "muon_eps" is the smallest norm that Muon divides by.

    Args:
        not_here: keys that the host decides -> why.
        host: its name, for errors.

    Raises:
        ValueError: a key that nothing takes, with the nearest one that is taken, or a habit that can't be met.
    """
    arguments: dict[str, Any] = {}
    patterns: dict[str, Any] = {}
    refused = {**_FOREIGN, **not_here}
    known = (set(DEFAULTS) - set(refused) - {"eps"}) | set(RENAMED) | set(PATTERNS) | set(_MET)
    for key, value in given.items():
        if key in refused:
            raise ValueError(f'MuonDist under {host} does not take "{key}": {refused[key]}')
        if key not in known:
            meant = MISNOMERS.get(key)
            near = [meant] if meant in known else difflib.get_close_matches(key, sorted(known), n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"it takes {', '.join(sorted(known))}"
            raise ValueError(f'MuonDist does not take "{key}": {hint}')
        if key in _MET:
            if value not in _MET[key]:
                raise ValueError(f"\"{key}\": {value!r} can't be met: MuonDist's other half is AdamW with fp32 state. Remove it")
        elif key in PATTERNS:
            patterns[key] = value
        else:
            name = RENAMED.get(key, key)
            if name in arguments:
                raise ValueError(f'"{key}" and "{name}" say the same: give one')
            arguments[name] = tuple(value) if name == "adam_betas" and isinstance(value, list) else value  # JSON has no tuples
    polynomial = arguments.get("polynomial")
    if isinstance(polynomial, list):
        arguments["polynomial"] = tuple(tuple(step) if isinstance(step, list) else step for step in polynomial)
    return arguments, patterns


def names_given(given: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of `MuonDist` -> what they were called in what was given, where that differs."""
    return {name: f'"{key}"' for key, name in RENAMED.items() if key in given}


@contextmanager
def naming(given: Mapping[str, str]) -> Iterator[None]:
    """Errors about an argument of `MuonDist` name the setting of the host that was given: `given` maps one to the other."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        first = text.replace("=", " ", 1).split(" ", 1)[0].rstrip(":")
        if first not in given:
            raise
        raise ValueError(given[first] + text[len(first) :]) from None
