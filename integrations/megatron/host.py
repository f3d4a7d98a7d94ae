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

import torch.distributed as dist

from .arguments import ASKED, add_muon_dist_args, was_asked_for
from .inside import FOREIGN
from .optimizer import build_wrappers, building_wrappers, get_muon_dist_optimizer, megatrons
from .settings import NAME, completed


def register() -> None:
    """Make `optimizer="muon_dist"` known to `get_megatron_optimizer`, and our flags to Megatron's command line where it is installed."""
    core: Any = importlib.import_module("megatron.core.optimizer")
    if not hasattr(core._get_param_groups_and_buffers, "with_muon_dist"):
        core._get_param_groups_and_buffers = _refusing(core._get_param_groups_and_buffers)
    _replace("get_megatron_optimizer", megatrons, _get_megatron_optimizer)
    checkpoints: Any = importlib.import_module("megatron.core.dist_checkpointing")
    if not hasattr(checkpoints.load, "with_muon_dist"):
        checkpoints.load = _explaining(checkpoints.load)
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
    """Also where a script has imported it by its name already."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def _refusing(collect: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's own factory calls this to collect parameters; a trainer that imported the factory before us asks it for MuonDist."""

    @functools.wraps(collect)
    def refusing(*args: Any, **options: Any) -> Any:
        config = options["config"] if "config" in options else args[2]
        if not building_wrappers() and (config.optimizer == NAME or (config.optimizer == "adam" and was_asked_for())):
            raise ValueError(
                "--optimizer muon_dist was asked for, but Megatron's own get_megatron_optimizer was called, which would make an Adam: it "
                "was imported by name before MuonDist was registered. Import muon_dist.integrations.megatron before that import, or call "
                "muon_dist.integrations.megatron.get_muon_dist_optimizer"
            )
        return collect(*args, **options)

    refusing.with_muon_dist = True  # type: ignore[attr-defined]
    return refusing


def _explaining(load: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's loading of sharded checkpoints, whose KeyError of a tensor's name doesn't say what is wrong with optimizer state."""

    @functools.wraps(load)
    def explaining(*args: Any, **options: Any) -> Any:
        try:
            return load(*args, **options)
        except BaseException as error:  # torch's CheckpointException is no Exception
            failures = getattr(error, "failures", None) or {}
            told = [error, *(each[0] if isinstance(each, tuple) else each for each in failures.values())]
            if any("optimizer.state.momentum_buffer" in str(each) and isinstance(each, KeyError) for each in told):
                raise ValueError(FOREIGN) from error
            raise

    explaining.with_muon_dist = True  # type: ignore[attr-defined]
    return explaining


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
        optimizer = get_muon_dist_optimizer(completed(config, source), model_chunks, *args, **options)
        if source is not None and dist.get_rank() == 0:  # beside Megatron's dump of its arguments, of which some are not MuonDist's
            print(optimizer.summary(), flush=True)
        return optimizer
    return build_wrappers(config, model_chunks, *args, **options)


def _command_line() -> Any:
    """Megatron's parsed flags; None where its training loop is not in use."""
    module = sys.modules.get("megatron.training.global_vars")
    try:
        return None if module is None else module.get_args()
    except AssertionError:  # not parsed
        return None
