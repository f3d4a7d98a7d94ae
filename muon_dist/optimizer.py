"""MuonDist: Muon under any sharding, with AdamW for what is not a matrix, as a `torch.optim.Optimizer` over an engine."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import allocation
from .bound import Member
from .engine import Engine
from .gradients import local_gradient
from .groups import PlanOptions, align_group, group_routes, read_groups
from .loading import translate_state
from .polar.polynomials import Polynomial, Schedule
from .routing import Route
from .rules import RULES
from .sharding.layout import ShardLayout
from .sharding.plan import Plan
from .sharding.state import is_elsewhere, is_unset
from .telemetry import Telemetry


class MuonDist(torch.optim.Optimizer):
    """Muon for the matrices of a model and AdamW for everything else, the same update under any sharding.

    Args:
        params: `model.named_parameters()`, groups from `build_param_groups`, plain parameters, or groups (dicts) whose
            "params" are either; a group may set "algorithm" to "muon" or "adamw" and any hyperparameter of its algorithm.
            Parameters may be plain tensors (replicas over `process_group`), DTensors (FSDP2, HSDP, tensor parallelism), or
            fragments described by `layouts`.
        lr: learning rate of both kinds of group; `muon_lr` and `adam_lr` override it for one.
        weight_decay: decoupled, by the unadjusted learning rate; `adam_weight_decay` overrides it for AdamW.
        momentum, nesterov: as in `torch.optim.Muon`: buf.lerp_(g, 1 − momentum); the update is of g.lerp(buf, momentum).
        ns_steps: Newton–Schulz steps: "adaptive", so that every matrix gets as many as its measured spectrum needs, or a number;
            5 is plain Muon, equal to `torch.optim.Muon`.
        polynomial: "jordan", "quintic", "aol", "polar_express", "cans", "deepseek_v4", "minimax", one (a, b, c) repeated, or one per step;
            None: "jordan" for a fixed number of steps, "minimax" for adaptive ones (which take these two only).
        deflation: dominant singular values of every matrix that are lowered first to lie among the others, which are then iterated at
            their own scale: fewer steps for the cost of 12·deflation·m·n operations. None: none for fixed steps; for adaptive ones as many
            as make the whole cheapest, up to an eighth of the rank, chosen with the steps.
        accuracy: for adaptive steps: "jordan4" (the default), the cheapest steps that leave a matrix no further from its polar factor than
            four Jordan steps, and none that are dearer; "jordan3" to "jordan8" likewise.
        coverage, tol: for adaptive steps, instead: bring this share of a matrix's directions to within tol (.3) of 1, at any price.
        noise_floor: for adaptive steps: directions below this share of ‖M‖_F (1e-4) are not counted.
        min_ns_steps, max_ns_steps: for adaptive steps: their bounds (2 and 12; with coverage 1 and 12, and a rare
            measurement takes 6). With one step the loss is higher.
        measure_every, burn_in: for adaptive steps: steps between two measurements of a matrix (100), which are denser at first, and
            before the first (0). Until that takes effect, three steps later, scaling laws predict what a matrix needs.
        adjust_lr_fn: "match_rms_adamw" (0.2·√max(rows, cols)), "original" or None (√max(1, rows/cols)), "spectral"
            (√(rows/cols)) or "none".
        extra_scale_factor: multiplies every update of Muon beside that, and not its weight decay.
        rule: what matrices are updated by: "muon", or "normuon" (NorMuon: rows of every update are brought to like size by a running mean
            of their squares, arXiv 2510.05491). A group may have another.
        rule_options: the rule's own hyperparameters: of NorMuon "beta2" (.95), of that mean. They stand in groups by their names.
        adam_betas, adam_eps: AdamW's.
        compute_dtype: of Newton–Schulz, a dtype or a name ("bf16"). None: bf16 on an accelerator, fp32 on a CPU, fp64 for
            fp64 parameters.
        wire_dtype: of what travels: bf16, fp32 or fp64. None: the compute dtype (fp32 where that is fp16).
        process_group: the ranks that step together: plain tensors are replicas over them, and one bad gradient skips the step on
            all of them. None: all ranks.
        layouts: name -> `ShardLayout` for fragments whose place their tensors don't tell.
        bucket_mb: MiB on the wire that an owner gathers in one bucket, at most; a single larger matrix excepted. Less is gathered at a
            time where that hides more of the travelling. Updates of plain replicas go to every rank, so those receive as much from
            each owner.
        placement: "owner": one rank orthogonalises a matrix. "gram": every rank works on a slice of it, along its longer side, and Gram
            matrices are added up over the ranks: for jobs of fewer matrices than ranks, and where no rank has room for a whole one.
            "auto": slices for the costliest shapes where that ends a step sooner, by FLOPs and bytes. The update is the same.
        symmetric_kernels: on CUDA, the rows (or columns: the smaller side of a matrix) from which XXᵀ and all products of Gram matrices are
            computed by a Triton kernel that takes one triangle only; not in fp64. None: never, since nothing tells beforehand where a GPU
            gains by it; `muon-dist bench ns --symmetric-kernels` measures that.
        eps: smallest Frobenius norm that a matrix is divided by; guards only against zero.
        telemetry_dir: where reports go, as lines of JSON (`muon-dist spectrum DIR` shows them): measured spectra, and every `measure_every`
            (else 100) steps the size of every matrix's update and of its weights, and how many steps were left out.
        telemetry_sinks: besides, "tensorboard" and "wandb".
        replicate_momentum: whether every rank keeps the momentum of plain replicas, so that `state_dict()` is complete on each without
            `consolidate()`; costs as much memory on every rank as the matrices have. None: under Hugging Face accelerate, which
            saves without a chance to communicate; else owners alone keep it.
        nonfinite: what a NaN or infinity in any rank's gradient does: "skip" the step on all ranks, state included, counted
            in `skipped_steps`; or "raise" on all of them (costs a wait for the device).

    Raises:
        ValueError: an invalid hyperparameter, a parameter that can't be routed, or a placement that can't be supported.
    """

    # torch.amp.GradScaler then calls step() on every rank, where all of them decide alike, and sets grad_scale and found_inf before
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | str = "adaptive",
        polynomial: Polynomial | None = None,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        adam_weight_decay: float | None = None,
        compute_dtype: torch.dtype | str | None = None,
        wire_dtype: torch.dtype | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        layouts: Mapping[str, ShardLayout] | None = None,
        bucket_mb: float = 64,
        placement: str = "owner",
        symmetric_kernels: int | None = None,
        eps: float = 1e-20,
        replicate_momentum: bool | None = None,
        nonfinite: str = "skip",
        extra_scale_factor: float = 1.0,
        rule: str = "muon",
        rule_options: Mapping[str, Any] | None = None,
        deflation: int | None = None,
        accuracy: str | None = None,
        coverage: float | None = None,
        tol: float | None = None,
        min_ns_steps: int | None = None,
        max_ns_steps: int | None = None,
        measure_every: int | None = None,
        burn_in: int | None = None,
        noise_floor: float | None = None,
        telemetry_dir: str | os.PathLike[str] | None = None,
        telemetry_sinks: Sequence[str] = (),
    ) -> None:
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip' or 'raise'")
        if replicate_momentum is not None and not isinstance(replicate_momentum, bool):
            raise ValueError(f"replicate_momentum={replicate_momentum!r}: give True, False, or None to leave it to the host")
        options = PlanOptions(bucket_mb=bucket_mb, placement=placement, symmetric_kernels=symmetric_kernels)
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise ValueError(f"process_group must be a torch.distributed process group or None, got {process_group!r}")
        for name, layout in (layouts or {}).items():
            if not isinstance(layout, ShardLayout):
                raise ValueError(f"layouts[{name!r}] must be a ShardLayout, got {type(layout).__name__}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "polynomial": polynomial,
            "adjust_lr_fn": adjust_lr_fn,
            "muon_lr": muon_lr,
            "adam_lr": adam_lr,
            "adam_betas": adam_betas,
            "adam_eps": adam_eps,
            "adam_weight_decay": adam_weight_decay,
            "compute_dtype": compute_dtype,
            "wire_dtype": wire_dtype,
            "eps": eps,
            "extra_scale_factor": extra_scale_factor,
            "rule": rule,
            "rule_options": rule_options,
            "deflation": deflation,
            "accuracy": accuracy,
            "coverage": coverage,
            "tol": tol,
            "min_ns_steps": min_ns_steps,
            "max_ns_steps": max_ns_steps,
            "measure_every": measure_every,
            "burn_in": burn_in,
            "noise_floor": noise_floor,
        }
        wanted = telemetry_dir is not None or telemetry_sinks
        self._telemetry = Telemetry(telemetry_dir, telemetry_sinks) if wanted else None
        self._options, self._nonfinite, self._replicate_momentum = options, nonfinite, replicate_momentum
        self._start_unbound(process_group, dict(layouts or {}))
        self._reading = False  # the constructor's groups are read as a whole, later ones as they come
        items = params if isinstance(params, (Tensor, set, frozenset)) else list(params)
        super().__init__(read_groups(items, defaults, self._layouts), defaults)
        self._reading = True
        _warn_of_halves(items, len(self.param_groups))

    def _start_unbound(self, process_group: dist.ProcessGroup | None, layouts: dict[str, ShardLayout]) -> None:
        self._process_group, self._layouts = process_group, layouts
        self._engine = Engine(process_group=process_group, options=self._options, nonfinite=self._nonfinite, telemetry=self._telemetry)
        self._members: list[Member] = []
        self._seen: tuple[Any, ...] = ([],)  # parameters and groups that these are made of
        self._detached = False  # unpickled without the process group or the layouts that it had
        self._known = WeakIdKeyDictionary()  # parameter -> (name, reason)

    @property
    def engine(self) -> Engine:
        """What steps the parameters: its domains, plans and programs."""
        return self._engine

    # ---------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without an "algorithm" becomes up to two, Muon's and AdamW's. The next step binds again."""
        ready = read_groups([param_group], self.defaults, self._layouts) if self._reading else [param_group]
        for group in ready:
            complete = set(group)
            super().add_param_group(group)
            added = self.param_groups[-1]
            for key in set(added) & set(self.defaults) - complete:  # the base class fills in every default
                del added[key]
            self._declare(added)

    def _declare(self, group: dict[str, Any]) -> None:
        """Give a group's parameters their state entries. Keys are equal on all ranks from the start."""
        for route, p in self._routed(group):
            if p.requires_grad:
                allocation.declare(self._member(route, p, 0), group)

    def _member(self, route: Route, p: Tensor, group: int) -> Member:
        layout = self._layouts.get(route.name)
        return Member(name=route.name, tensor=p, route=route, group=group, state=self.state[p], layout=layout)

    @property
    def routes(self) -> list[Route]:
        """Every parameter's route, with the reason, in the order of the groups."""
        return [route for group in self.param_groups for route, _ in self._routed(group)]

    def _routed(self, group: dict[str, Any]) -> list[tuple[Route, Tensor]]:
        """Each parameter of a group with its route. Its "params" may have been edited or replaced; names and reasons follow them."""
        align_group(group, self._known)
        routed = group_routes(group)
        self._known.update({p: (route.name, route.reason) for route, p in routed})
        return routed

    @property
    def schedules(self) -> dict[str, tuple[tuple[int, int], Schedule]]:
        """Every matrix of this rank's domains, by name: its shape and the schedule that it gets now. Empty before the first step."""
        return self._engine.schedules

    @property
    def plans(self) -> list[tuple[tuple[int, ...], Plan]]:
        """For each of this rank's domains its ranks, and the plan they follow, in which ranks are positions among them.

        Empty before the first step.
        """
        return self._engine.plans

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite. Waits for the device."""
        return self._engine.skipped_steps

    @property
    def skipped_updates(self) -> int:
        """Updates of single matrices that were left out because their norm can't be that of a polar factor: the products in which they
        were orthogonalised lost too many digits. This rank's own at once, those of others from the next step on. Waits for the device.
        """
        return self._engine.skipped_updates

    # ------------------------------------------------------------------------------------------------------------ step

    def bind(self) -> None:
        """Learn where every parameter lies, agree on a plan, and allocate state. Collective; done by the first step.

        Nothing happens where the parameters are the same as at the last call.

        Raises:
            ValueError: the ranks don't agree, replicas hold other values, or a placement isn't supported.
            RuntimeError: not all ranks came in time.
        """
        self._follow()
        if self._engine.is_bound(self._members, self.param_groups):
            return
        if self._detached:
            raise ValueError(
                "this optimizer had a process_group or layouts, which don't survive pickling or copying: build a new one and load its state"
            )
        self._drop_state_of_others()
        names = [route.name for route in self.routes]
        unknown = set(self._layouts) - set(names)
        if unknown:
            raise ValueError(f"layouts name {sorted(unknown)}; the parameters of this optimizer are {names[:5]}…")
        everywhere = _under_accelerate() if self._replicate_momentum is None else self._replicate_momentum
        self._engine.bind(self._members, self.param_groups, replicate_momentum=everywhere)

    def _follow(self) -> None:
        """Take up what the groups and the state are now; `_members` is another list where parameters are others."""
        given = [p for group in self.param_groups for p in group["params"]]
        # frozen parameters that have state stay, so that it can be saved
        kinds = ["trained" if p.requires_grad else "kept" if p in self.state else "" for p in given]
        seen = ([len(group["params"]) for group in self.param_groups], kinds)
        if seen == self._seen[1:] and all(map(is_, given, self._seen[0])):
            for member in self._members:
                member.state = self.state[member.tensor]
            return
        self._seen = (given, *seen)
        self._members = [
            self._member(route, p, i)
            for i, group in enumerate(self.param_groups)
            for route, p in self._routed(group)
            if p.requires_grad or p in self.state
        ]

    def _drop_state_of_others(self) -> None:
        """Let go of the state of parameters that were taken out of the groups, or replaced there by their host."""
        kept = {p for group in self.param_groups for p in group["params"]}
        for p in [p for p in self.state if p not in kept]:
            del self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. Collective: every rank of every domain takes it.

        A parameter whose gradient is None on all ranks is left alone, decay included; None on some counts as zero there. Where
        ranks hold equal pieces, all of them or none must have the gradient: else the step is skipped like one that isn't finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.bind()
        grads = [local_gradient(member.name, member.tensor) for member in self._members]
        self._engine.step(self._unscaled(grads), self.param_groups)
        return loss

    def _unscaled(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Divided by the scale of a `torch.amp.GradScaler`, which hands the whole step on and leaves it to all ranks together."""
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            return grads
        reciprocal = scale.double().reciprocal().float()
        inverses = {device: reciprocal.to(device) for device in {g.device for g in grads if g is not None}}
        return [
            None if g is None else (g if g.dtype in (torch.float32, torch.float64) else g.float()).mul_(inverses[g.device]) for g in grads
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every torch optimizer. Ranks that have come here unequally often are found at the next step."""
        super().zero_grad(set_to_none)
        self._engine.count_reset()

    # ----------------------------------------------------------------------------------------------------- state dicts

    def consolidate(self) -> None:
        """Bring the momentum of replicated parameters to every rank, so that `state_dict()` is complete on all. Collective.

        The next step lets the copies go again. Sharded parameters need no consolidation.
        """
        self.bind()
        self._engine.consolidate()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """`consolidate()` by the name that torch's ZeroRedundancyOptimizer gave it, and Lightning calls; complete on all ranks."""
        self.consolidate()

    def state_dict(self) -> dict[str, Any]:
        """The state per parameter, each in its parameter's own sharding. Never communicates.

        Raises:
            RuntimeError: replicated parameters' momentum lives with other ranks; call `consolidate()` on all ranks first.
        """
        self._collect()
        self._drop_state_of_others()
        self._declare_all()
        missing = 0
        complete: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for p, entry in self.state.items():
            complete[p] = dict(entry)
            for key, value in entry.items():
                missing += is_elsewhere(value)
                if is_unset(value):
                    complete[p][key] = torch.zeros((), dtype=torch.float32, device="cpu") if key == "step" else torch.zeros_like(p)
        if missing:
            raise RuntimeError(
                f"the momentum of {missing} replicated parameters lives with their owner ranks, so this state dict would be "
                "incomplete. Call optimizer.consolidate() on all ranks first (of what accelerate has prepared: "
                "optimizer.optimizer.consolidate()); then state_dict() is complete on each. Or construct with replicate_momentum=True"
            )
        own, self.state = self.state, complete  # hooks see what is returned
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of `torch.optim.Muon`. Doesn't communicate.

        Momentum of replicated parameters is expected whole on every rank, as `consolidate()` leaves it.
        """
        self._collect()  # into the state that is replaced
        loaded: dict[str, Any] = {}

        def translate(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            for group in self.param_groups:
                self._routed(group)  # names follow the parameters
            loaded.update(translate_state(given, self.param_groups))
            return loaded

        translation = self.register_load_state_dict_pre_hook(translate)  # the last hook, after those that repair old formats
        try:
            super().load_state_dict(state_dict)
        finally:
            translation.remove()
        # the base class casts all state to its parameter's dtype, where these numbers would lose their meaning
        kept_by_name = {value.name for rule in RULES.values() for value in rule.of_matrices}
        ids = (i for group in loaded["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            entry = loaded["state"].get(i, {})
            if isinstance(rows := entry.get("spectrum"), Tensor):
                self.state[p]["spectrum"] = rows.detach().to("cpu", torch.float64, copy=True)
            for key in kept_by_name & entry.keys():
                self.state[p][key] = entry[key].detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        self._declare_all()
        self._engine.unbind()  # the next step checks what was loaded and agrees again

    def _collect(self) -> None:
        """Bring measurements that are under way into the state."""
        for member in self._members:
            member.state = self.state[member.tensor]
        self._engine.collect()

    def _declare_all(self) -> None:
        for group in self.param_groups:
            self._declare(group)

    def __getstate__(self) -> dict[str, Any]:
        self._collect()
        placed = self._detached or self._process_group is not None or bool(self._layouts)
        own = {
            "options": self._options,
            "nonfinite": self._nonfinite,
            "replicate_momentum": self._replicate_momentum,
            "detached": placed,
            "telemetry": self._telemetry,
        }
        return {**super().__getstate__(), "muon_dist": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("muon_dist", None)
        super().__setstate__(state)
        if own is not None:  # unpickled: process groups and layouts don't travel
            self._options, self._nonfinite, self._telemetry = own["options"], own["nonfinite"], own["telemetry"]
            self._replicate_momentum = own["replicate_momentum"]
            self._start_unbound(None, {})
            self._detached = own["detached"]
            self._reading = True


def _warn_of_halves(given: Any, made: int) -> None:
    """Say that groups were divided, before a scheduler with one value for each of those that were given complains of their number."""
    several = [item for item in given if isinstance(item, dict)]
    if len(several) > 1 and made > len(several):
        warnings.warn(
            f"{len(several)} parameter groups became {made}: Muon's part and AdamW's part of a group are groups of their own. What takes "
            "one value per group, such as LambdaLR, needs one for each of optimizer.param_groups; groups with 'algorithm' stay whole",
            stacklevel=3,
        )


def _under_accelerate() -> bool:
    """Whether Hugging Face accelerate runs this process: it asks for state dicts where not all ranks take part."""
    state = sys.modules.get("accelerate.state")
    return state is not None and bool(state.PartialState._shared_state)
