"""How MuonDist gets into Megatron: where an optimizer is asked for, and where flags are read.

Megatron builds optimizers in `get_megatron_optimizer` and parses its command line in `parse_args`; both names are taken over wherever
they were imported. Everything else asks the original.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from .arguments import ASKED, add_muon_dist_args
from .optimizer import build_wrappers, get_muon_dist_optimizer
from .settings import NAME, completed


def register() -> None:
    """Make `optimizer="muon_dist"` known to `get_megatron_optimizer`, and our flags to Megatron's command line where it is installed."""
    importlib.import_module("megatron.core.optimizer")
    _replace("get_megatron_optimizer", build_wrappers, _get_megatron_optimizer)
    try:  # megatron-core 0.16 comes without it
        found = importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        found = False
    if found:
        original = importlib.import_module("megatron.training.arguments").parse_args
        importlib.import_module("megatron.training")  # the modules that import it by name
        if not hasattr(original, "with_muon_dist"):
            _replace("parse_args", original, _with_flags(original))


def _replace(name: str, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron.") and module.__dict__.get(name) is original:
            setattr(module, name, replacement)


def _with_flags(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse_args)
    def with_flags(extra_args_provider: Callable[[Any], Any] | None = None, *args: Any, **options: Any) -> Any:
        def provider(parser: Any) -> Any:
            return add_muon_dist_args(parser if extra_args_provider is None else extra_args_provider(parser))

        return parse_args(provider, *args, **options)

    with_flags.with_muon_dist = True  # type: ignore[attr-defined]
    return with_flags


@functools.wraps(build_wrappers)
def _get_megatron_optimizer(config: Any, model_chunks: Any, *args: Any, **options: Any) -> Any:
    source = _command_line()
    if config.optimizer == NAME or (config.optimizer == "adam" and getattr(source, ASKED, False)):
        return get_muon_dist_optimizer(completed(config, source), model_chunks, *args, **options)
    return build_wrappers(config, model_chunks, *args, **options)


def _command_line() -> Any:
    """Megatron's parsed flags; None where its training loop is not in use."""
    module = sys.modules.get("megatron.training.global_vars")
    try:
        return None if module is None else module.get_args()
    except AssertionError:  # not parsed
        return None
