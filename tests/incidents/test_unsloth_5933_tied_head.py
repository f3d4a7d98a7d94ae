"""unsloth #5933: matrices found by name, and tied weights by their first name: a head that is tied to the embedding goes to Muon."""

from __future__ import annotations

import torch
from torch import nn

from muon_dist import MuonDist, build_param_groups


def tied() -> nn.Module:
    model = nn.ModuleDict(
        {"proj_out": nn.Linear(8, 40, bias=False), "body": nn.Linear(8, 8, bias=False), "embed_tokens": nn.Embedding(40, 8)}
    )
    model["proj_out"].weight = model["embed_tokens"].weight
    return model


def test_a_tied_head_that_comes_first_is_an_embedding() -> None:
    by_name, seen = set(), set()
    for name, p in tied().named_parameters():
        if "embed" not in name and p.ndim == 2 and p.data_ptr() not in seen:
            by_name.add(name)
        seen.add(p.data_ptr())
    assert by_name == {"proj_out.weight", "body.weight"}  # the alias is never seen
    optimizer = MuonDist(build_param_groups(tied()), ns_steps=5)
    assert {r.name: r.algorithm for r in optimizer.routes} == {"proj_out.weight": "adamw", "body.weight": "muon"}
    assert "embedding" in optimizer.routes[0].reason and torch.is_tensor(optimizer.param_groups[0]["params"][0])
