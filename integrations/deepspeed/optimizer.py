"""MuonDist as DeepSpeed sees an optimizer: groups it may rearrange, state it may offload and save, steps in one call or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from muon_dist.engine import Engine
from muon_dist.groups import STRUCTURE, group_routes, read_groups
from muon_dist.polar.polynomials import Schedule
from muon_dist.rendezvous import gather_objects
from muon_dist.routing import Route
from muon_dist.rules import rule_of
from muon_dist.sharding.layout import ShardLayout
from muon_dist.sharding.plan import Plan
from muon_dist.telemetry import Telemetry

from ..host_views import HostViews, OfMatrices, all_holders, new_state, not_finite
from ..settings import names_given, naming
from .groups import as_groups, groups_by_name, split_experts
from .settings import plan_options, read_settings, refuse_unsupported
from .tensor_parallel import tensor_parallel_group, whole_shape
from .views import mismatch, views_of
from .wrappers import Host, Store, describe

# Keys of groups that are DeepSpeed's
HOST_KEYS = frozenset({"moe", "name"})
# What a saved group carries of ours: DeepSpeed's stage 3 loads the first group's keys into all of them
SAVED = "muon_dist"

_building: list[Any] = []  # the engine that is being built


@contextmanager
def building(engine: Any) -> Iterator[None]:
    """While an engine configures its optimizer: its model names the parameters, and a step is DeepSpeed's dry one."""
    _building.append(engine)
    try:
        yield
    finally:
        _building.pop()


class DeepSpeedMuonDist(torch.optim.Optimizer):
    """`muon_dist.MuonDist` for a DeepSpeed engine: `"optimizer": {"type": "MuonDist", "params": {...}}`.

    Args:
        params: what DeepSpeed passes on, or for `deepspeed.initialize(optimizer=...)` the model's named parameters or groups of
            them. Groups may have a learning rate, a weight decay and any other hyperparameter of their own.
        **settings: every argument of `muon_dist.MuonDist` but those that DeepSpeed decides (process_group, layouts, nonfinite), and
            the patterns "muon", "adamw", "split" and "transpose" of `muon_dist.build_param_groups`. As everywhere in DeepSpeed,
            "betas" and "eps" are AdamW's; "muon_eps" is the smallest norm that Muon divides by.

    Raises:
        ValueError: an unknown setting, with the nearest known one; a parameter that can't be routed; settings of DeepSpeed that
            MuonDist does not support.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        arguments, patterns = read_settings(settings)
        engine = _building[-1] if _building else None
        self._engine: Any = None
        self._parts: list[HostViews] | None = None  # one for each of the host's calls
        self._host: Host | None = None
        self._verdict: Tensor | None = None
        self._of_matrices: OfMatrices = {}
        self._skipped: Tensor | None = None
        self._arguments, self._given = arguments, frozenset(settings)
        self._telemetry: Telemetry | None = None
        if arguments["telemetry_dir"] is not None or arguments["telemetry_sinks"]:
            self._telemetry = Telemetry(arguments["telemetry_dir"], arguments["telemetry_sinks"])
        if engine is None and patterns:
            raise ValueError(
                f"{sorted(patterns)} match names, which are not known here. Use a config's optimizer entry, "
                "pass deepspeed.initialize a function that makes the optimizer, or groups from muon_dist.build_param_groups(model, ...)"
            )
        if engine is not None:
            refuse_unsupported(engine._config)
            given = groups_by_name(engine, params, patterns)
        else:
            given = as_groups(params)
        groups = []
        for group in given:
            members = [m if isinstance(m, tuple) else ("", m) for m in group["params"]]
            shapes = {name: ShardLayout(global_shape=whole_shape(p, name)) for name, p in members if name}
            options = {key: value for key, value in group.items() if key not in HOST_KEYS}
            with naming(names_given(settings)):
                complete_groups = read_groups([{**options, "params": members}], arguments, shapes)
            for complete in complete_groups:
                named = [m if isinstance(m, tuple) else ("", m) for m in complete.pop("params")]
                complete["param_names"], complete["params"] = [n for n, _ in named], [p for _, p in named]
                groups.append({**complete, **{key: group[key] for key in HOST_KEYS & set(group)}})
        if engine is not None and engine.has_moe_layers:
            groups = split_experts(groups)
        super().__init__(groups, {})
        self._routes = [route for group in self.param_groups for route, _ in group_routes(group)]

    # ------------------------------------------------------------------------------------------------------------ host

    def attach(self, engine: Any) -> None:
        """Learn where the engine's wrapper keeps the pieces, and give every store its state. Called when the wrapper is complete."""
        self._engine = engine
        tensor_parallel = tensor_parallel_group(engine.mpu)
        expert_groups = getattr(engine, "expert_data_parallel_group", None) or {}

        def data_parallel(p: Tensor) -> Any:
            name = getattr(p, "group_name", None)
            return expert_groups.get(name, engine.seq_data_parallel_group)

        self._host = describe(engine.optimizer, self.param_groups, data_parallel)
        self._tensor_parallel = tensor_parallel
        self._call_of = {store.tensor: k for k, stores in enumerate(self._host.calls) for store in stores}
        for store in self.stores:
            self.state[store.tensor] = new_state(store.tensor, rule_of(self.param_groups[store.group]))
        monitor = getattr(engine, "monitor", None)
        if monitor is not None and monitor.enabled:
            directory, sinks = self._arguments["telemetry_dir"], self._arguments["telemetry_sinks"]
            self._telemetry = Telemetry(directory, sinks, send=_to_monitor(engine))
        self._every_group = self.param_groups  # also while a wrapper shows only one
        self._structure = [{key: group[key] for key in STRUCTURE & set(group) - {"params"}} for group in self.param_groups]

    def bind(self) -> None:
        """Make an engine for each of the host's calls, and check against the parameters' values, on all ranks, what it works on.

        Collective at the first call, which the first step makes; then nothing happens.

        Raises:
            ValueError: stores that hold other values, or parameters that DeepSpeed's own Muon would take.
        """
        if self._parts is not None:
            return
        engine, host = self._engine, self._host
        assert host is not None  # attached
        names = {p: name for name, p in engine.module.named_parameters()}
        tagged = [name for p, name in names.items() if getattr(p, "use_muon", False)]
        if tagged:
            raise ValueError(f"{tagged[0]} has use_muon=True, by which DeepSpeed applies its own Muon to gradients, too: leave it unset")
        made: dict[tuple[int, ...], Any] = {}
        known: dict[Any, Any] = {}

        def holders(ranks: Any) -> Any:
            if ranks not in known:
                known[ranks] = all_holders(ranks, self._tensor_parallel, made)
            return known[ranks]

        device = torch.device(get_accelerator().current_device_name())
        views = [views_of(stores, self._every_group, names, holders, self._tensor_parallel, device) for stores in host.calls]
        options = plan_options(self._arguments)
        sizes = {name: math.prod(whole_shape(p, name)) for p, name in names.items() if p.requires_grad}
        trained = [route.name for route in self.routes if route.algorithm == "muon"]
        told = gather_objects((next(filter(None, (mismatch(stores, names) for stores in host.calls)), ""), sizes, trained), None)
        for rank, (problem, _, _) in enumerate(told):
            if problem:
                raise ValueError(f"rank {rank}: {problem}")
        all_sizes = {name: numel for _, each, _ in told for name, numel in each.items()}  # of all pipeline stages
        self._parts = [
            HostViews(
                each,
                self._every_group,
                lambda t: self.state[t],
                self._of_matrices,
                options=options,
                host_decides=host.checks_gradients or len(views) > 1,  # DeepSpeed, or this optimizer for all calls together
                telemetry=self._telemetry,
                all_names=sorted({name for _, _, names_there in told for name in names_there}),
                model_numel=sum(all_sizes.values()),
            )
            for each in views
        ]

    # ------------------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step what DeepSpeed's wrapper has put into the groups. Collective."""
        if closure is not None:
            raise ValueError("MuonDist takes no closure under DeepSpeed, whose engine computes the loss")
        if self._engine is None:
            if _building:
                return None  # a wrapper tries a step with zero gradients before it is complete
            raise ValueError(
                "this MuonDist is DeepSpeed's: pass it to deepspeed.initialize, import muon_dist.integrations.deepspeed before, and step "
                "the engine. Without DeepSpeed use muon_dist.MuonDist"
            )
        self._take_over_loaded()
        self.bind()
        assert self._parts is not None and self._host is not None  # bound
        given = [t for group in self.param_groups for t in group["params"]]
        call = self._call_of.get(given[0], -1) if given else -1
        if call < 0 or set(given) != {store.tensor for store in self._host.calls[call]}:
            raise ValueError("DeepSpeed stepped tensors that it did not have when it was initialised: this wrapper is not supported")
        self._parts[call].step(self._every_group, self._decide(call))
        return None

    def _decide(self, call: int) -> Tensor | None:
        """Whether the step happens: the same for all of its calls. None: the one call asks the gradients itself."""
        assert self._host is not None and self._parts is not None
        stores, device = self._host.calls[call], self._parts[call].device
        if self._host.checks_gradients:
            return torch.ones((), dtype=torch.bool, device=device)
        if len(self._parts) == 1:
            return None
        if call == 0:
            grads = [t.grad for t in (store.tensor for store in stores) if t.grad is not None] + self._host.pending_gradients()
            bad = not_finite(grads, device).to(get_accelerator().current_device_name(), torch.int32)
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            self._skipped = bad if self._skipped is None else self._skipped + bad
            self._verdict = (bad == 0).to(device)
        return self._verdict

    def rate_ratios(self) -> list[float]:
        """Each group's learning rate over the one that was given for all: "lr", or Muon's without it."""
        base = next((self._arguments[key] for key in ("lr", "muon_lr", "adam_lr") if key in self._given), self._arguments["lr"])
        return [float(group["lr"]) / base if base else 1.0 for group in self.param_groups]

    @property
    def stores(self) -> list[Store]:
        """The tensors that DeepSpeed steps, with what each holds of the model's parameters."""
        return [] if self._host is None else [store for call in self._host.calls for store in call]

    @property
    def spectra(self) -> dict[str, Tensor]:
        """The measured spectra by the names of parameters, those under way included. Doesn't communicate."""
        return self.of_matrices.get("spectrum", {})

    @property
    def of_matrices(self) -> OfMatrices:
        """What is kept of whole matrices, by key and name of parameter, with what is under way. Doesn't communicate."""
        for engine in self.engines:
            engine.collect()
        return self._of_matrices

    @property
    def engines(self) -> list[Engine]:
        """What steps DeepSpeed's tensors, an engine for each of its calls. Empty before the first step."""
        return [part.engine for part in self._parts or ()]

    @property
    def routes(self) -> list[Route]:
        """Every parameter's route, with the reason."""
        return self._routes

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        """Every matrix's shape and the schedule that it gets now, by name. Empty before the first step."""
        return {name: found for engine in self.engines for name, found in engine.schedules.items()}

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        """As `muon_dist.MuonDist.plans`, of everything that DeepSpeed steps. Empty before the first step."""
        return [plan for engine in self.engines for plan in engine.plans]

    @property
    def skipped_steps(self) -> int:
        """Steps that MuonDist left out because a gradient was not finite; DeepSpeed counts those that it leaves out itself."""
        own = 0 if self._skipped is None else int(self._skipped.item())
        return own + sum(engine.skipped_steps for engine in self.engines)

    @property
    def skipped_updates(self) -> int:
        """As `muon_dist.MuonDist.skipped_updates`. Waits for the device."""
        return sum(engine.skipped_updates for engine in self.engines)

    # ----------------------------------------------------------------------------------------------------- state dicts

    def state_dict(self) -> dict[str, Any]:
        """The state of every store, as DeepSpeed saves it. Never communicates.

        Momentum is there as "momentum_buffer" and as "exp_avg", the same tensor, beside an "exp_avg_sq" of zeros that takes no room:
        what DeepSpeed's converter to universal checkpoints looks for. Every group carries the spectra and all groups' settings.
        """
        self._take_over_loaded()
        known = self.of_matrices
        packed = super().state_dict()
        state = {}
        for key, entry in packed["state"].items():
            momentum = entry.get("momentum_buffer")
            if momentum is not None and momentum.ndim == 1:
                entry = {**entry, "exp_avg": momentum, "exp_avg_sq": momentum.new_zeros(()).expand(momentum.shape)}
            state[key] = entry
        kept = {
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in packed["param_groups"]],
            "spectra": {name: rows.clone() for name, rows in known.get("spectrum", {}).items()},
            "of_matrices": {
                key: {name: value.detach().clone() for name, value in by_name.items()}
                for key, by_name in known.items()
                if key != "spectrum"
            },
        }
        return {"state": state, "param_groups": [{**group, SAVED: kept} for group in packed["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned in a run with the same groups and the same partitions.

        Raises:
            ValueError: the state of another optimizer, or other groups.
        """
        for group in state_dict["param_groups"]:
            if SAVED not in group:
                raise ValueError(
                    "this checkpoint's optimizer state is not MuonDist's. To start from its weights alone: "
                    "load_checkpoint(..., load_optimizer_states=False)"
                )
        super().load_state_dict(state_dict)
        self._every_group = self.param_groups
        self._take_over_loaded()

    def _take_over_loaded(self) -> None:
        """Understand what a checkpoint has left in groups and state; DeepSpeed writes both behind `load_state_dict`, too."""
        if self._host is None:
            return
        loaded = [group.pop(SAVED, None) for group in self._every_group]
        if not any(loaded):
            return
        for i, (group, kept) in enumerate(zip(self._every_group, loaded, strict=True)):
            if kept is None:
                continue
            saved = kept["groups"][i]
            was, now = rule_of(saved).name, rule_of(self._structure[i]).name
            if was != now:
                raise ValueError(f"group {i} was saved for {was}, but this optimizer gives it to {now}")
            for key in set(group) - {"params"}:
                del group[key]
            group.update({**saved, **self._structure[i]})
            for key, by_name in {"spectrum": kept["spectra"], **kept.get("of_matrices", {})}.items():
                own = self._of_matrices.setdefault(key, {})
                for name, value in by_name.items():
                    own[name] = torch.as_tensor(value, device="cpu").to("cpu", torch.float64 if key == "spectrum" else None, copy=True)
        for store in self.stores:
            state = self.state[store.tensor]
            if self._every_group[store.group]["algorithm"] == "muon" and "exp_avg" in state:
                momentum = state.pop("exp_avg")
                state["momentum_buffer"] = momentum.to(store.tensor.device, store.tensor.dtype)
                state.pop("exp_avg_sq", None)
            if "step" in state:  # stage 3 loads one tensor for all
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=store.tensor.device).clone()


def _to_monitor(engine: Any) -> Callable[[int, Mapping[str, float]], None]:
    """Send measurements to the engine's monitor, at its count of samples as DeepSpeed does with the loss."""

    def send(step: int, values: Mapping[str, float]) -> None:
        engine.monitor.write_events([(name, value, engine.global_samples) for name, value in values.items()])

    return send
