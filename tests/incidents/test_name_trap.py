"""The name trap: DeepSpeed applies its own Muon to the gradients of any optimizer that is called something with "muon".

It asks for the class's name and for `p.use_muon`, a tag that is set by configs of its own Muon and by user code. Seen in 0.19.8 at stages
1 and 2: the optimizer gets orthogonalised gradients and a momentum of the wrong size. Ours takes the tags away, and refuses later ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


class Plain(torch.optim.Optimizer):
    """Gradient descent; "momentum" is there because DeepSpeed's Muon reads it from the group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


class MyMuon(Plain):
    pass


def tagged() -> nn.Module:
    model = hosts.make_net()
    for name, p in model.named_parameters():
        p.use_muon = name in hosts.MATRICES
    return model


def trapped(stage: int) -> tuple[float, dict[str, float], str]:
    """How far MyMuon's update is from Plain's, the same code; errors of ours on the same tagged model; what a later tag gives."""
    sgd = []
    for kind in (Plain, MyMuon):
        ds_config = hosts.config(stage, zero_allow_untested_optimizer=True)
        del ds_config["optimizer"]
        model = tagged()
        groups = [[p for p in model.parameters() if p.use_muon is wanted] for wanted in (True, False)]
        engine = hosts.start(ds_config, model, optimizer=kind([{"params": group} for group in groups]))
        before = theirs.whole(engine)
        hosts.train_step(engine, 0)
        after = theirs.whole(engine)
        sgd.append({name: after[name] - before[name] for name in hosts.MATRICES})
    ds_config = hosts.config(stage)
    engine = hosts.start(ds_config, tagged())
    errors = hosts.update_errors(engine, ds_config["optimizer"]["params"], 2)
    late = hosts.start(ds_config)
    for p in late.module.parameters():
        p.use_muon = True
    message = ""
    try:
        late.basic_optimizer.bind()
    except ValueError as error:
        message = str(error)
    return theirs.differs(sgd[1], sgd[0]), errors, message


@pytest.mark.parametrize("stage", [1, 2])
def test_tags_do_not_reach_our_gradients(stage: int) -> None:
    for fault, errors, message in run_ranks(2, trapped, stage):
        assert fault > 0.5
        assert max(errors.values()) < 2e-5
        assert "use_muon=True" in message and "leave it unset" in message
