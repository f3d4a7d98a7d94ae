"""MuonDist as Megatron sees an optimizer: the chain of its wrappers, and how it is made.

Megatron builds its wrappers itself, as for Adam; then the Adam inside each is replaced. So clipping, loss scales, zero counting,
parameter groups, schedulers and checkpoints are Megatron's own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from muon_dist.polar.polynomials import Schedule
from muon_dist.rendezvous import gather_objects
from muon_dist.routing import Route
from muon_dist.sharding.plan import Plan
from muon_dist.spectrum.policy import ACCURACY
from muon_dist.telemetry import Telemetry
from muon_dist.version import __version__ as version

from ..host_views import not_finite
from .inside import FOREIGN, SAVED, WrappedMuonDist, merged
from .parameters import Groups, current_device, describe, groups_of, whole_model
from .settings import MuonDistSettings, arguments, completed, refuse_unsupported
from .wrappers import FlatBuffers

megatrons = megatron_optimizer.get_megatron_optimizer  # its own, also after `register`
_building = 0


def building_wrappers() -> bool:
    """Whether Megatron builds wrappers for us, or for another optimizer that was asked of us."""
    return _building > 0


@functools.wraps(megatrons)
def build_wrappers(*args: Any, **options: Any) -> Any:
    global _building
    _building += 1
    try:
        return megatrons(*args, **options)
    finally:
        _building -= 1


class MuonDistOptimizer(ChainedOptimizer):
    """Megatron's chain of wrappers (dense parameters, experts), each with MuonDist inside. Made by `get_muon_dist_optimizer`.

    A gradient that is not finite leaves the step out on all ranks and for all wrappers, state included, as a loss scaler does;
    `step` then returns False, and `skipped_steps` counts it.
    """

    def __init__(
        self, chained_optimizers: list[Any], groups: Groups, routes: list[Route], config: MuonDistSettings, given: Mapping[str, Any]
    ) -> None:
        super().__init__(chained_optimizers)
        self._groups, self._config, self._given = groups, config, given
        self.inside: list[WrappedMuonDist] = [o.optimizer for o in chained_optimizers if isinstance(o.optimizer, WrappedMuonDist)]
        self.routes = routes  # of every parameter of this rank's model, with the reason
        self.skipped_steps = 0

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        """The shape and the schedule of every matrix that this rank's ranks share, by name. Empty before the first step."""
        return {name: found for inside in self.inside for name, found in inside.schedules.items()}

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        """As `muon_dist.MuonDist.plans`, of all wrappers. Empty before the first step."""
        return [plan for inside in self.inside for plan in inside.plans]

    @property
    def skipped_updates(self) -> int:
        """As `muon_dist.MuonDist.skipped_updates`. Waits for the device."""
        return sum(inside.skipped_updates for inside in self.inside)

    def summary(self) -> str:
        """What really trains the model, in a few lines: routes by kind, steps, placement. Of this rank's part of it."""
        given, config = self._given, self._config
        kinds: dict[tuple[str, str], int] = {}
        for route in self.routes:
            kinds[route.algorithm, route.reason] = kinds.get((route.algorithm, route.reason), 0) + 1
        lines = [
            f"{count:6} {'Muon' if algorithm == 'muon' else 'AdamW':6} {reason}" for (algorithm, reason), count in sorted(kinds.items())
        ]
        if given["ns_steps"] == "adaptive":
            bounds = [
                f"{key} {given[key]}" for key in ("accuracy", "coverage", "tol", "min_ns_steps", "max_ns_steps") if given[key] is not None
            ]
            steps = f"adaptive ({', '.join(bounds) or f'accuracy {ACCURACY}'})"
        else:
            steps = f"{config.muon_num_ns_steps}, {config.muon_coefficient_type or 'quintic'}"
        chosen = "chosen with the steps" if given["ns_steps"] == "adaptive" else 0
        deflation = chosen if config.muon_deflation is None else config.muon_deflation
        rates = f"momentum {given['momentum']}{', Nesterov' if given['nesterov'] else ''}; scale {config.muon_scale_mode} × "
        return "\n".join(
            [
                f"------------------------ muon_dist {version} ------------------------",
                "This is what trains; --optimizer adam, --muon-tp-mode and --muon-coefficient-type above are what Megatron sees:",
                *lines,
                f"  Newton–Schulz steps: {steps}; the whole matrix's update at any tensor-parallel size; placement {config.muon_placement}",
                f"  {rates}{config.muon_extra_scale_factor}; deflation {deflation}",
                "--------------------------------------------------------------------",
            ]
        )

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step all wrappers, or none of them. Collective over all ranks."""
        bad = not_finite((g for inside in self.inside for g in inside.gradients()), current_device()).to(torch.int32)
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():  # Megatron has just waited for the norm of the gradients
            self.skipped_steps += 1
            return False
        return bool(super().step_with_ready_grads())

    def load_state_dict(self, state_dict: Any) -> None:
        """As Megatron's; what it would end in a bare error for gets a sentence.

        Raises:
            ValueError: another optimizer's state, or groups with other learning rates or weight decays than those of this run.
        """
        saved = state_dict.values() if all(isinstance(key, int) for key in state_dict) else [state_dict]
        inner = [each.get("optimizer", each) for each in saved if isinstance(each, Mapping)]
        groups = [group for each in inner if isinstance(each, Mapping) for group in each.get("param_groups", ())]
        if any(isinstance(group, Mapping) and SAVED not in group for group in groups):
            raise ValueError(FOREIGN)
        try:
            super().load_state_dict(state_dict)
        except (KeyError, ValueError) as error:
            if isinstance(error, ValueError) and "parameter group" not in str(error):
                raise
            raise ValueError(
                f"Megatron finds a checkpoint's parameter groups by their learning rates and weight decays, and none of them has those "
                f"of this run ({error}). Give --lr, --min-lr, --weight-decay and their like as they were when it was saved; or start from "
                "the weights alone: --no-load-optim"
            ) from error

    def _refuse_other_form(self, metadata: Any) -> None:
        """Raise where a checkpoint has the distributed optimizer's flat buffers and this run has not, or the other way round."""
        if not metadata or not self.inside:
            return
        flat, saved_flat = any(isinstance(o, FlatBuffers) for o in self.chained_optimizers), "distrib_optim_sharding_type" in metadata
        if flat != saved_flat:
            was, now = (f"{'with' if each else 'without'} --use-distributed-optimizer" for each in (saved_flat, flat))
            raise ValueError(
                f"this checkpoint was saved {was} and is loaded {now}, which Megatron stores in another form. Give the flag as it was "
                "saved, or start from the weights alone: --no-load-optim"
            )

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **options: Any) -> Any:
        """As Megatron's, with the spectra of all pipeline stages and experts. Collective when saving."""
        if is_loading:
            self._refuse_other_form(options.get("metadata"))
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **options)
        steps = torch.tensor([inside.steps_taken for inside in self.inside], dtype=torch.int64, device=current_device())
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        known = [inside.of_matrices() for inside in self.inside]
        for group in (self._groups.pp, self._groups.ep):
            told = gather_objects(known, group, "save a checkpoint")
            known = [merged(each) for each in zip(*told, strict=True)]
        try:
            for inside, each, step in zip(self.inside, known, steps.tolist(), strict=True):
                inside.of_others, inside.others_step = each, step
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **options)
        finally:
            for inside in self.inside:
                inside.of_others, inside.others_step = {}, 0


def get_muon_dist_optimizer(
    config: Any,
    model_chunks: Sequence[nn.Module],
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    **options: Any,
) -> MuonDistOptimizer:
    """Muon for the matrices of a Megatron model and AdamW for everything else, under any parallelism. Collective over all ranks.

    Args:
        config: a `MuonDistConfig`, or Megatron's `OptimizerConfig` for the defaults.
        model_chunks: the model's chunks on this rank, wrapped by Megatron's `DistributedDataParallel`.
        config_overrides, use_gloo_process_groups, pg_collection, **options: as for Megatron's `get_megatron_optimizer`.

    Raises:
        ValueError: a setting, a layer or a wrapper that is not supported.
    """
    config = completed(config)
    given = arguments(config)
    refuse_unsupported(config, model_chunks)
    if config.muon_lr is not None and not (config.muon_lr > 0 and config.lr):
        raise ValueError(f"muon_lr must be positive, beside a positive lr that the schedule follows, got {config.muon_lr} and {config.lr}")
    groups = groups_of(pg_collection)
    described = describe(model_chunks, config, groups)
    as_adam = copy.copy(config)
    as_adam.optimizer = "adam"
    chain = build_wrappers(as_adam, list(model_chunks), config_overrides, use_gloo_process_groups, pg_collection, **options)
    wrappers = list(chain.chained_optimizers)
    telemetry = _telemetry(config)
    names, numel = whole_model(described.values(), groups)
    for wrapper in wrappers:
        if wrapper.is_stub_optimizer:
            continue
        inside = WrappedMuonDist(wrapper, described, given, config)
        inside.telemetry, inside.all_names, inside.model_numel = telemetry, names, numel
        wrapper.optimizer = inside
        if isinstance(wrapper, DistributedOptimizer):
            wrapper.__class__ = FlatBuffers  # it was built complete; this changes how checkpoints read its state
    return MuonDistOptimizer(wrappers, groups, [each.route for each in described.values()], config, given)


def _telemetry(config: MuonDistSettings) -> Telemetry | None:
    if config.muon_telemetry_dir is None and not config.muon_telemetry_sinks:
        return None
    return Telemetry(config.muon_telemetry_dir, tuple(config.muon_telemetry_sinks))
