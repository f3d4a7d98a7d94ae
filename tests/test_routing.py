"""Every parameter has a route and a reason; nothing falls to AdamW silently; patterns mean something."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from muon_dist import MuonDist, build_param_groups
from muon_dist.routing import route_parameter

from . import reference


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
        ({"split": "qkv"}, "split maps patterns to sizes"),
    ],
)
def test_patterns_that_cannot_be_meant_raise(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_param_groups(Model(), **options)


def test_a_string_is_one_pattern() -> None:
    assert routes(adamw="qkv") == routes(adamw=["qkv"])
    assert routes(muon="wte", transpose="*.output.weight") == routes(muon=["wte"], transpose=["*.output.weight"])


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


# ------------------------------------------------------------------------------------------- behind wrappers, and in lists

V, D = 40, 8


class Language(nn.Module):
    """An embedding, a hidden layer and a head, each behind a wrapper or in a list."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, codebooks: int = 0) -> None:
        super().__init__()

        def many(make: Callable[[], nn.Module]) -> nn.Module:
            return nn.ModuleList([make() for _ in range(codebooks)]) if codebooks else wrap(make())

        self.embed_tokens = many(lambda: nn.Embedding(V, D))
        self.layers = nn.ModuleList([nn.Linear(D, D, bias=False)])
        self.lm_head = many(lambda: nn.Linear(D, V, bias=False))


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Language,
    "torch.compile": lambda: Language(torch.compile),
    "activation checkpointing": lambda: Language(checkpoint_wrapper),
    "weight_norm": lambda: Language(nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: Language(nn.utils.parametrizations.spectral_norm),
    "three codebooks": lambda: Language(codebooks=3),
    "compiled whole": lambda: torch.compile(Language()),
}


@pytest.mark.parametrize("by", ["modules", "names"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_embeddings_and_heads_are_found_behind_wrappers_and_in_lists(kind: str, by: str) -> None:
    model = WRAPPERS[kind]()
    optimizer = MuonDist(build_param_groups(model) if by == "modules" else model.named_parameters(), ns_steps=5)
    assert [r.name.replace("_orig_mod.", "") for r in optimizer.routes if r.algorithm == "muon"] == ["layers.0.weight"]


# name, shape -> what goes to AdamW by its name alone
NOT_MATRICES = {
    "swin_v2.logit_scale": (4, 1, 1), "convnextv2.grn.gamma": (1, 1, 1, 64), "convnextv2.grn.weight": (1, 1, 1, 64),
    "rwkv.time_mix_k": (1, 1, 64), "layer_scale.gamma": (64, 1, 1), "mixer.A_log": (32, 16), "mixer.D": (2, 64), "ffn.scale": (48, 128),
    "fc.parametrizations.weight.original0": (64, 1), "vit.register_tokens": (1, 4, 16), "qformer.query_tokens": (1, 32, 768),
    "mlp.experts.gate_up_proj_bias": (128, 5760), "mlp.experts.down_proj_bias": (128, 2880), "attn.rel_pos_h": (27, 64),
    "attention.attention_biases": (4, 49), "conv.weight": (64, 1, 4), "rel_attn.r_r_bias": (16, 64), "rel_attn.q": (1024, 16, 64),
    "model.layers.61.shared_head.head.weight": (V, D), "lm_head.modules_to_save.default.weight": (V, D),
    "score.modules_to_save.default.weight": (2, D), "classifier.out_proj.weight": (2, D), "qa_outputs.weight": (2, D),
    "ctc_head.weight": (32, D), "logits_proj.weight": (504, D), "lm_heads.3.weight": (V, D), "embed_tokens.2.weight": (V, D),
    "value_embeds.1.weight": (V, D), "base_model.model.lm_head.lora_B.default.weight": (V, 4), "lm_head.lora_A.default.weight": (4, D),
    "embed_tokens.lora_embedding_A.default": (4, V), "embed_tokens.token_adapter.trainable_tokens_delta.default": (3, D),
    "embed.parametrizations.weight.original": (V, D), "embed_tokens._orig_mod.weight": (V, D), "q.oft_R.default": (4, 6),
}  # fmt: skip
MATRICES = {
    "electra.embeddings_project.weight": (256, 128), "encoder.embedding_hidden_mapping_in.weight": (4096, 128),
    "layers.0.attention.output.dense.weight": (D, D), "classifier.dense.weight": (D, D), "lm_head.dense.weight": (D, D),
    "layers.3.mlp.gate.weight": (8, D), "layers.0.self_attn.output_gate.weight": (D, D), "mlp.shared_expert_gate.weight": (1, D),
    "q_proj.lora_A.default.weight": (4, D), "q_proj.lora_B.default.weight": (D, 4), "q_proj.base_layer.weight": (D, D),
    "up.parametrizations.weight.original1": (16, D), "time_embedding.linear.weight": (D, D), "mlp.experts.down_proj": (8, 16, D),
    "pre_classifier.weight": (D, D), "vision_model.head.attention.in_proj_weight": (24, D), "patch_embedding.weight": (8, 3, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [*NOT_MATRICES.items(), *MATRICES.items()])
def test_a_name_and_a_shape_tell_what_they_can(name: str, shape: tuple[int, ...]) -> None:
    route = route_parameter(name, torch.empty(shape, device="meta"))
    assert route.algorithm == ("adamw" if name in NOT_MATRICES else "muon"), route.reason


def test_a_name_that_says_nothing_is_spoken_of_once() -> None:
    model = nn.Sequential(nn.Embedding(60, 9), nn.Linear(9, 9), nn.Linear(9, 60))
    with pytest.warns(UserWarning, match=r"'0.weight' of shape \(60, 9\) could be an embedding .*build_param_groups\(model\)") as told:
        MuonDist(model.named_parameters(), ns_steps=5)
    assert [str(w.message).split()[0] for w in told] == ["'0.weight'", "'2.weight'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonDist(model.named_parameters(), ns_steps=5)
        optimizer = MuonDist(build_param_groups(model), ns_steps=5)
    assert [r.name for r in optimizer.routes if r.algorithm == "muon"] == ["1.weight"]


def test_an_adapter_goes_where_its_layer_would_and_says_so() -> None:
    class Adapted(nn.Module):
        """A layer as PEFT leaves it: the base is frozen, A and B are trained."""

        def __init__(self, base: nn.Module, rows: int, cols: int) -> None:
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(cols, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, rows, bias=False)})

    model = nn.ModuleDict(
        {"embed": nn.Embedding(V, D), "q_proj": Adapted(nn.Linear(D, D), D, D), "lm_head": Adapted(nn.Linear(D, V), V, D)}
    )
    found = {n: (g["algorithm"], r) for g in build_param_groups(model) for (n, _), r in zip(g["params"], g["reasons"], strict=True)}
    for letter in "AB":
        assert found[f"q_proj.lora_{letter}.default.weight"] == ("muon", f"lora_{letter} of an adapter: weight matrix")
        algorithm, reason = found[f"lm_head.lora_{letter}.default.weight"]
        assert algorithm == "adamw" and reason.startswith(f"lora_{letter} of an adapter: output head")


# ----------------------------------------------------------------------------------------------------- grouped convolutions


def moved(conv: nn.Module, factor: float, half: slice) -> Tensor:
    """The update of the other half of a kernel's outputs, when the gradient of `half` is `factor` times as large."""
    nn.init.zeros_(conv.weight)
    optimizer = MuonDist(build_param_groups(conv), lr=1.0, weight_decay=0.0, ns_steps=5)
    conv.weight.grad = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    conv.weight.grad[half] *= factor
    optimizer.step()
    return conv.weight.detach()[: conv.weight.shape[0] // 2].clone()


@pytest.mark.parametrize("groups", [1, 2, 4, 32])
def test_the_groups_of_a_convolution_do_not_touch_each_other(groups: int) -> None:
    conv = nn.Conv1d(32, 32, 4, groups=groups, bias=False, dtype=torch.float64)
    one, hundred = (moved(conv, factor, slice(16, 32)) for factor in (1.0, 100.0))
    if groups == 1:  # one matrix, whose rows compete
        assert (one - hundred).norm() > 0.2 * one.norm()
        return
    torch.testing.assert_close(one, hundred, rtol=1e-10, atol=1e-12)
    (group,) = build_param_groups(conv)
    if groups == 32:
        assert group["algorithm"] == "adamw" and "depthwise" in group["reasons"][0]
        return
    gradient = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = 32 // groups
    expected = torch.cat(
        [
            reference.orthogonalize(part.reshape(rows, -1), [reference.JORDAN] * 5).reshape(part.shape)
            * -reference.scale("match_rms_adamw", rows, part[0].numel())
            for part in gradient.split(rows)
        ]
    )
    torch.testing.assert_close(one, expected[:16], rtol=1e-9, atol=1e-10)
    assert group["reasons"] == [f"{groups} groups of a convolution, each read as (out, in·k)"]


# ------------------------------------------------------------------------------------------------ architectures that exist

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "phi", "phi3",
    "gemma", "gemma2", "gemma3_text", "mamba", "mamba2", "jamba", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "olmo2",
    "granitemoe", "rwkv", "mpt", "recurrent_gemma", "llama4_text", "qwen2_moe", "glm4_moe", "nemotron_h", "falcon_mamba",
    "bamba", "zamba2", "minimax", "xlnet", "codegen", "gpt_bigcode", "starcoder2", "stablelm", "cohere2", "qwen3_next", "lfm2",
    "ernie4_5_moe", "smollm3", "arcee", "bitnet", "t5", "bart", "bert", "roberta", "deberta-v2", "electra", "vit", "clip",
    "whisper", "wav2vec2", "modernbert", "swin", "beit", "dinov2", "segformer", "convnext", "siglip", "albert", "distilbert",
    "longt5", "mt5", "pegasus", "biogpt", "xglm", "idefics3", "llava", "qwen2_vl", "qwen2_5_vl", "pixtral", "mllama",
]  # fmt: skip


def built(architecture: str) -> nn.Module:
    """Two layers of it, without memory."""
    import transformers
    from transformers.models.auto import modeling_auto

    config = transformers.AutoConfig.for_model(architecture)
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    causal = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):
        return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)


def test_every_parameter_of_eighty_architectures_goes_where_it_belongs() -> None:
    """What a module is tells what its weight is for; a rule of its own here, not the package's. And names alone say the same."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    gains = re.compile(
        r"(bias|A_log|scale|gamma|time_mix\w*|position_embeddings|table|token|seg_embed|mask_emb|probe|original0|rel_attn\.[qkvor])$"
    )
    wrong, seen = [], 0
    for architecture in ARCHITECTURES:
        model = built(architecture)
        modules = dict(model.named_modules())
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for group in build_param_groups(model):
            for name, p in group["params"]:
                module = modules[name.rpartition(".")[0]]
                depthwise = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels > 1
                vector = p.ndim < 2 or depthwise or gains.search(name) is not None
                expected = "adamw" if vector or isinstance(module, nn.Embedding) or module is head else "muon"
                if architecture == "siglip" and name == "text_model.head.weight":
                    expected = "adamw"  # a projection that is called a head: the name decides
                by_name = route_parameter(name, p).algorithm
                if architecture == "wav2vec2" and "conv_layers.0.conv" in name:
                    by_name = "muon"  # of one channel, which by its name alone could be depthwise
                if not group["algorithm"] == by_name == expected:
                    wrong.append((architecture, name, tuple(p.shape), group["algorithm"], by_name, expected))
                seen += 1
    assert not wrong and seen > 8000
