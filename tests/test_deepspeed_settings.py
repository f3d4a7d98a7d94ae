"""What a DeepSpeed config may say to MuonDist, what is refused and why, and how its schedulers treat two learning rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import muon_dist

from . import deepspeed_hosts as hosts
from .ranks import run_ranks

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "deepspeed").glob("*.json"))


def read(**given: Any) -> dict[str, Any]:
    from muon_dist.integrations.deepspeed.settings import read_settings

    return read_settings(given)[0]


def test_names_of_deepspeed_and_ours() -> None:
    arguments = read(lr=1.0, betas=[0.8, 0.9], eps=1e-6, muon_eps=1e-15, muon_lr=2.0, adam_lr=3.0, torch_adam=True, polynomial=[[3, -3, 1]])
    assert arguments["adam_betas"] == (0.8, 0.9) and arguments["adam_eps"] == 1e-6 and arguments["eps"] == 1e-15
    assert (arguments["lr"], arguments["muon_lr"], arguments["adam_lr"]) == (1.0, 2.0, 3.0)
    assert arguments["polynomial"] == ((3, -3, 1),) and "torch_adam" not in arguments


@pytest.mark.parametrize("key", sorted(set(read()) - {"eps", "telemetry_dir", "telemetry_sinks"}))
def test_every_argument_of_the_optimizer_is_taken(key: str) -> None:
    value = {"placement": "gram", "symmetric_kernels": 2048}.get(key, 0.5)
    assert read(**{key: value})[key] == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentun": 0.9}, 'does not take "momentun": did you mean "momentum"'),
        ({"ns_step": 5}, 'did you mean "ns_steps"'),
        ({"warp": 5}, "it takes accuracy, adam_betas, "),
        ({"ns_method": "gram"}, 'does not take "ns_method": it chooses a code path'),
        ({"nonfinite": "raise"}, "DeepSpeed decides which steps are left out"),
        ({"layouts": {}}, "DeepSpeed tells where pieces lie"),
        ({"process_group": None}, "DeepSpeed tells who shares"),
        ({"adam_w_mode": False}, '"adam_w_mode": False can\'t be met'),
        ({"fp32_optimizer_states": False}, "can't be met"),
        ({"placement": "shards"}, "choose one of owner, gram, auto"),
        ({"bucket_mb": 0}, "bucket_mb must be a positive number"),
        ({"betas": [0.9, 0.9], "adam_betas": [0.9, 0.9]}, "say the same"),
    ],
)
def test_what_is_not_taken_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read(**given)


def test_patterns_need_the_model() -> None:
    from muon_dist.integrations.deepspeed import MuonDist

    with pytest.raises(ValueError, match="match names, which are not known here"):
        MuonDist(hosts.make_net().named_parameters(), adamw=["layers.0"])


def test_without_an_engine_it_does_not_step() -> None:
    from muon_dist.integrations.deepspeed import MuonDist

    with pytest.raises(ValueError, match=r"pass it to deepspeed\.initialize"):
        MuonDist(hosts.make_net().named_parameters()).step()
    with pytest.raises(ValueError, match="takes no closure"):
        MuonDist(hosts.make_net().named_parameters()).step(lambda: None)


def refused(stage: int, zero: dict[str, Any], more: dict[str, Any], client: bool) -> str:
    from muon_dist.integrations.deepspeed import MuonDist

    ds_config = hosts.config(stage, zero=zero, **more)
    model, options = hosts.make_net(), {}
    if client:
        options["optimizer"] = MuonDist(model.named_parameters(), lr=0.1)
        del ds_config["optimizer"]
    try:
        hosts.start(ds_config, model, **options)
    except ValueError as error:
        return str(error)
    return ""


OFFLOAD = {"device": "cpu", "pin_memory": False}
REFUSED = [
    (
        2,
        {
            "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0, "overlap_step": False},
            "offload_optimizer": OFFLOAD,
        },
        {},
        "zenflow",
    ),
    (3, {"zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size"),
    (3, {"zero_quantized_weights": True}, {}, "zero_quantized_weights"),
    (3, {"zero_quantized_gradients": True}, {}, "zero_quantized_gradients"),
    (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, {}, "an optimizer on NVMe"),
    (3, {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, {}, "parameters on NVMe"),
    (3, {"offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, {}, "ratio below 1"),
    (3, {"offload_optimizer": {**OFFLOAD, "super_offload": True}}, {}, "super_offload"),
    (1, {"elastic_checkpoint": True}, {}, "elastic_checkpoint"),
    (1, {}, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
    (1, {}, {"fp16": {"enabled": False, "fp16_master_weights_and_grads": True}}, "fp16_master_weights_and_grads"),
    (1, {}, {"compile": {"deepcompile": True}}, "deepcompile"),
    (1, {}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast in fp16"),
]


@pytest.mark.parametrize("client", [False, True])
@pytest.mark.parametrize(("stage", "zero", "more", "setting"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_be_right_is_refused_at_initialisation(
    stage: int, zero: dict[str, Any], more: dict[str, Any], setting: str, client: bool
) -> None:
    for message in run_ranks(1, refused, stage, zero, more, client):
        assert message.startswith("MuonDist does not support ") and setting in message and ": " in message


def test_every_refusal_has_a_row() -> None:
    from muon_dist.integrations.deepspeed.settings import REFUSED as TABLE

    named = [setting for setting, _, _ in TABLE if not any(row[3] in setting for row in REFUSED)]
    assert named == ["expert_parallel (AutoEP)"]  # below


def test_autoep_is_refused() -> None:
    from types import SimpleNamespace

    from muon_dist.integrations.deepspeed.settings import REFUSED as TABLE

    [asked] = [asked for setting, asked, _ in TABLE if "AutoEP" in setting]
    assert asked(SimpleNamespace(expert_parallel_config=SimpleNamespace(enabled=True)))
    assert not asked(SimpleNamespace(expert_parallel_config=None))


def removed_by_deepspeed() -> str:
    try:
        hosts.start(hosts.config(3, zero={"mics_shard_size": 2}))
    except Exception as error:
        return str(error)
    return ""


def test_mics_is_refused_by_deepspeed_itself() -> None:
    assert "mics_shard_size" in run_ranks(1, removed_by_deepspeed)[0]


def core_optimizer() -> str:
    model = hosts.make_net()
    ds_config = hosts.config(1)
    del ds_config["optimizer"]
    try:
        hosts.start(ds_config, model, optimizer=muon_dist.MuonDist(model.named_parameters()))
    except ValueError as error:
        return str(error)
    return ""


def test_the_optimizer_for_plain_torch_is_told_apart() -> None:
    assert "Use muon_dist.integrations.deepspeed.MuonDist" in run_ranks(1, core_optimizer)[0]


def grouped() -> list[tuple[str, float, float, list[str]]]:
    """Groups of the user keep their settings, and are cut by algorithm."""
    model = hosts.make_net()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 7.0}]
    ds_config = hosts.config(2, params={"weight_decay": 0.3, "adamw": ["layers.3"], "polynomial": [[2, -1.5, 0.5]] * 5})
    model.layers[1].weight.requires_grad_(False)
    engine = hosts.start(ds_config, model, model_parameters=groups)
    hosts.train_step(engine, 0)
    assert engine.basic_optimizer.schedules["layers.0.weight"][1].steps == ((2, -1.5, 0.5),) * 5
    return [(g["algorithm"], g["lr"], g["weight_decay"], g["param_names"]) for g in engine.basic_optimizer.param_groups]


def test_groups_keep_their_settings_and_patterns_decide() -> None:
    biases = [f"layers.{i}.bias" for i in range(4)]
    for groups in run_ranks(2, grouped):
        assert groups == [
            ("adamw", 1e-2, 0.3, ["embed.weight", "layers.3.weight", "lm_head.weight"]),
            ("muon", 0.5, 0.3, ["layers.0.weight", "layers.2.weight"]),
            ("adamw", 7.0, 0.0, [*biases, "norm.weight", "norm.bias"]),
        ]


def rates(scheduler: dict[str, Any], params: dict[str, Any]) -> list[list[float]]:
    engine = hosts.start(hosts.config(1, params=params, scheduler=scheduler))
    seen = []
    for k in range(4):
        hosts.train_step(engine, k)
        seen.append([float(g["lr"]) for g in engine.basic_optimizer.param_groups])
    return seen


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 3, "warmup_type": "linear"}},
        {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1, "warmup_max_lr": 0.5, "warmup_num_steps": 3}},
        {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": 0.5, "warmup_num_steps": 3}},
        {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}},
        {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}},
        {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2}},
        {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3, "cycle_momentum": False}},
    ],
    ids=lambda s: s["type"] + ("" if len(s["params"]) < 4 else " with a minimum"),
)
@pytest.mark.parametrize("params", [{"lr": 0.5, "adam_lr": 0.01}, {"lr": 0.01, "muon_lr": 0.5, "adam_lr": 0.01}])
def test_schedulers_keep_the_two_learning_rates_apart(scheduler: dict[str, Any], params: dict[str, Any]) -> None:
    for seen in run_ranks(1, rates, scheduler, params):
        moving = [(adamw, muon) for adamw, muon in seen if muon > 0]
        assert len(moving) >= 3 and len({muon for _, muon in moving}) > 1  # it is a schedule
        for adamw, muon in moving:
            assert muon == pytest.approx(50 * adamw)


def test_lists_of_the_user_are_left_alone() -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": [0.0, 0.0], "warmup_max_lr": [3.0, 5.0], "warmup_num_steps": 2}}
    assert run_ranks(1, rates, scheduler, {"lr": 0.5, "adam_lr": 0.01})[0][-1] == [3.0, 5.0]


def scheduled_by_torch() -> list[list[float]]:
    engine = hosts.start(hosts.config(2), lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)))
    seen = []
    for k in range(3):
        seen.append([float(g["lr"]) for g in engine.basic_optimizer.param_groups])
        hosts.train_step(engine, k)
    return seen


def test_schedulers_of_torch() -> None:
    assert run_ranks(1, scheduled_by_torch)[0] == [pytest.approx([1e-2 / k, 0.5 / k]) for k in (1, 2, 3)]


def train_shipped(path: str) -> tuple[list[float], str, set[str]]:
    from muon_dist.example.small_gpt import GPT, read_text, windows

    ds_config = json.loads(Path(path).read_text())
    for place in ("offload_optimizer", "offload_param"):
        if place in ds_config["zero_optimization"]:
            ds_config["zero_optimization"][place]["pin_memory"] = False  # pinning needs a GPU
    ds_config["scheduler"]["params"]["warmup_num_steps"] = 2
    torch.manual_seed(0)
    engine = hosts.start(ds_config, GPT(layers=2, width=64, heads=4, context=32))
    text, losses = read_text(None), []
    for step in range(12):
        tokens, targets = windows(text, 4, 32, 100 * step + dist.get_rank(engine.data_parallel_group))
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    algorithms = {r.name: r.algorithm for r in engine.basic_optimizer.routes}
    return losses, type(engine.optimizer).__name__, {name for name, algorithm in algorithms.items() if algorithm == "muon"}


WRAPPERS = {
    "zero0": "FP16_UnfusedOptimizer",
    "zero1": "BF16_Optimizer",
    "zero2": "DeepSpeedZeroOptimizer",
    "zero3": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_offload": "DeepSpeedZeroOptimizer_Stage3",
    "autotp": "DeepSpeedZeroOptimizer",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configs_train(path: Path) -> None:
    for losses, wrapper, matrices in run_ranks(2, train_shipped, str(path)):
        assert wrapper == WRAPPERS[path.stem]
        assert matrices == {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")}
        assert losses[-1] < losses[0] - 0.5


def test_there_are_six_configs() -> None:
    assert [p.stem for p in CONFIGS] == sorted(WRAPPERS)


def bucket_bytes() -> list[int]:
    engine = hosts.start(hosts.config(1, params={"bucket_mb": 0.25}))
    hosts.train_step(engine, 0)
    return [each.options.bucket_bytes for each in engine.basic_optimizer.engines]


def test_the_bucket_size_reaches_the_exchange() -> None:
    (found,) = run_ranks(1, bucket_bytes)
    assert set(found) == {2**18}


def kernels_on_a_cpu() -> str:
    engine = hosts.start(hosts.config(1, params={"symmetric_kernels": 16}))
    try:
        hosts.train_step(engine, 0)
    except ValueError as error:
        return str(error)
    return "trained"


def test_kernels_reach_the_step_and_are_refused_on_a_cpu() -> None:
    assert "symmetric_kernels needs a CUDA device" in run_ranks(1, kernels_on_a_cpu)[0]


# ------------------------------------------------------------------------------------------------------------------- words


def engine_with(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    ds_config = hosts.config(1)
    ds_config["optimizer"] = {"type": kind, "params": {**ds_config["optimizer"]["params"], **params}}
    try:
        engine = hosts.start(ds_config)
    except ValueError as error:
        return {"error": str(error)}
    hosts.train_step(engine, 0)
    return {"optimizer": type(engine.basic_optimizer).__name__, "momenta": engine.get_mom()}


@pytest.mark.parametrize("kind", ["MuonDist", "muon_dist", "muondist", "Muon-Dist"])
def test_every_spelling_of_the_name_is_known(kind: str) -> None:
    (told,) = run_ranks(1, engine_with, kind, {"momentum": 0.9})
    assert told["optimizer"] == "DeepSpeedMuonDist"
    assert sorted(map(str, told["momenta"])) == ["(0.9, 0.95)", "0.9"]  # of AdamW's group and of Muon's, which had 0.0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"adam_lr": "1e-3"}, "adam_lr must be a number in [0, inf), got '1e-3'"),
        ({"ns_steps": "5"}, "ns_steps must be 'adaptive' or an integer, got '5'"),
        ({"betas": "0.9,0.95"}, "\"betas\" must be two numbers in [0, 1), got '0.9,0.95'"),
        ({"eps": -1}, '"eps" must be a number in [0, inf), got -1'),
        ({"muon_eps": -1}, '"muon_eps" must be a number in [0, inf), got -1'),
        ({"learning_rate": 1}, 'MuonDist does not take "learning_rate": did you mean "lr"?'),
    ],
)
def test_errors_name_the_key_that_was_given(params: dict[str, Any], words: str) -> None:
    assert run_ranks(1, engine_with, "MuonDist", params) == [{"error": words}]


def patterned(given: dict[str, Any]) -> list[str]:
    ds_config = hosts.config(1)
    ds_config["optimizer"]["params"].update(given)
    return sorted(r.name for r in hosts.start(ds_config).basic_optimizer.routes if r.algorithm == "muon")


def test_a_string_is_one_pattern_here_too() -> None:
    name = sorted(hosts.MATRICES)[0]
    (alone,), (listed,) = run_ranks(1, patterned, {"adamw": name}), run_ranks(1, patterned, {"adamw": [name]})
    assert alone == listed and name not in alone and len(alone) == len(hosts.MATRICES) - 1


def test_messages_that_the_readme_quotes_are_deepspeeds() -> None:
    import deepspeed

    folder = Path(deepspeed.__file__).parent / "runtime"
    for path, words in (
        ("engine.py", "is not a supported DeepSpeed Optimizer"),
        ("zero/stage_1_and_2.py", "The ZeRO checkpoint parameter-alignment layout does not match the current"),
    ):
        assert words in (folder / path).read_text()
        assert words in (Path(__file__).parent.parent / "integrations" / "deepspeed" / "README.md").read_text()
