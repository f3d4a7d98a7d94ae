"""A plan in tables: what a step costs every rank, how Newton–Schulz is taken per shape, and what the scaling laws predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..planner.plan import forms, over_five
from ..sharding.plan import Plan
from ..sharding.tasks import SLICED
from ..spectrum.policy import ACCURACY, Policy
from .table import si, table


def report(plan: Plan, state: Sequence[int], adamw: Sequence[int], *, bucket_mb: float, model_flops: float, tokens: int) -> None:
    """Print what a step costs every rank: least, mean and most; how even it is; and the share of the model's FLOPs."""
    loads = plan.loads()

    def spread(values: Sequence[int], unit: str) -> tuple[str, str, str]:
        return si(min(values), unit), si(sum(values) / len(values), unit), si(max(values), unit)

    sliced = plan.owners.count(SLICED)
    print(
        f"{len(plan.matrices)} matrices, {len(set(plan.owners) - {SLICED})} owners, "
        f"{f'{sliced} matrices sliced over all ranks, ' if sliced else ''}"
        f"{len(plan.buckets)} buckets of up to {bucket_mb:g} MiB per owner\n"
    )
    rows = [
        ("FLOPs", *spread([load.flops for load in loads], "FLOP")),
        ("bytes sent", *spread([load.bytes_sent for load in loads], "B")),
        ("bytes received", *spread([load.bytes_received for load in loads], "B")),
        ("optimizer state", *spread(state, "B")),
        ("AdamW's state would be", *spread(adamw, "B")),
        ("peak of temporary memory", *spread([load.peak_bytes for load in loads], "B")),
    ]
    print(table(("per rank and step", "least", "mean", "most"), rows, right=(1, 2, 3)))
    listed = [("{} × {}".format(*f["shape"]), f["matrices"], f["form"], si(f["flops"], "FLOP")) for f in forms(plan)]
    print()
    print(table(("matrix", "count", "Newton–Schulz", "each"), listed, right=(1, 3)))
    print(f"\nimbalance {plan.imbalance():.3f} (busiest over mean); the largest matrix allows {plan.imbalance_lower_bound():.3f} at best")
    total, busiest = sum(load.flops for load in loads), max(load.flops for load in loads) * plan.n_ranks
    print(
        f"Newton–Schulz: {si(total, 'FLOP')} a step, {total / model_flops:.2%} of the model's at {si(tokens)} tokens; "
        f"{busiest / model_flops:.2%} as seen by the busiest rank"
    )
    print("Wire in bf16, state in fp32 without masters. Everything here is computed from shapes; nothing was measured.")


def report_laws(plan: Plan, predicted: list[dict[str, Any]], policy: Policy) -> None:
    """Steps and deflation per kind and depth, the errors they leave, and their cost against five Jordan steps."""
    rows = []
    for r in predicted:
        depth = "last block" if r["depth"] == 1 else f"up to {r['depth']:.2f}"
        sigma = f"{r['sigma']:.1e} ×/÷ {math.exp(r['deviation']):.2f}"
        rows.append(
            (
                r["kind"],
                depth,
                r["rank"],
                r["matrices"],
                sigma,
                _span(r["steps"]),
                _span(r["deflation"]),
                f"{r['error']:.2f}",
                f"{r['five']:.2f}",
            )
        )
    header = ("kind", "depth", "rank", "matrices", "σ at .5 / ‖M‖_F", "steps", "deflated", "error", "of five Jordan steps")
    wanted = f"coverage {policy.coverage:g}" if policy.coverage is not None else f"accuracy {policy.accuracy or ACCURACY}"
    print(f"\nSchedules for {wanted} by the shipped scaling laws (σ: of the last block in each row's range; errors: the largest):")
    print(table(header, rows, right=(2, 3, 5, 6, 7, 8)))
    print(f"Newton–Schulz: {over_five(plan):.2f}× the FLOPs of five Jordan steps, before anything is measured.")
    print("The laws were fitted on GPT-2 style models of 77M to 2.8B parameters; beyond, they are extrapolated.")


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"
