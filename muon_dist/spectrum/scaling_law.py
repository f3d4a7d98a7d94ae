"""Scaling laws of momentum's singular values: σ_q = C·M^−α for each kind of layer and depth, fitted, and what they predict.

Two forms: against the number of parameters M, as the source states it; and rank-normalised, σ_q·√r against the rank r, which
transfers far better between shapes, since a wider matrix spreads its energy over more directions. The laws that ship are fitted
from quantiles_2606_04058.csv beside this file: Magakyan, Parrilo & Ozdaglar, Spectral Scaling Laws of Muon (arXiv 2606.04058),
GPT-2 style models of 77M to 2.8B parameters, values read off the published figure.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .moments import Spectrum, spectrum_from_quantiles

SHIPPED = Path(__file__).with_name("quantiles_2606_04058.csv")
COLUMNS = ("kind", "depth", "params", "rank", "q", "sigma")
KINDS = ("q", "k", "v", "o", "up", "down")

# Rank-normalised laws are followed this far beyond the ranks they were fitted on, in ln r; further out they stand still
BEYOND = 2.0


@dataclass(frozen=True)
class Observation:
    """One measured quantile: σ_q/‖M‖_F of a kind of layer at a relative depth (block number over blocks, 1 is the last)."""

    kind: str
    depth: float
    params: float
    rank: int
    q: float
    sigma: float


@dataclass(frozen=True)
class PowerLaw:
    """ln y = intercept − alpha·(ln x − centre), fitted by least squares.

    Attributes:
        deviation: of a single ln y around the line; nan where there were only two sizes.
        alpha_deviation: one standard error of alpha.
        count, spread: number of sizes, and Σ(ln x − centre)².
        lowest, highest: range of ln x.
    """

    intercept: float
    alpha: float
    centre: float
    deviation: float
    alpha_deviation: float
    count: int
    spread: float
    lowest: float
    highest: float

    @property
    def constant(self) -> float:
        """C of y = C·x^−alpha."""
        return math.exp(self.intercept + self.alpha * self.centre)

    def predict(self, x: float) -> tuple[float, float]:
        """y at x, and one standard deviation of ln y for a new model there."""
        away = math.log(x) - self.centre
        return math.exp(self.intercept - self.alpha * away), self.deviation * math.sqrt(1 + 1 / self.count + away**2 / self.spread)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit ln y = intercept − alpha·(ln x − centre).

    Raises:
        ValueError: fewer than two sizes, or values that are not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(x, default=0) <= 0 or min(y, default=0) <= 0:
        raise ValueError(f"a power law needs positive values at two or more sizes, got x={list(x)}, y={list(y)}")
    ln_x, ln_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centre = float(ln_x.mean())
    spread = float(((ln_x - centre) ** 2).sum())
    alpha = -float((ln_x - centre) @ ln_y) / spread
    residual = ln_y - (ln_y.mean() - alpha * (ln_x - centre))
    deviation = math.sqrt(float(residual @ residual) / (len(x) - 2)) if len(x) > 2 else math.nan
    return PowerLaw(
        intercept=float(ln_y.mean()),
        alpha=alpha,
        centre=centre,
        deviation=deviation,
        alpha_deviation=deviation / math.sqrt(spread),
        count=len(x),
        spread=spread,
        lowest=float(ln_x.min()),
        highest=float(ln_x.max()),
    )


@dataclass(frozen=True)
class Law:
    """What was fitted for one kind, depth and q: against parameters, and rank-normalised."""

    kind: str
    depth: float
    q: float
    by_params: PowerLaw
    by_rank: PowerLaw  # of σ·√r against r


class ScalingLaws:
    """The laws of all kinds and depths that were observed at two or more sizes."""

    def __init__(self, observations: Iterable[Observation]) -> None:
        grouped: dict[tuple[str, float, float], list[Observation]] = {}
        for o in observations:
            grouped.setdefault((o.kind, o.depth, o.q), []).append(o)
        self.laws: list[Law] = []
        for (kind, depth, q), seen in sorted(grouped.items()):
            if len({o.rank for o in seen}) < 2 or len({o.params for o in seen}) < 2:
                continue
            sigma = [o.sigma for o in seen]
            normalised = [o.sigma * math.sqrt(o.rank) for o in seen]
            self.laws.append(
                Law(
                    kind,
                    depth,
                    q,
                    fit_power_law([o.params for o in seen], sigma),
                    fit_power_law([o.rank for o in seen], normalised),
                )
            )
        if not self.laws:
            raise ValueError("a law needs the same kind of layer at the same depth in models of two or more sizes")
        self._by_place: dict[tuple[str, float], dict[float, Law]] = {}
        for law in self.laws:
            self._by_place.setdefault((law.kind, law.depth), {})[law.q] = law

    def quantiles(self, kind: str | None, depth: float, rank: int) -> dict[float, tuple[float, float]]:
        """q -> (σ_q/‖M‖_F, one standard deviation of ln σ_q) by the rank-normalised laws, between depths interpolated.

        A kind that was not observed gets the mean of all kinds, with their scatter.
        """
        if not 0 <= depth <= 1 or rank < 1:
            raise ValueError(f"a relative depth lies in [0, 1] and a rank is at least 1, got {depth} and {rank}")
        kinds = [kind] if kind is not None and any(k == kind for k, _ in self._by_place) else sorted({k for k, _ in self._by_place})
        each = [self._of_kind(k, depth, rank) for k in kinds]
        result = {}
        for q in sorted({q for found in each for q in found}):
            logs = np.array([math.log(found[q][0]) for found in each if q in found])
            deviations = np.array([found[q][1] for found in each if q in found])
            result[q] = (math.exp(logs.mean()), float(np.sqrt(np.mean(deviations**2) + logs.var())))
        return result

    def _of_kind(self, kind: str, depth: float, rank: int) -> dict[float, tuple[float, float]]:
        depths = sorted(d for k, d in self._by_place if k == kind)
        if kind == "down":  # the figure shows it at late depths only; before that the MLP's matrices are alike
            depths = sorted({*depths, *(d for k, d in self._by_place if k == "up" and d < min(depths))})
        below = max((d for d in depths if d <= depth), default=depths[0])
        above = min((d for d in depths if d >= depth), default=depths[-1])
        share = (depth - below) / (above - below) if above > below else 0.0
        lower, upper = (self._by_place.get((kind, d)) or self._by_place[("up", d)] for d in (below, above))
        result = {}
        for q in lower.keys() & upper.keys():
            a, b = (self._at_rank(laws[q].by_rank, rank) for laws in (lower, upper))
            ln_sigma = (1 - share) * math.log(a[0]) + share * math.log(b[0])
            result[q] = (math.exp(ln_sigma) / math.sqrt(rank), (1 - share) * a[1] + share * b[1])
        return result

    @staticmethod
    def _at_rank(law: PowerLaw, rank: int) -> tuple[float, float]:
        return law.predict(math.exp(min(max(math.log(rank), law.lowest - BEYOND), law.highest + BEYOND)))

    def spectrum(self, kind: str | None, depth: float, rank: int, *, caution: float = 0.0) -> Spectrum:
        """The spectrum that the laws predict for a matrix; every quantile `caution` standard deviations lower."""
        predicted = self.quantiles(kind, depth, rank)
        return spectrum_from_quantiles({q: value * math.exp(-caution * deviation) for q, (value, deviation) in predicted.items()}, rank)


def read_observations(path: str | Path) -> list[Observation]:
    """Observations from a CSV with the columns kind, depth, params, rank, q, sigma; lines that begin with # are comments.

    Raises:
        ValueError: an unreadable file, missing columns or malformed values.
    """
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise ValueError(f"can't read {path}: {error}") from error
    rows = list(csv.DictReader(lines))
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)} and at least one row")
    try:
        return [
            Observation(r["kind"], float(r["depth"]), float(r["params"]), int(float(r["rank"])), float(r["q"]), float(r["sigma"]))
            for r in rows
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@functools.cache
def shipped_laws() -> ScalingLaws:
    """The laws of the paper's figure."""
    return ScalingLaws(read_observations(SHIPPED))


# What a matrix is, from the names that GPT-2, Llama, Megatron and their relatives use. The first match counts.
_FUSED = (
    (re.compile(r"(qkv|query_key_value|c_attn|Wqkv|in_proj)"), ("q", "k", "v")),
    (re.compile(r"(gate_up|gate_and_up|w13|dense_h_to_4h|linear_fc1)"), ("up", "up")),
)
_SINGLE = (
    (
        re.compile(r"(mlp|ffn|feed_forward|experts?|moe)\.(.*\.)?(c_proj|fc2|w2|proj|out)\b|down|(^|[._])dn([._]|$)|dense_4h_to_h|fc2"),
        "down",
    ),
    (re.compile(r"(^|[._])(up|gate|c_fc|fc1|w1|w3|wi|fc_in|up_proj|gate_proj|linear_fc1)([._]|$)|dense_h_to_4h"), "up"),
    (re.compile(r"(^|[._])(q|wq|q_proj|query|to_q)([._]|$)"), "q"),
    (re.compile(r"(^|[._])(k|wk|k_proj|key|to_k)([._]|$)"), "k"),
    (re.compile(r"(^|[._])(v|wv|v_proj|value|to_v)([._]|$)"), "v"),
    (re.compile(r"(^|[._])(o|wo|o_proj|out_proj|c_proj|proj|to_out|dense|linear_proj)([._]|$)"), "o"),
)


def layer_kind(name: str, part: int = 0, parts: int = 1) -> str | None:
    """ "q", "k", "v", "o", "up", "down" or None, from a parameter's name and which of its `parts` matrices is meant."""
    if parts > 1:
        for pattern, kinds in _FUSED:
            if pattern.search(name):
                return kinds[part] if parts == len(kinds) else None
    return next((kind for pattern, kind in _SINGLE if pattern.search(name)), None)


def relative_depths(names: Sequence[str]) -> list[float]:
    """Where each parameter's block stands: (number + 1) / blocks, from the first number in the names; 1 without one."""
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    blocks: dict[str, int] = {}
    for name, found in zip(names, numbers, strict=True):
        if found:
            prefix = name[: found.start()]
            blocks[prefix] = max(blocks.get(prefix, 0), int(found.group(1)) + 1)
    return [
        1.0 if found is None else (int(found.group(1)) + 1) / blocks[name[: found.start()]]
        for name, found in zip(names, numbers, strict=True)
    ]
