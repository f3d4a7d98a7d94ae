"""`muon-dist inspect MODEL`: every parameter's route, the reason, how it is read as matrices, and its scale."""

from __future__ import annotations

import math
from typing import Any

from ..planner.models import model_parameters
from ..polar.matrix_view import matrices_of
from ..polar.scaling import update_scale
from ..show.table import si, table, write_json


def run(model: str, adjust_lr_fn: str, json_path: str | None) -> int:
    parameters = model_parameters(model)
    rows, records = [], []
    totals: dict[str, int] = {}
    for p in parameters:
        numel = math.prod(p.shape)
        totals[p.route.algorithm] = totals.get(p.route.algorithm, 0) + numel
        record: dict[str, Any] = {"name": p.name, "shape": list(p.shape), "route": p.route.algorithm, "reason": p.route.reason}
        view, scale = "", ""
        if p.route.view is not None:
            matrices = matrices_of(p.shape, p.route.view, p.name)
            shapes = sorted({(m.rows, m.cols) for m in matrices}, reverse=True)
            scales = [update_scale(adjust_lr_fn, *s) for s in shapes]
            view = f"{len(matrices)} of " + ", ".join(f"{r}×{c}" for r, c in shapes)
            scale = ", ".join(f"{s:.3g}" for s in scales)
            record.update(matrices=[[m.rows, m.cols] for m in matrices], scales=scales)
        rows.append((p.name, "×".join(map(str, p.shape)), p.route.algorithm, view, scale, p.route.reason))
        records.append(record)
    print(table(("parameter", "shape", "route", "matrices", "lr scale", "reason"), rows))
    total = sum(totals.values())
    print()
    for algorithm, numel in sorted(totals.items()):
        print(f"{algorithm}: {si(numel)} parameters, {numel / total:.1%}")
    write_json(json_path, {"model": model, "adjust_lr_fn": adjust_lr_fn, "parameters": records, "totals": totals})
    return 0
