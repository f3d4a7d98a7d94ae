"""MuonDist as Megatron sees an optimizer: what its wrappers hold inside, the chain of them, and how both are made.

Megatron builds its wrappers itself, as for Adam; then the Adam inside each is replaced. So clipping, loss scales, zero counting,
parameter groups, schedulers and checkpoints are Megatron's own.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from muon_dist.groups import read_groups
from muon_dist.polar.polynomials import Schedule
from muon_dist.polar.products import product_settings
from muon_dist.rendezvous import gather_objects
from muon_dist.routing import Route
from muon_dist.sharding.plan import Plan
from muon_dist.spectrum.policy import ACCURACY
from muon_dist.telemetry import Telemetry
from muon_dist.version import __version__ as version

from ..host_views import HostView, HostViews, new_state, not_finite
from ..settings import DEFAULTS, naming
from .parameters import Described, Groups, current_device, describe, groups_of, whole_model
from .settings import FLAGS, MuonDistSettings, arguments, completed, plan_options, refuse_unsupported
from .wrappers import FlatBuffers, Piece, absent, pieces, whole_piece

# What saved groups carry of ours: Megatron's wrappers pass groups through as they are
SAVED = "muon_dist"

# Of a checkpoint that Megatron's Adam or Muon wrote
FOREIGN = (
    "this checkpoint's optimizer state is not MuonDist's in this form: it was written by another optimizer, or with the distributed "
    "optimizer where this run has none, or the other way round. To start from its weights alone: --no-load-optim, or --finetune"
)

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


class MuonDist(torch.optim.Optimizer):
    """The optimizer inside one of Megatron's wrappers. Its groups are the wrapper's; its state has their tensors' shapes.

    Args:
        wrapper: built for Adam, complete; its groups are taken over.
        described: the model's parameters.
        given: arguments of `muon_dist.MuonDist`.
        config: Megatron's.
    """

    def __init__(self, wrapper: Any, described: Mapping[Tensor, Described], given: Mapping[str, Any], config: MuonDistSettings) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = wrapper.optimizer.param_groups
        self._wrapper, self._described, self._given, self._config = wrapper, described, dict(given), config
        self._pieces = pieces(wrapper)
        for piece in self._pieces:
            self.state[piece.tensor] = new_state(piece.tensor, described[piece.parameter].route.algorithm)
        self._elsewhere: dict[Tensor, dict[str, Tensor]] = {}  # state of empty tensors, for parameters of which nothing lies here
        self._spectra: dict[str, Tensor] = {}
        self._groups: list[dict[str, Any]] = []  # MuonDist's own: one for each of Megatron's, algorithm and split
        self._numbers: dict[tuple[int, str, tuple[int, ...] | None], int] = {}  # of which they are
        self._part: HostViews | None = None
        self._bound = False
        self._happens: Tensor | None = None
        self.telemetry: Telemetry | None = None
        self.all_names: Sequence[str] = ()
        self.model_numel = 0
        self.others_spectra: dict[str, Tensor] = {}  # of parameters that other ranks have, for a checkpoint that is being written
        self.others_step = 0  # taken by other ranks, where this one has nothing; for such a checkpoint, too
        self._loaded_step = 0.0

    # --------------------------------------------------------------------------------------------------------- binding

    def _bind(self) -> HostViews | None:
        """The views of what the wrapper holds; None where nothing is, as on a pipeline stage without experts.

        Collective at the first call, which compares them with the model's values.
        """
        if self._bound:
            return self._part
        found = [(piece, self._described[piece.parameter]) for piece in self._pieces]
        unlike = ""
        for piece, described in found:
            theirs = piece.values()
            if not torch.equal(piece.tensor.detach().reshape(-1).to(theirs.dtype), theirs):
                unlike = unlike or described.name
        found = sorted(found + self._empty_pieces(), key=lambda each: each[1].name)
        views = [self._view(piece, described) for piece, described in found]
        if not views:
            self._bound = True
            return None
        self._refuse_unlike(unlike, views)
        self._part = HostViews(
            views,
            self._groups,
            self._state_of,
            self._spectra,
            options=plan_options(self._config),
            host_decides=True,
            telemetry=self.telemetry,
            all_names=self.all_names,
            model_numel=self.model_numel,
        )
        self._bound = True
        return self._part

    def _empty_pieces(self) -> list[tuple[Piece, Described]]:
        """Pieces of the parameters of which nothing lies here; the ranks that hold some know their groups. Collective."""
        if not isinstance(self._wrapper, DistributedOptimizer):
            return []
        ranks = self._wrapper.data_parallel_group
        told = gather_objects({self._described[piece.parameter].name: piece.group for piece in self._pieces}, ranks)
        known = {name: number for each in told for name, number in each.items()}
        result = []
        for p in absent(self._wrapper, self._pieces):
            described = self._described[p]
            empty = torch.empty(0, dtype=torch.float32, device=p.device)
            self._elsewhere[empty] = {
                **new_state(empty, described.route.algorithm),
                "step": torch.full((), self._loaded_step, device=p.device),
            }
            result.append((whole_piece(p, empty, known[described.name], numel=0), described))
        return result

    def _view(self, piece: Piece, described: Described) -> HostView:
        layout = described.layout(piece.start, piece.stop)
        key = (piece.group, described.route.algorithm, described.split)
        if key not in self._numbers:
            self._numbers[key] = len(self._groups)
            asked: dict[str, Any] = {"params": [(described.name, piece.tensor)], "algorithm": described.route.algorithm}
            if described.split is not None:
                asked["split"] = described.split
            with naming(FLAGS):
                self._groups += read_groups([asked], {**DEFAULTS, **self._given}, {described.name: layout})
        return HostView(
            tensor=piece.tensor,
            span=None,
            name=described.name,
            layout=layout,
            group=self._numbers[key],
            reason=described.route.reason,
        )

    def _refuse_unlike(self, unlike: str, views: Sequence[HostView]) -> None:
        """Raise on all ranks that share parameters where a piece has other values than the model."""
        for group in dict.fromkeys(view.layout.group for view in views):
            told = gather_objects(unlike, group)
            unlike = unlike or next(filter(None, told), "")
        if unlike:
            raise ValueError(
                f"{unlike} has other values than its copy in Megatron's optimizer. Either the piece lies elsewhere, or the model's weights "
                "were changed after the optimizer was built: call optimizer.reload_model_params()"
            )

    def _state_of(self, tensor: Tensor) -> dict[str, Any]:
        return self._elsewhere[tensor] if tensor in self._elsewhere else self.state[tensor]

    # ------------------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step by the gradients that Megatron has put there: reduced, unscaled, clipped and finite on all ranks. Collective."""
        if closure is not None:
            raise ValueError("MuonDist takes no closure in Megatron, which computes the loss")
        part = self._bind()
        if part is None:
            return
        if self._happens is None:
            self._happens = torch.ones((), dtype=torch.bool, device=part.device)
        with _matmul_precision(self._config.muon_fp32_matmul_prec):
            part.step(self._hyperparameters(), self._happens)

    def _hyperparameters(self) -> list[dict[str, Any]]:
        """Of each group what was asked for, and what Megatron's group says at this step."""
        ratio = 1.0 if self._config.muon_lr is None else self._config.muon_lr / self._config.lr
        result = []
        for own, (source, algorithm, _) in zip(self._groups, self._numbers, strict=True):
            theirs = self.param_groups[source]
            now = {"lr": theirs["lr"] * (ratio if algorithm == "muon" else 1.0), "weight_decay": theirs["weight_decay"]}
            if algorithm == "adamw":  # as overrides of single groups may say
                now.update(betas=tuple(theirs["betas"]), eps=theirs["eps"])
            result.append({**own, **now})
        return result

    def gradients(self) -> Iterator[Tensor]:
        """The gradients of what lies here."""
        return (piece.tensor.grad for piece in self._pieces if piece.tensor.grad is not None)

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        return {} if self._part is None else self._part.engine.schedules

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        return [] if self._part is None else self._part.engine.plans

    @property
    def skipped_updates(self) -> int:
        return 0 if self._part is None else self._part.engine.skipped_updates

    # ----------------------------------------------------------------------------------------------------- state dicts

    @property
    def steps_taken(self) -> int:
        """0 where this rank has no parameters of the wrapper's."""
        return max((int(entry["step"].item()) for entry in self.state.values()), default=0)

    def spectra(self) -> dict[str, Tensor]:
        """The measured spectra of this rank's parameters, by name, those under way included."""
        if self._part is not None:
            self._part.engine.collect()
        own = {described.name for described in self._described.values()}
        return {name: rows for name, rows in self._spectra.items() if name in own}

    def state_dict(self) -> dict[str, Any]:
        """State by tensor, in the tensors' shapes, and groups that carry the step count and the spectra. Never communicates."""
        packed = super().state_dict()
        # every rank compares and loads the count, which has no place on a device of one of them
        state = {key: {**entry, "step": entry["step"].cpu()} for key, entry in packed["state"].items()}
        step = max(self.steps_taken, self.others_step)
        spectra = {**self.others_spectra, **self.spectra()}
        kept = json.dumps({"muon": sorted(self.all_names), "spectra": {name: _numbers(rows) for name, rows in spectra.items()}})
        return {"state": state, "param_groups": [{**group, "step": step, SAVED: kept} for group in packed["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, as Megatron's wrappers hand it on.

        Raises:
            ValueError: the state of another optimizer, or one that trained a parameter by the other algorithm.
        """
        kept: dict[str, Any] = {}
        for group in state_dict["param_groups"]:
            if SAVED not in group:
                raise ValueError(FOREIGN)
            kept = json.loads(group[SAVED])
        for described in (self._described[piece.parameter] for piece in self._pieces):
            saved = "muon" if described.name in kept["muon"] else "adamw"
            if saved != described.route.algorithm:
                raise ValueError(
                    f"{described.name} was trained by {saved} when this checkpoint was saved, and goes to {described.route.algorithm} now "
                    f"({described.route.reason}): its state means something else. Say --muon-params or --muon-adamw-params as before, or "
                    "start from the weights alone: --no-load-optim"
                )
        super().load_state_dict(state_dict)
        step = 0.0
        for group in self.param_groups:
            step = max(step, float(group.pop("step", 0.0)))
            group.pop(SAVED)
        self._spectra.update({name: _rows(rows) for name, rows in kept.get("spectra", {}).items()})
        self._loaded_step = step
        for state in (*self.state.values(), *self._elsewhere.values()):  # Megatron has one count for all
            device = next(iter(state.values())).device
            state["step"] = torch.full((), step, dtype=torch.float32, device=device)


def _numbers(rows: Tensor) -> list[list[float | None]]:
    """Rows of a spectrum as plain numbers, None where nothing was measured: Megatron compares what ranks save, and NaN is not equal."""
    return [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]


def _rows(numbers: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in numbers], dtype=torch.float64, device="cpu")


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    """torch's precision of that name for fp32 products; for "low" and "medium" Newton–Schulz is in bf16, and nothing else multiplies."""
    asked = {"high": {"fp32_precision": "tf32"}, "highest": {"fp32_precision": "ieee"}}.get(wanted, {})
    with product_settings("cpu", asked), product_settings("cuda", asked):
        yield


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
        self._inside: list[MuonDist] = [o.optimizer for o in chained_optimizers if isinstance(o.optimizer, MuonDist)]
        self.routes = routes  # of every parameter of this rank's model, with the reason
        self.skipped_steps = 0

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        """The shape and the schedule of every matrix that this rank's ranks share, by name. Empty before the first step."""
        return {name: found for inside in self._inside for name, found in inside.schedules.items()}

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        """As `muon_dist.MuonDist.plans`, of all wrappers. Empty before the first step."""
        return [plan for inside in self._inside for plan in inside.plans]

    @property
    def skipped_updates(self) -> int:
        """As `muon_dist.MuonDist.skipped_updates`. Waits for the device."""
        return sum(inside.skipped_updates for inside in self._inside)

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
        bad = not_finite((g for inside in self._inside for g in inside.gradients()), current_device()).to(torch.int32)
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
        if not metadata or not self._inside:
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
        steps = torch.tensor([inside.steps_taken for inside in self._inside], dtype=torch.int64, device=current_device())
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        known = [inside.spectra() for inside in self._inside]
        for group in (self._groups.pp, self._groups.ep):
            told = gather_objects(known, group, "save a checkpoint")
            known = [{name: rows for spectra in each for name, rows in spectra.items()} for each in zip(*told, strict=True)]
        try:
            for inside, spectra, step in zip(self._inside, known, steps.tolist(), strict=True):
                inside.others_spectra, inside.others_step = spectra, step
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **options)
        finally:
            for inside in self._inside:
                inside.others_spectra, inside.others_step = {}, 0


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
        inside = MuonDist(wrapper, described, given, config)
        inside.telemetry, inside.all_names, inside.model_numel = telemetry, names, numel
        wrapper.optimizer = inside
        if isinstance(wrapper, DistributedOptimizer):
            wrapper.__class__ = FlatBuffers  # it was built complete; this changes how checkpoints read its state
    return MuonDistOptimizer(wrappers, groups, [each.route for each in described.values()], config, given)


def _telemetry(config: MuonDistSettings) -> Telemetry | None:
    if config.muon_telemetry_dir is None and not config.muon_telemetry_sinks:
        return None
    if config.muon_num_ns_steps != "adaptive":
        raise ValueError("muon_telemetry_dir reports what adaptive step counts measure, but muon_num_ns_steps is a number")
    return Telemetry(config.muon_telemetry_dir, tuple(config.muon_telemetry_sinks))
