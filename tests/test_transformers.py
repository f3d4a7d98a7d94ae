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
        assert run["type"].endswith("integrations.deepspeed.optimizer.MuonDist") and run["muon"] == MATRICES
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
