"""The Hugging Face Trainer trains a tiny Llama with MuonDist, with DeepSpeed and without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from . import deepspeed_hosts  # noqa: F401  # keeps DeepSpeed from compiling
from .ranks import run_ranks


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, head_dim=8, max_position_embeddings=32))


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = int(torch.randint(0, 61, (), generator=torch.Generator().manual_seed(i)))
        tokens = (start + 7 * torch.arange(16)) % 61
        return {"input_ids": tokens, "labels": tokens}


MATRICES = {
    f"model.layers.{i}.{m}.weight"
    for i in (0, 1)
    for m in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}


def trained(folder: str, deepspeed: dict[str, Any] | None) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29500"))
    args = TrainingArguments(
        folder,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        warmup_steps=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        deepspeed=deepspeed,
        seed=0,
    )
    if deepspeed is None:
        from muon_dist.integrations.transformers import optimizer_cls_and_kwargs

        trainer = Trainer(llama(), args, train_dataset=Text(), optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, ns_steps=5))
    else:
        import muon_dist.integrations.deepspeed  # noqa: F401

        trainer = Trainer(llama(), args, train_dataset=Text())
    trainer.train()
    optimizer = trainer.optimizer if deepspeed is None else trainer.model_wrapped.basic_optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    groups = [(g["algorithm"], g["weight_decay"], sorted({n.split(".")[-2] for n in g["param_names"]})) for g in optimizer.param_groups]
    return {
        "losses": losses,
        "muon": {r.name for r in optimizer.routes if r.algorithm == "muon"},
        "groups": groups,
        "steps": {len(schedule) for _, schedule in optimizer.schedules.values()},
        "type": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
    }


@pytest.mark.parametrize("n", [1, 2])
def test_without_deepspeed(n: int, tmp_path: Path) -> None:
    for run in run_ranks(n, trained, str(tmp_path), None):
        assert run["type"] == "muon_dist.optimizer.MuonDist" and run["muon"] == MATRICES
        assert run["losses"][-1] < run["losses"][0] - 0.3
        assert run["groups"] == [
            ("adamw", 0.1, ["embed_tokens", "lm_head"]),
            ("adamw", 0.0, ["input_layernorm", "norm", "post_attention_layernorm"]),
            ("muon", 0.1, sorted({name.split(".")[-2] for name in MATRICES})),
        ]
        assert run["steps"] == {5}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_through_deepspeed(stage: int, tmp_path: Path) -> None:
    params = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "adam_lr": 2e-3, "ns_steps": 5, "torch_adam": True}
    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "MuonDist", "params": params},
    }
    for run in run_ranks(2, trained, str(tmp_path), ds_config):
        assert run["type"].endswith("integrations.deepspeed.optimizer.DeepSpeedMuonDist") and run["muon"] == MATRICES
        assert run["losses"][-1] < run["losses"][0] - 0.3
        assert {(algorithm, decay) for algorithm, decay, _ in run["groups"]} == {
            ("muon", 0.1),
            ("adamw", 0.1),
        }
        assert run["steps"] == {5}


def asked_for_both(folder: str) -> str:
    from muon_dist.integrations.transformers import optimizer_cls_and_kwargs
    from transformers import TrainingArguments

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    try:
        optimizer_cls_and_kwargs(TrainingArguments(folder, use_cpu=True, report_to=[], deepspeed={"zero_optimization": {"stage": 1}}))
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def test_deepspeeds_config_names_the_optimizer(tmp_path: Path) -> None:
    assert "takes its optimizer from that config" in run_ranks(1, asked_for_both, str(tmp_path))[0]


# ------------------------------------------------------------------------------------------------------------- checkpoints


def under_ddp(folder: str, how: str, steps: int, resume: bool) -> dict[str, Any]:
    """A run of the Trainer under DDP that saves as the Trainer does by default, or one that goes on from its folder."""
    from muon_dist.integrations.transformers import optimizer_cls_and_kwargs
    from transformers import Trainer, TrainingArguments

    from muon_dist import MuonDist, build_param_groups
    from muon_dist.allocation import drop_copies

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29500"))
    args = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        logging_steps=1,
    )
    settings = {"burn_in": 1, "measure_every": 2}
    model = llama()
    if how == "helper":
        trainer = Trainer(model, args, train_dataset=Text(), optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, **settings))
    else:
        optimizer = MuonDist(build_param_groups(model), lr=5e-3, weight_decay=0.0, **settings)
        trainer = Trainer(model, args, train_dataset=Text(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume or None)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for program in optimizer.engine.programs:
        drop_copies(program)  # which the last checkpoint has brought here, and the next step lets go
    held = sum(entry["momentum_buffer"].numel() for entry in optimizer.state.values() if "momentum_buffer" in entry)
    return {"weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, "held": held}


@pytest.mark.parametrize("how", ["helper", pytest.param("optimizers=", marks=pytest.mark.more("repeat"))])
def test_a_run_under_ddp_survives_its_checkpoints_and_goes_on_from_them(how: str, tmp_path: Path) -> None:
    """Rank 0 alone asks for the state dict. With the helper all ranks complete it before; else every rank keeps momentum."""
    whole = run_ranks(2, under_ddp, str(tmp_path / "whole"), how, 5, False, fresh=True)
    run_ranks(2, under_ddp, str(tmp_path / "cut"), how, 3, False, fresh=True)
    again = run_ranks(2, under_ddp, str(tmp_path / "cut"), how, 5, True, fresh=True)
    for a, b in zip(whole, again, strict=True):
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    matrices = sum(p.numel() for name, p in whole[0]["weights"].items() if name in MATRICES)
    held = [rank["held"] for rank in whole]
    assert (sum(held) == matrices and max(held) < matrices) if how == "helper" else held == [matrices] * 2


def saved_by_accelerate(folder: str, sharded: bool) -> float:
    """save_state and load_state, under DDP or FSDP2, in a new optimizer: the resumed run is the uninterrupted one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    from muon_dist import MuonDist, build_param_groups

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29500"), ACCELERATE_USE_CPU="true")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_offload=False) if sharded else None

    def prepared() -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        optimizer = MuonDist(build_param_groups(model), lr=0.01, burn_in=1, measure_every=2)
        return (accelerator, *accelerator.prepare(model, optimizer))

    def train(model: Any, optimizer: Any, steps: range) -> torch.Tensor:
        for k in steps:
            optimizer.zero_grad()
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(10 * k + dist.get_rank()))
            model(x).square().sum().backward()
            optimizer.step()
        whole = [getattr(p.detach(), "full_tensor", p.detach().clone)() for p in model.parameters()]
        return torch.cat([t.reshape(-1) for t in whole])

    accelerator, model, optimizer = prepared()
    train(model, optimizer, range(3))
    accelerator.save_state(folder)
    end = train(model, optimizer, range(3, 6))
    accelerator, model, optimizer = prepared()
    accelerator.load_state(folder)
    return float((train(model, optimizer, range(3, 6)) - end).abs().max())


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_accelerate_saves_and_loads(sharded: bool, tmp_path: Path) -> None:
    assert run_ranks(2, saved_by_accelerate, str(tmp_path), sharded) == [0.0, 0.0]


def helped(folder: str, settings: dict[str, Any]) -> str:
    from muon_dist.integrations.transformers import optimizer_cls_and_kwargs
    from transformers import TrainingArguments

    try:
        _, kwargs = optimizer_cls_and_kwargs(TrainingArguments(folder, use_cpu=True, report_to=[]), **settings)
    except ValueError as error:
        return str(error)
    return repr({key: kwargs[key] for key in sorted(kwargs)})


def test_the_helper_takes_what_a_deepspeed_config_takes(tmp_path: Path) -> None:
    def told(**settings: Any) -> str:
        return run_ranks(1, helped, str(tmp_path), settings)[0]

    assert "'adam_betas': (0.8, 0.9)" in told(betas=[0.8, 0.9]) and "'eps': 1e-15" in told(muon_eps=1e-15)
    assert told(learning_rate=1.0) == 'MuonDist does not take "learning_rate": did you mean "lr"?'
    assert told(momentun=0.9) == 'MuonDist does not take "momentun": did you mean "momentum"?'
    assert told(betas="0.9,0.95") == "\"betas\" must be two numbers in [0, 1), got '0.9,0.95'"
    assert told(adam_lr="1e-3") == "adam_lr must be a number in [0, inf), got '1e-3'"
    assert told(ns_steps="5") == "ns_steps must be 'adaptive' or an integer, got '5'"
