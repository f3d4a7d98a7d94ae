"""peft #3503 (and #3499): adapters of an embedding, found by `isinstance` of the parameter and by "lora_B" in its name, are taken for
those of linear layers.
"""

from __future__ import annotations

import torch
from torch import nn

from muon_dist import MuonDist, build_param_groups


class Adapted(nn.Module):
    """An embedding and a linear layer as PEFT adapts them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Module()
        self.embed_tokens.base_layer = nn.Embedding(40, 8).requires_grad_(False)
        self.embed_tokens.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(4, 40))})
        self.embed_tokens.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(8, 4))})
        self.q_proj = nn.Module()
        self.q_proj.base_layer = nn.Linear(8, 8).requires_grad_(False)
        self.q_proj.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
        self.q_proj.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8, bias=False)})


def test_adapters_of_an_embedding_are_found_by_their_module_and_by_name() -> None:
    model = Adapted()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if isinstance(p, nn.Embedding)]  # the rule of the report finds none
    assert not [name for name, _ in trained if "lora_B" in name and "embedding" in name]
    for groups in (build_param_groups(model), trained):
        found = {r.name: r.algorithm for r in MuonDist(groups, ns_steps=5).routes}
        assert found == {
            "embed_tokens.lora_embedding_A.default": "adamw",
            "embed_tokens.lora_embedding_B.default": "adamw",
            "q_proj.lora_A.default.weight": "muon",
            "q_proj.lora_B.default.weight": "muon",
        }
