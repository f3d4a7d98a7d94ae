"""The optimizer inside each of Megatron's wrappers, in place of the Adam that these were built for."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from muon_dist.groups import read_groups
from muon_dist.polar.polynomials import Schedule
from muon_dist.polar.products import product_settings
from muon_dist.rendezvous import gather_objects
from muon_dist.rules import RULES, Rule, matrix_rule
from muon_dist.sharding.plan import Plan
from muon_dist.telemetry import Telemetry

from ..host_views import HostView, HostViews, OfMatrices, new_state
from ..settings import DEFAULTS, naming
from .parameters import Described
from .settings import FLAGS, MuonDistSettings, plan_options
from .wrappers import Piece, absent, pieces, whole_piece

# What saved groups carry of ours: Megatron's wrappers pass groups through as they are
SAVED = "muon_dist"

# Of a checkpoint that Megatron's Adam or Muon wrote
FOREIGN = (
    "this checkpoint's optimizer state is not MuonDist's in this form: it was written by another optimizer, or with the distributed "
    "optimizer where this run has none, or the other way round. To start from its weights alone: --no-load-optim, or --finetune"
)


class WrappedMuonDist(torch.optim.Optimizer):
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
        self._wrapper, self.described, self._given, self._config = wrapper, described, dict(given), config
        self.pieces = pieces(wrapper)
        for piece in self.pieces:
            self.state[piece.tensor] = new_state(piece.tensor, self._rule_of(described[piece.parameter]))
        self._elsewhere: dict[Tensor, dict[str, Tensor]] = {}  # state of empty tensors, for parameters of which nothing lies here
        self._of_matrices: OfMatrices = {}
        self._groups: list[dict[str, Any]] = []  # MuonDist's own: one for each of Megatron's, algorithm and split
        self._numbers: dict[tuple[int, str, tuple[int, ...] | None], int] = {}  # of which they are
        self._part: HostViews | None = None
        self._bound = False
        self._happens: Tensor | None = None
        self.telemetry: Telemetry | None = None
        self.all_names: Sequence[str] = ()
        self.model_numel = 0
        self.of_others: OfMatrices = {}  # of parameters that other ranks have, for a checkpoint that is being written
        self.others_step = 0  # taken by other ranks, where this one has nothing; for such a checkpoint, too
        self._loaded_step = 0.0

    # --------------------------------------------------------------------------------------------------------- binding

    def _bind(self) -> HostViews | None:
        """The views of what the wrapper holds; None where nothing is, as on a pipeline stage without experts.

        Collective at the first call, which compares them with the model's values.
        """
        if self._bound:
            return self._part
        found = [(piece, self.described[piece.parameter]) for piece in self.pieces]
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
            self._of_matrices,
            options=plan_options(self._config),
            host_decides=True,
            telemetry=self.telemetry,
            all_names=self.all_names,
            model_numel=self.model_numel,
        )
        self._bound = True
        return self._part

    def _rule_of(self, described: Described) -> Rule:
        return matrix_rule(self._given["rule"]) if described.route.algorithm == "muon" else RULES[described.route.algorithm]

    def _empty_pieces(self) -> list[tuple[Piece, Described]]:
        """Pieces of the parameters of which nothing lies here; the ranks that hold some know their groups. Collective."""
        if not isinstance(self._wrapper, DistributedOptimizer):
            return []
        ranks = self._wrapper.data_parallel_group
        told = gather_objects({self.described[piece.parameter].name: piece.group for piece in self.pieces}, ranks)
        known = {name: number for each in told for name, number in each.items()}
        result = []
        for p in absent(self._wrapper, self.pieces):
            described = self.described[p]
            empty = torch.empty(0, dtype=torch.float32, device=p.device)
            self._elsewhere[empty] = {
                **new_state(empty, self._rule_of(described)),
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
        return (piece.tensor.grad for piece in self.pieces if piece.tensor.grad is not None)

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

    def of_matrices(self) -> OfMatrices:
        """What is kept of this rank's matrices, by key ("spectrum", and what the rule declares) and name, with what is under way."""
        if self._part is not None:
            self._part.engine.collect()
        own = {described.name for described in self.described.values()}
        return {key: {name: value for name, value in known.items() if name in own} for key, known in self._of_matrices.items()}

    def state_dict(self) -> dict[str, Any]:
        """State by tensor, in the tensors' shapes, and groups that carry the step count and the spectra. Never communicates."""
        packed = super().state_dict()
        # every rank compares and loads the count, which has no place on a device of one of them
        state = {key: {**entry, "step": entry["step"].cpu()} for key, entry in packed["state"].items()}
        step = max(self.steps_taken, self.others_step)
        known = merged([self.of_others, self.of_matrices()])
        spectra = {name: _numbers(rows) for name, rows in known.pop("spectrum", {}).items()}
        more = {key: {name: _packed(value) for name, value in by_name.items()} for key, by_name in known.items()}
        kept = json.dumps({"muon": sorted(self.all_names), "rule": self._given["rule"], "spectra": spectra, "of_matrices": more})
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
        if kept and kept.get("rule", "muon") != self._given["rule"]:
            raise ValueError(
                f"this checkpoint was saved with --muon-rule {kept.get('rule', 'muon')}, and this run has {self._given['rule']}, which "
                "keeps other state. Give the flag as it was saved, or start from the weights alone: --no-load-optim"
            )
        for described in (self.described[piece.parameter] for piece in self.pieces):
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
        self._of_matrices.setdefault("spectrum", {}).update({name: _rows(rows) for name, rows in kept.get("spectra", {}).items()})
        for key, by_name in kept.get("of_matrices", {}).items():
            self._of_matrices.setdefault(key, {}).update({name: _unpacked(value) for name, value in by_name.items()})
        self._loaded_step = step
        for state in (*self.state.values(), *self._elsewhere.values()):  # Megatron has one count for all
            device = next(iter(state.values())).device
            state["step"] = torch.full((), step, dtype=torch.float32, device=device)


def _numbers(rows: Tensor) -> list[list[float | None]]:
    """Rows of a spectrum as plain numbers, None where nothing was measured: Megatron compares what ranks save, and NaN is not equal."""
    return [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]


def _packed(values: Tensor) -> str:
    """fp32 numbers as text."""
    return base64.b64encode(values.detach().to("cpu", torch.float32).numpy().tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def merged(several: Sequence[OfMatrices]) -> OfMatrices:
    """What is known of all matrices together."""
    result: OfMatrices = {}
    for each in several:
        for key, by_name in each.items():
            result.setdefault(key, {}).update(by_name)
    return result


def _rows(numbers: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in numbers], dtype=torch.float64, device="cpu")


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    """torch's precision of that name for fp32 products; for "low" and "medium" Newton–Schulz is in bf16, and nothing else multiplies."""
    asked = {"high": {"fp32_precision": "tf32"}, "highest": {"fp32_precision": "ieee"}}.get(wanted, {})
    with product_settings("cpu", asked), product_settings("cuda", asked):
        yield
