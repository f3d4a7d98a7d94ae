"""What a job would do, from its flags alone: nothing is started, and nothing trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from data import Windows
from engines.deepspeed_zero import read_config
from options import Options, micro_batches

from muon_dist.groups import PlanOptions
from muon_dist.planner.models import parameters_of
from muon_dist.planner.plan import plan_model, predict
from muon_dist.run import Ranks
from muon_dist.show.plan import report
from muon_dist.show.table import si
from muon_dist.spectrum.policy import Policy


def dry_run(options: Options, ranks: Ranks) -> None:
    """Print all flags as a file for --config, then how the batch, the data and the optimizer's work are shared.

    Raises:
        ValueError: what would stop the job at its start.
    """
    print("# all flags; keep them in a file for --config")
    for name, value in dataclasses.asdict(options).items():
        elsewhere = {"optimizer": options.engine == "deepspeed", "tp": options.engine != "megatron"}
        elsewhere["distributed_optimizer"] = options.engine != "megatron"
        if value is not None and name != "dry_run" and not elsewhere.get(name, False):
            print(f"{name} = {_toml(value)}")
    dp, tp, zero, batch, micro = _shape(options, ranks.world_size)
    taken, times = micro_batches(batch, micro, dp)
    data = Windows.of(options)
    model = {
        "architecture": "gpt",
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": options.context,
    }
    parameters = parameters_of(model, "the flags")
    numel, tokens = sum(math.prod(p.shape) for p in parameters), batch * options.context
    print(f"\n{ranks}")
    print(f"{si(numel)} parameters, {options.engine}, data parallel {dp}, tensor parallel {tp}, sharded like ZeRO {zero}")
    print(f"batch: {dp} ranks × {taken} windows × {times} time(s) = {batch} windows, {tokens:,} tokens a step")
    epochs = options.steps * batch / data.training
    print(f"data: {data.training:,} windows of {options.context} to train on, {data.held_out:,} held out")
    print(f"{options.steps} steps: {epochs:.2f} epochs")
    every = f"every {options.save_every} steps and at the end" if options.save_every else "when a signal ends the run"
    print(f"checkpoints: {every}, the newest {options.keep} kept, in {options.checkpoints}")
    if options.optimizer != "muon_dist":
        print("optimizer: AdamW on every rank's own shards, nothing to plan")
        return
    adaptive, five = options.ns_steps in (None, "adaptive"), 5
    schedules = predict(parameters, Policy(accuracy=options.accuracy, coverage=options.coverage))[0] if adaptive else None
    steps = five if adaptive else int(options.ns_steps or five)
    plan, state, adamw = plan_model(
        parameters, dp=dp, tp=tp, zero=zero, ns_steps=steps, options=PlanOptions(), schedules=schedules, rule=options.rule or "muon"
    )
    print(f"\nMuon, {'step counts as the scaling laws predict them until they are measured' if adaptive else f'{steps} steps'}:")
    report(plan, state, adamw, bucket_mb=64, model_flops=6 * numel * tokens, tokens=tokens)


def _shape(options: Options, world: int) -> tuple[int, int, int, int, int | None]:
    """(data-parallel ranks, tensor-parallel ranks, ZeRO stage, windows a step, windows a rank takes at a time)."""
    if options.engine == "deepspeed":
        assert options.deepspeed_config is not None
        config = read_config(options.deepspeed_config)
        tp = int(config.get("tensor_parallel", {}).get("autotp_size", 1))
        dp = world // tp
        micro = config.get("train_micro_batch_size_per_gpu")
        times = config.get("gradient_accumulation_steps", 1)
        batch = config.get("train_batch_size", (micro or 1) * times * dp)
        return dp, tp, int(config.get("zero_optimization", {}).get("stage", 0)), int(batch), micro
    assert options.batch is not None
    if world % options.tp:
        raise ValueError(f"--tp {options.tp} does not divide the {world} ranks")
    zero = 3 if options.engine == "torch" else int(options.distributed_optimizer)
    return world // options.tp, options.tp, zero, options.batch, options.micro_batch


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
