"""Checkpoints that an earlier version wrote, one of each host: they load bit for bit, and training goes on from them as it did then.

`saved/` has each checkpoint, and in a file of JSON beside it the SHA-256 of every tensor in it and the norms of the parameters three
steps later. They were written by the commit before the engine, on another CPU than yours perhaps, whence the tolerance of the norms.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from muon_dist import MuonDist

from . import models
from . import test_deepspeed_checkpoints as deepspeed
from . import test_megatron_checkpoints as megatron
from .ranks import run_ranks
from .test_edited_state import made, train

SAVED = Path(__file__).parent / "saved"
Tensors = dict[str, Tensor]


def check(name: str, loaded: Tensors, end: Tensors) -> None:
    """Hold what was loaded, and the parameters three steps later, against what the earlier version had."""
    known = json.loads((SAVED / f"{name}.json").read_text())
    digests = {key: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for key, t in loaded.items()}
    assert digests == known["saved"]
    norms = {key: float(t.double().norm()) for key, t in end.items() if key.endswith("value")}
    assert norms == pytest.approx(known["end"], rel=1e-4)


def of(model: torch.nn.Module, optimizer: MuonDist) -> Tensors:
    """State and parameters, whole, by name."""
    values = {f"{name}: value": p for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        values.update({f"{name}: {key}": value for key, value in optimizer.state[p].items()})
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in values.items()}


def test_torch() -> None:
    model, optimizer = made()
    saved = torch.load(SAVED / "torch" / "state.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loaded = of(model, optimizer)
    train(model, optimizer, range(6, 9))
    check("torch", loaded, of(model, optimizer))


def fsdp2() -> tuple[Tensors, Tensors]:
    torch.manual_seed(1)
    model = models.place(models.make_bank(models.ODD[:3], torch.float32), "fsdp2")
    optimizer = MuonDist(model.named_parameters(), lr=0.05, burn_in=1, measure_every=2)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=SAVED / "fsdp2")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    loaded = of(model, optimizer)
    for seed in range(5, 8):
        model.zero_grad()
        model(seed).backward()
        optimizer.step()
    return loaded, of(model, optimizer)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fsdp2(world: int) -> None:
    """Two ranks wrote it."""
    check("fsdp2", *run_ranks(world, fsdp2)[0])


def test_deepspeed() -> None:
    check("deepspeed", *run_ranks(1, deepspeed.resumed, 2, "fp32", 1, str(SAVED / "deepspeed"), False)[0])


@pytest.mark.parametrize("name", ["megatron", "megatron_flat"])
def test_megatron(name: str) -> None:
    sizes: dict[str, Any] = {"layers": 1, "hidden": 16, "heads": 2, "groups": 1, "ffn": 24, "vocabulary": 32}
    flat = name == "megatron_flat"
    setup = megatron.Setup(distributed_optimizer=flat, **sizes)
    check(name, *run_ranks(1, megatron.resumed, setup, "fully_reshardable" if flat else "", str(SAVED / name))[0])
