"""Every parameter has a route and a reason; nothing falls to AdamW silently; patterns mean something."""

import pytest
import torch
from torch import nn

from muon_dist import MuonDist, build_param_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.pos = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 16), "output": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(3, 4, 2)
        self.conv_1d = nn.Conv1d(3, 4, 2)
        self.experts = nn.Parameter(torch.zeros(3, 8, 5))
        self.frozen = nn.Linear(8, 8, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.out = nn.Linear(8, 50, bias=False)


def routes(**options: object) -> dict[str, tuple[str, str]]:
    return {
        name: (group["algorithm"], reason)
        for group in build_param_groups(Model(), **options)
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }


def test_every_trainable_parameter_has_a_route_and_a_reason() -> None:
    found = routes()
    assert set(found) == {n for n, p in Model().named_parameters() if p.requires_grad}
    assert all(reason for _, reason in found.values())
    muon = {name for name, (algorithm, _) in found.items() if algorithm == "muon"}
    assert muon == {
        *(f"layers.{k}.{part}.weight" for k in (0, 1) for part in ("qkv", "output")),
        "conv.weight", "conv_1d.weight", "experts",
    }  # fmt: skip
    assert "embedding" in found["pos.weight"][1] and "50 outputs" in found["out.weight"][1]


def test_names_alone_tell_embeddings_heads_and_layers_apart() -> None:
    optimizer = MuonDist(
        [(name, nn.Parameter(torch.zeros(shape))) for name, shape in {
            "wte.weight": (50, 8), "bert.token_type_embeddings.weight": (2, 8), "shared.weight": (50, 8), "positional_embedding": (9, 8),
            "embed_in.weight": (50, 8),
            "token_emb.weight": (50, 8), "cls_token": (1, 1, 8), "patch_embed.proj.weight": (8, 3, 2, 2),
            "time_embedding.linear.weight": (8, 8),
            "model.embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8), "output.weight": (50, 8),
            "layers.0.attention.output.weight": (8, 8), "embedder.proj.weight": (8, 8), "norm.weight": (8,),
            "stem.conv.weight": (8, 3, 2), "experts.w1": (3, 8, 5), "patch.weight": (8, 3, 2, 2),
        }.items()]
    )  # fmt: skip
    found = {route.name: route.algorithm for route in optimizer.routes}
    adamw = {
        "bert.token_type_embeddings.weight",
        "shared.weight",
        "positional_embedding",
        "embed_in.weight",
        "token_emb.weight",
        "cls_token",
    }
    adamw |= {"wte.weight", "model.embed_tokens.weight", "lm_head.weight", "output.weight", "norm.weight"}
    assert {name for name, algorithm in found.items() if algorithm == "adamw"} == adamw
    views = {route.name: route.view.kind for route in optimizer.routes if route.view}
    assert views["stem.conv.weight"] == views["patch.weight"] == "conv" and views["experts.w1"] == "matrix"


def test_unnamed_matrices_raise_and_an_explicit_algorithm_wins() -> None:
    matrix, vector = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))
    for params in ([matrix], [{"params": [matrix]}], [vector, matrix]):
        with pytest.raises(ValueError, match="has no name"):
            MuonDist(params)
    assert [r.algorithm for r in MuonDist([vector]).routes] == ["adamw"]
    groups = [{"params": [matrix], "algorithm": "muon"}, {"params": [vector], "algorithm": "adamw"}]
    assert [r.algorithm for r in MuonDist(groups).routes] == ["muon", "adamw"]
    embedding = MuonDist([{"params": [("wte.weight", matrix)], "algorithm": "muon"}])
    assert [r.algorithm for r in embedding.routes] == ["muon"]
    with pytest.raises(ValueError, match="needs a matrix"):
        MuonDist([{"params": [vector], "algorithm": "muon"}])
    with pytest.raises(ValueError, match="choose 'muon' or 'adamw'"):
        MuonDist([{"params": [matrix], "algorithm": "sgd"}])


def test_patterns_route_split_and_transpose() -> None:
    found = routes(muon=["wte"], adamw=["layers.1.*.weight"])
    assert found["wte.weight"] == ("muon", "asked for by muon='wte'")
    assert found["layers.1.qkv.weight"][0] == "adamw" and found["layers.0.qkv.weight"][0] == "muon"
    groups = build_param_groups(Model(), split={"qkv.weight": [8, 4, 4]}, transpose=["*.output.weight"])
    by_view = {
        (g.get("split"), g.get("transpose")): [n for n, _ in g["params"]]
        for g in groups
        if g["algorithm"] == "muon" and g["kind"] == "matrix"
    }
    assert by_view == {
        ((8, 4, 4), False): ["layers.0.qkv.weight", "layers.1.qkv.weight"],
        (None, True): ["layers.0.output.weight", "layers.1.output.weight"],
        (None, False): ["experts"],
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"muon": ["nothing.*"]}, "matches no trainable parameter"),
        ({"split": {"nothing": 2}}, "matches no trainable parameter"),
        ({"transpose": ["frozen"]}, "matches no trainable parameter"),
        ({"muon": ["wte"], "adamw": ["*wte*"]}, "make the patterns disjoint"),
        ({"muon": ["wte", "wte.weight"]}, "make the patterns disjoint"),
        ({"split": {"qkv": 8, "layers.0.qkv": 4}}, "make the patterns disjoint"),
        ({"split": {"wte": 10}}, "goes to adamw"),
        ({"split": {"qkv.weight": (8, 9)}}, "add up to 17"),
        ({"muon": ["norm"]}, "needs a matrix"),
        ({"muon": [3]}, "strings"),
    ],
)
def test_patterns_that_cannot_be_meant_raise(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_param_groups(Model(), **options)


def test_tied_heads_are_embeddings() -> None:
    model = Model()
    model.out.weight = model.wte.weight
    groups = build_param_groups(model)
    found = {name: (g["algorithm"], r) for g in groups for (name, _), r in zip(g["params"], g["reasons"], strict=True)}
    assert found["wte.weight"][0] == "adamw" and "embedding" in found["wte.weight"][1] and "out.weight" not in found


def test_groups_go_into_the_optimizer_with_their_options() -> None:
    optimizer = MuonDist(build_param_groups(Model(), split={"qkv.weight": 8}, weight_decay=0.3), lr=0.1, adam_lr=0.2, muon_lr=0.4)
    assert {(g["algorithm"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {("muon", 0.4, 0.3), ("adamw", 0.2, 0.3)}


def test_transposed_convolutions_go_to_adamw_and_say_why() -> None:
    (group,) = build_param_groups(nn.ConvTranspose2d(3, 4, 2, bias=False))
    assert group["algorithm"] == "adamw" and "transposed convolution" in group["reasons"][0]
