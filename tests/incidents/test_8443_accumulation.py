"""DeepSpeed #8443: at stage 3 momentum advanced, and Newton–Schulz ran, once per micro-batch; the updates were added up.

Repaired before 0.19.8, which waits for the boundary; BROKEN does to each micro-batch's gradient what was done to it.
"""

import pytest
import torch
from torch import Tensor

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from ..reference import JORDAN, orthogonalize
from . import theirs


def updates(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A step of one batch in four micro-batches: BROKEN's, ours, and the momentum that ours kept over (1 − β) times the gradient."""
    model, micro = hosts.make_net(), 4
    broken = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in hosts.MATRICES}
    buffers = {name: torch.zeros_like(t) for name, t in broken.items()}
    total = {name: torch.zeros_like(t) for name, t in broken.items()}
    for k in range(micro):
        model.zero_grad()
        (model(hosts.batch(0, 0, k)) / micro).backward()
        for name, p in model.named_parameters():
            if name in broken:
                buffers[name].lerp_(p.grad, 0.05)  # BROKEN: once per micro-batch
                broken[name] += orthogonalize(p.grad.lerp(buffers[name], 0.95), [JORDAN] * 5)
                total[name] += p.grad
    ds_config = hosts.config(stage, params={"adjust_lr_fn": "none", "lr": 1.0}, gradient_accumulation_steps=micro, gradient_clipping=0.0)
    engine = hosts.start(ds_config)
    before = hosts.values_of(engine)
    hosts.train_step(engine, 0)
    after, state = hosts.values_of(engine), engine.basic_optimizer.state
    ours = {name: before[name] - after[name] for name in broken}
    momentum = hosts.gather_whole(engine, lambda s, p: hosts.piece_of(s, p, state[s.tensor].get("momentum_buffer")))
    return broken, ours, {name: momentum[name] / 0.05 - total[name] for name in broken}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_momentum_advances_once_per_optimizer_step(stage: int) -> None:
    [(broken, ours, off)] = run_ranks(1, updates, stage)
    assert theirs.size(broken) > 2.5 * theirs.size(ours)
    for name, update in ours.items():
        assert torch.linalg.svdvals(update)[0] < 1.3  # one orthogonalised matrix, not four
        assert off[name].norm() < 1e-5
