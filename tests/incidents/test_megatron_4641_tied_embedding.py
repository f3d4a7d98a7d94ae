"""Megatron-LM #4641: an embedding that two pipeline stages share was trained by another algorithm on each.

A rule by names and shapes sees "embedding.word_embeddings.weight" on the first stage and "output_layer.weight", a matrix like any other,
on the last; their copies drift apart. Megatron 0.19 marks both, and that mark is what decides here.
"""

from __future__ import annotations

import torch

from .. import megatron_hosts as hosts
from ..megatron_hosts import Setup, everyone
from ..ranks import run_ranks

SETUP = Setup(pp=2, tied=True, micro_batches=2)


def routed_by_name() -> list[str]:
    """MARKED BROKEN VARIANT: which stages' copy a rule by names and shapes gives to Muon."""
    hosts.initialize(SETUP)
    (chunk,) = hosts.make_model(SETUP)
    shared = [name for name, p in chunk.named_parameters() if getattr(p, "shared_embedding", False)]
    return ["adamw" if "embedding" in name else "muon" for name in shared]


def test_the_fault() -> None:
    assert run_ranks(2, routed_by_name) == [["adamw"], ["muon"]]


def ours() -> tuple[list[str], bool]:
    chunks, optimizer = hosts.start(SETUP)
    shared = {id(p) for p in chunks[0].parameters() if getattr(p, "shared_embedding", False)}
    names = [each.name for inside in optimizer.inside for p, each in inside.described.items() if id(p) in shared]
    for k in range(3):
        hosts.set_rates(optimizer, 0.05)
        hosts.train_step(SETUP, chunks, optimizer, k)
    first, last = everyone([p.detach().clone() for p in chunks[0].parameters() if id(p) in shared])
    algorithms = {route.name: route.algorithm for route in optimizer.routes}
    return [algorithms[name] for name in names], torch.equal(first[0], last[0])


def test_ours() -> None:
    assert run_ranks(2, ours) == [(["adamw"], True)] * 2
