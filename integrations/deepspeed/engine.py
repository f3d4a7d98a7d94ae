"""How MuonDist gets into DeepSpeed: a name in torch.optim, a place on its list, and a word with every engine that is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils

import muon_dist

from .optimizer import DeepSpeedMuonDist, building
from .settings import rates_per_group, refuse_unsupported

# What "type" may be in a config
SPELLINGS = ("MuonDist", "muondist", "Muondist", "MUONDIST", "muon_dist", "Muon_Dist", "MUON_DIST", "muon-dist", "Muon-Dist")


def register() -> None:
    """Make `"type": "MuonDist"` known to DeepSpeed. Nothing happens the second time.

    Raises:
        ImportError: a DeepSpeed that is built differently.
    """
    if getattr(torch.optim, "MuonDist", None) is DeepSpeedMuonDist:
        return
    original = getattr(DeepSpeedEngine, "_configure_optimizer", None)
    if original is None or not hasattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS"):
        raise ImportError(f"muon_dist was tested with DeepSpeed 0.19.8; deepspeed {deepspeed.__version__} takes optimizers in another way")
    for spelling in SPELLINGS:
        setattr(torch.optim, spelling, DeepSpeedMuonDist)  # DeepSpeed looks optimizers up there
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedMuonDist)
    DeepSpeedEngine._configure_optimizer = _told(original)
    DeepSpeedEngine.get_mom = _with_momentum(DeepSpeedEngine.get_mom)


def untag(module: torch.nn.Module) -> None:
    """Take away the tags by which DeepSpeed applies its own Muon to the gradients of any optimizer that has "muon" in its name."""
    for p in module.parameters():
        if hasattr(p, "use_muon"):
            del p.use_muon


def _with_momentum(get_mom: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed reports "betas" of every group, and 0 for one without."""

    @functools.wraps(get_mom)
    def with_momentum(engine: Any) -> Any:
        if isinstance(getattr(engine, "basic_optimizer", None), DeepSpeedMuonDist):
            return [group["momentum"] if group["algorithm"] == "muon" else group["betas"] for group in engine.optimizer.param_groups]
        return get_mom(engine)

    return with_momentum


def _told(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if isinstance(client_optimizer, muon_dist.MuonDist):
            raise ValueError(
                "deepspeed.initialize got muon_dist.MuonDist, which doesn't know DeepSpeed. Use muon_dist.integrations.deepspeed.MuonDist"
            )
        if isinstance(client_optimizer, DeepSpeedMuonDist):
            refuse_unsupported(engine._config)
            untag(engine.module)  # before the wrapper looks
            engine._config.zero_force_ds_cpu_optimizer = False  # that rule is for Adam
        with building(engine):
            original(engine, client_optimizer, model_parameters)
        optimizer = engine.basic_optimizer
        if isinstance(optimizer, DeepSpeedMuonDist):
            untag(engine.module)
            optimizer.attach(engine)
            rates = rates_per_group(engine.scheduler_name(), engine.scheduler_params(), optimizer.rate_ratios())
            engine._config.scheduler_params = rates

    return configure_optimizer
