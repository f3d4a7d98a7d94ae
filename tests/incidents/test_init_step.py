"""Stage 0 in half precision: DeepSpeed's wrapper calls `step()` once while it is built, with zero gradients.

An optimizer that takes it for a real one decays every weight and counts a step before training. Seen in 0.19.8.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks


class Decaying(torch.optim.SGD):
    """Counts its steps."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


def at_the_start(decay: float) -> tuple[int, float, float, list[float], bool]:
    """Calls before training; what the masters shrank by: the naive optimizer's, ours; our state."""
    shrunk, calls, counts, moved = [], 0, [], False
    for ours in (False, True):
        ds_config, model, options = hosts.config(0, dtype="bf16", params={"weight_decay": decay}), hosts.make_net(), {}
        if not ours:
            del ds_config["optimizer"]
            options["optimizer"] = Decaying(model.parameters(), lr=0.5, weight_decay=decay)
        whole = torch.cat([p.detach().bfloat16().float().flatten() for p in model.parameters()])
        engine = hosts.start(ds_config, model, **options)
        masters = torch.cat([p.detach().flatten() for group in engine.optimizer.fp32_groups for p in group])
        shrunk.append(float(masters.norm() / whole.norm()))
        if ours:
            state = engine.basic_optimizer.state.values()
            counts = [float(entry["step"]) for entry in state if "step" in entry]
            moved = any(bool(t.any()) for entry in state for key, t in entry.items() if key != "step")
        else:
            calls = engine.basic_optimizer.calls
    return calls, shrunk[0], shrunk[1], counts, moved


def test_a_dry_step_changes_nothing() -> None:
    for calls, fault, ours, counts, moved in run_ranks(1, at_the_start, 0.2):
        assert calls == 1 and abs(fault - 0.9) < 1e-3
        assert abs(ours - 1) < 1e-6 and set(counts) == {0.0} and not moved
