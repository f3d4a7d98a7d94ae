"""`muon-dist plan CONFIG --dp N --tp N --zero STAGE`: owners, balance, bytes and memory, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ..groups import PlanOptions
from ..planner.models import active_share, model_parameters
from ..planner.plan import forms, plan_model, predict
from ..show.plan import report, report_laws
from ..show.table import si, write_json
from ..spectrum.policy import Policy


def run(
    config: str,
    *,
    dp: int,
    tp: int,
    zero: int,
    ns_steps: int,
    options: PlanOptions,
    tokens: int,
    laws: bool,
    policy: Policy,
    rule: str,
    json_path: str | None,
) -> int:
    if tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {tokens}")
    parameters = model_parameters(config)
    schedules, predicted = predict(parameters, policy) if laws else (None, [])
    plan, state, adamw = plan_model(parameters, dp=dp, tp=tp, zero=zero, ns_steps=ns_steps, options=options, schedules=schedules, rule=rule)
    loads = plan.loads()
    total = sum(load.flops for load in loads)
    numel = sum(math.prod(p.shape) for p in parameters)
    model_flops = int(6 * numel * active_share(config, parameters) * tokens)
    content: dict[str, Any] = {
        "model": config,
        "dp": dp,
        "tp": tp,
        "zero": zero,
        "ns_steps": "laws" if laws else ns_steps,
        "predicted": predicted,
        **asdict(options),
        "tokens_per_step": tokens,
        "parameters": numel,
        "ns_flops": total,
        "model_flops": model_flops,
        "buckets": len(plan.buckets),
        "imbalance": plan.imbalance(),
        "imbalance_lower_bound": plan.imbalance_lower_bound(),
        "forms": forms(plan),
        "matrices": [
            {"name": t.name, "shape": list(t.shape), "owner": o, "flops": t.flops} for t, o in zip(plan.matrices, plan.owners, strict=True)
        ],
        "ranks": [
            {
                "flops": load.flops,
                "bytes_sent": load.bytes_sent,
                "bytes_received": load.bytes_received,
                "state_bytes": s,
                "adamw_state_bytes": a,
                "peak_bytes": load.peak_bytes,
            }
            for load, s, a in zip(loads, state, adamw, strict=True)
        ],
    }

    steps = "predicted" if laws else ns_steps
    print(f"{config}: {si(numel)} parameters on {plan.n_ranks} ranks (dp {dp} × tp {tp}, ZeRO {zero}), {steps} Newton–Schulz steps")
    report(plan, state, adamw, bucket_mb=options.bucket_mb, model_flops=model_flops, tokens=tokens)
    if laws:
        report_laws(plan, predicted, policy)
    write_json(json_path, content)
    return 0
