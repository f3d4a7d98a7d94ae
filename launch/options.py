"""The flags of train_gpt.py: from the command line, and from a TOML file with the same names; checked as a whole."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from muon_dist.rules import MATRIX_RULES
from muon_dist.spectrum.policy import ACCURACIES, ACCURACY

# What the DeepSpeed config says, so that the flag may not.
IN_DEEPSPEED_CONFIG = {
    "optimizer": "optimizer.type",
    "batch": "train_batch_size",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "precision": "bf16",
    "clip": "gradient_clipping",
    "lr": "optimizer.params.lr",
    "adam_lr": "optimizer.params.adam_lr",
    "weight_decay": "optimizer.params.weight_decay",
    "warmup": "scheduler",
    "decay": "scheduler",
    "min_lr_ratio": "scheduler",
    "ns_steps": "optimizer.params.ns_steps",
    "accuracy": "optimizer.params.accuracy",
    "coverage": "optimizer.params.coverage",
    "burn_in": "optimizer.params.burn_in",
    "measure_every": "optimizer.params.measure_every",
    "deflation": "optimizer.params.deflation",
    "rule": "optimizer.params.rule",
}
# A checkpoint goes on only with the same of these.
OF_A_RUN = ("engine", "optimizer", "rule", "layers", "width", "heads", "context", "vocabulary", "data", "data_dtype", "holdout", "seed")
DATA_DTYPES = ("bytes", "uint16", "uint32", "int32")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All flags, complete; None where a flag doesn't apply to this engine or optimizer."""

    engine: str = "torch"
    out: str = "runs/train_gpt"
    steps: int = 100
    seed: int = 0
    resume: str = "auto"
    log_every: int = 10
    rank_timeout: float = 600.0
    tensorboard: bool = False
    wandb: bool = False
    dry_run: bool = False

    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 256
    vocabulary: int = 256
    precision: str | None = "fp32"

    data: str | None = None
    data_dtype: str = "bytes"
    holdout: float = 0.01
    batch: int | None = 8
    micro_batch: int | None = None

    optimizer: str = "muon_dist"
    lr: float | None = None
    adam_lr: float | None = None
    weight_decay: float | None = 0.1
    clip: float | None = 1.0
    warmup: int | None = None
    decay: int | None = None
    min_lr_ratio: float | None = 0.1
    ns_steps: str | int | None = "adaptive"
    accuracy: str | None = None
    coverage: float | None = None
    burn_in: int | None = 0
    measure_every: int | None = 20
    deflation: int | None = None
    rule: str | None = "muon"

    deepspeed_config: str | None = None
    tp: int = 1
    distributed_optimizer: bool = False

    save_every: int = 100
    keep: int = 2
    eval_every: int = 50
    eval_batches: int = 4

    @property
    def adaptive(self) -> bool:
        return self.optimizer == "muon_dist" and self.ns_steps == "adaptive"

    @property
    def sinks(self) -> list[str]:
        """Where the run is told beside its own lines: names that `muon_dist.telemetry.Sinks` takes."""
        return [name for name in ("tensorboard", "wandb") if getattr(self, name)]

    @property
    def checkpoints(self) -> Path:
        return Path(self.out) / "checkpoints"

    def learning_rate_factor(self, step: int) -> float:
        """Of the peak: linearly up over the first `warmup` steps, linearly down to `min_lr_ratio` over the last `decay`."""
        assert self.warmup is not None and self.decay is not None and self.min_lr_ratio is not None
        up = (step + 1) / self.warmup if self.warmup else 1.0
        left = (self.steps - step) / self.decay if self.decay else 1.0
        return min(up, 1.0, self.min_lr_ratio + (1 - self.min_lr_ratio) * left)


def flag(name: str) -> str:
    """How an option is called on the command line."""
    return "--" + name.replace("_", "-")


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        description="Train a GPT with MuonDist under FSDP2, in DeepSpeed or in Megatron.", argument_default=argparse.SUPPRESS
    )

    def add(group: Any, name: str, help: str, **how: Any) -> None:
        default = DEFAULTS.get(name)
        shown = "" if default in (None, False) or "default" in help else f" (default {default})"
        names = [flag(name), *(["--" + name] if "_" in name else [])]
        group.add_argument(*names, dest=name, help=help + shown, **how)

    run = root.add_argument_group("run")
    run.add_argument("--config", metavar="FILE", help="TOML with any of these flags, by name; the command line overrides it")
    add(run, "engine", "what trains", choices=["torch", "deepspeed", "megatron"])
    add(run, "out", "the run's folder: log.jsonl, spectrum.jsonl, checkpoints/", metavar="DIR")
    add(run, "steps", "optimizer steps", type=int)
    add(run, "seed", "of weights and of the order of data", type=int)
    add(run, "resume", "auto: go on from the newest whole checkpoint in --out; never: refuse if there is one", choices=["auto", "never"])
    add(run, "log_every", "steps between two lines of the log", type=int)
    add(run, "rank_timeout", "seconds without progress until the job ends and says which rank stands still", type=float)
    add(run, "tensorboard", "also log to TensorBoard", action="store_true")
    add(run, "wandb", "also log to Weights & Biases", action="store_true")
    add(run, "dry_run", "print the options and the plan, train nothing", action="store_true")

    model = root.add_argument_group("model")
    for name in ("layers", "width", "heads", "context", "vocabulary"):
        add(model, name, {"vocabulary": "number of tokens; 256 for bytes"}.get(name, ""), type=int)
    add(model, "precision", "of forward and backward; weights and optimizer state are fp32", choices=["fp32", "bf16"])

    data = root.add_argument_group("data")
    add(data, "data", "text or tokens (default: the Python standard library's sources)", metavar="FILE")
    add(data, "data_dtype", "of the tokens in FILE; a .npy file says it by itself", choices=DATA_DTYPES)
    add(data, "holdout", "share of the windows kept for evaluation", type=float)
    add(data, "batch", "windows in one optimizer step, all ranks together", type=int)
    add(
        data,
        "micro_batch",
        "windows that a rank takes at a time; less than its share of --batch accumulates (default: its share)",
        type=int,
    )

    optimizer = root.add_argument_group("optimizer")
    add(optimizer, "optimizer", "", choices=["muon_dist", "adamw"])
    add(optimizer, "lr", "peak learning rate (default 4e-3, 5e-4 for adamw)", type=float)
    add(optimizer, "adam_lr", "for muon_dist: of what AdamW takes, embeddings for one (default: --lr)", type=float)
    add(optimizer, "weight_decay", "", type=float)
    add(optimizer, "clip", "norm to which gradients are clipped; 0: not at all", type=float)
    add(optimizer, "warmup", "steps of linear warm-up (default: a tenth)", type=int)
    add(optimizer, "decay", "steps at the end over which the rate falls (default: half)", type=int)
    add(optimizer, "min_lr_ratio", "what it falls to, as a share of the peak", type=float)
    add(optimizer, "ns_steps", "Newton–Schulz steps: adaptive, or a number")
    add(
        optimizer,
        "accuracy",
        f"for adaptive steps: no further from UVᵀ than so many Jordan steps (default {ACCURACY})",
        choices=ACCURACIES,
    )
    add(optimizer, "coverage", "for adaptive steps, instead: share of directions to bring near 1, at any price", type=float)
    add(optimizer, "burn_in", "for adaptive steps: steps until the first measurement", type=int)
    add(optimizer, "measure_every", "for adaptive steps: steps between two measurements of a matrix", type=int)
    add(
        optimizer,
        "deflation",
        "dominant directions flattened before Newton–Schulz (default: 0; adaptive: as many as pay)",
        type=int,
    )

    add(optimizer, "rule", "for muon_dist: what matrices are updated by", choices=MATRIX_RULES)

    hosts = root.add_argument_group("engines")
    add(hosts, "deepspeed_config", "for --engine deepspeed: batch, precision, schedule, clipping and optimizer", metavar="FILE")
    add(hosts, "tp", "for --engine megatron: tensor-parallel size", type=int)
    add(hosts, "distributed_optimizer", "for --engine megatron: shard the optimizer", action="store_true")
    hosts.add_argument("--local_rank", type=int, help="given by the deepspeed launcher, whose environment says the same")

    checkpoints = root.add_argument_group("checkpoints and evaluation")
    add(checkpoints, "save_every", "steps between two checkpoints, and one at the end; 0: only when a signal ends the run", type=int)
    add(checkpoints, "keep", "checkpoints that are kept, the newest", type=int)
    add(checkpoints, "eval_every", "steps between two evaluations on held-out windows, and one at the end; 0: none", type=int)
    add(checkpoints, "eval_batches", "batches of --batch windows in one evaluation", type=int)
    return root


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line and the file that --config names. Exits with 2 and the reason where they are wrong."""
    root = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    path = getattr(root.parse_args(words), "config", None)
    if path is not None:
        try:
            words = [*_read_toml(path, root), *words]
        except ValueError as error:
            root.error(str(error))
    given = vars(root.parse_args(words))
    given.pop("config", None), given.pop("local_rank", None)
    try:
        options = completed(given)
        _require_host(options)
        return options
    except ValueError as error:
        root.error(str(error))


def _require_host(options: Options) -> None:
    if options.engine != "torch" and not options.dry_run and find_spec(options.engine) is None:  # packages have the engines' names
        raise ValueError(f"--engine {options.engine} needs a package that is not installed: pip install 'muon-dist[{options.engine}]'")


def _read_toml(path: str, root: argparse.ArgumentParser) -> list[str]:
    """A TOML file as command-line words. Flags stand at the top or in tables named like the groups of the help: run, model, data, …"""
    try:
        tomllib = import_module("tomllib" if find_spec("tomllib") else "tomli")
    except ModuleNotFoundError as error:
        raise ValueError("--config needs Python 3.11 or newer, which reads TOML, or: pip install tomli") from error
    try:
        content = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} can't be read: {error}") from error
    groups = {group.title: {a.dest: a for a in group._group_actions} for group in root._action_groups}
    known = {dest: action for actions in groups.values() for dest, action in actions.items() if dest not in ("help", "config")}
    words: list[str] = []

    def take(key: str, value: Any, actions: dict[str, argparse.Action], where: str) -> None:
        action = actions.get(key.replace("-", "_"))
        if action is None or action.dest not in known:
            raise ValueError(f"--config {path}: there is no flag {key!r}{where}; flags are {', '.join(sorted(set(actions) & set(known)))}")
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise ValueError(f"--config {path}: {key} must be true or false, got {value!r}")
            words.extend([action.option_strings[0]] if value else [])
        elif isinstance(value, (bool, list, dict)):
            raise ValueError(f"--config {path}: {key} must be a number or a string, got {value!r}")
        else:
            words.append(f"{action.option_strings[0]}={value}")

    for key, value in content.items():
        if isinstance(value, dict):
            if key not in groups:
                raise ValueError(
                    f"--config {path}: there is no table [{key}]; tables are {', '.join(sorted(str(g) for g in groups if g != 'options'))}"
                )
            for name, each in value.items():
                take(name, each, groups[key], f" in [{key}]")
        else:
            take(key, value, known, "")
    return words


def completed(given: dict[str, Any]) -> Options:
    """Options from those given, by name, with the others at their defaults.

    Raises:
        ValueError: flags that are wrong, or contradict each other.
    """
    options = {**DEFAULTS, **given}
    if options["engine"] == "deepspeed":
        if options["deepspeed_config"] is None:
            raise ValueError("--engine deepspeed needs --deepspeed-config FILE, such as configs/deepspeed/zero2.json")
        for name, where in IN_DEEPSPEED_CONFIG.items():
            if name in given:
                raise ValueError(f"{flag(name)} is said by the DeepSpeed config ({where}); leave it out with --engine deepspeed")
            options[name] = None
        options["optimizer"] = "deepspeed_config"  # until the config has been read
    elif options["deepspeed_config"] is not None:
        raise ValueError("--deepspeed-config needs --engine deepspeed")
    for name in ("tp", "distributed_optimizer"):
        if name in given and options["engine"] != "megatron":
            raise ValueError(f"{flag(name)} needs --engine megatron")
    if options["engine"] != "deepspeed":
        _complete_optimizer(options, given)
    _check(options)
    return Options(**options)


def _complete_optimizer(options: dict[str, Any], given: dict[str, Any]) -> None:
    if options["optimizer"] == "adamw":
        for name in ("adam_lr", "ns_steps", "accuracy", "coverage", "burn_in", "measure_every", "deflation", "rule"):
            if name in given:
                raise ValueError(f"{flag(name)} needs --optimizer muon_dist")
            options[name] = None
    elif options["ns_steps"] != "adaptive":
        try:
            options["ns_steps"] = int(options["ns_steps"])
        except ValueError:
            raise ValueError(f"--ns-steps must be 'adaptive' or a number, got {options['ns_steps']!r}") from None
        for name in ("accuracy", "coverage", "burn_in", "measure_every"):
            if name in given:
                raise ValueError(f"{flag(name)} is for adaptive steps, and --ns-steps is {options['ns_steps']}")
            options[name] = None
    if options["lr"] is None:
        options["lr"] = 5e-4 if options["optimizer"] == "adamw" else 4e-3
    if options["warmup"] is None:
        options["warmup"] = max(options["steps"] // 10, 0)
    if options["decay"] is None:
        options["decay"] = max(options["steps"] // 2, 0)


def _check(options: dict[str, Any]) -> None:
    counts = (
        "steps",
        "log_every",
        "layers",
        "width",
        "heads",
        "context",
        "vocabulary",
        "batch",
        "micro_batch",
        "tp",
        "keep",
        "eval_batches",
    )
    for name in counts:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {options[name]}")
    for name in ("warmup", "decay", "save_every", "eval_every", "weight_decay", "clip", "lr", "adam_lr", "ns_steps", "seed"):
        if isinstance(options[name], (int, float)) and not (options[name] >= 0 and math.isfinite(options[name])):
            raise ValueError(f"{flag(name)} must be 0 or more, got {options[name]}")
    if not (options["rank_timeout"] > 0 and math.isfinite(options["rank_timeout"])):
        raise ValueError(f"--rank-timeout must be a positive number of seconds, got {options['rank_timeout']}")
    for name in ("min_lr_ratio", "holdout"):
        if options[name] is not None and not 0 <= options[name] <= 1:
            raise ValueError(f"{flag(name)} must be from 0 to 1, got {options[name]}")
    if options["holdout"] == 1:
        raise ValueError("--holdout 1 leaves nothing to train on")
    if options["eval_every"] and not options["holdout"]:
        raise ValueError("--eval-every needs windows to evaluate on: --holdout must be above 0")
    if options["width"] % options["heads"]:
        raise ValueError(f"--heads {options['heads']} does not divide --width {options['width']}")
    if options["engine"] == "megatron" and options["heads"] % options["tp"]:
        raise ValueError(f"--tp {options['tp']} does not divide --heads {options['heads']}")
    if options["engine"] == "megatron" and options["vocabulary"] % options["tp"]:
        raise ValueError(f"--tp {options['tp']} does not divide --vocabulary {options['vocabulary']}")
    if options["data_dtype"] == "bytes" and options["vocabulary"] < 256 and not str(options["data"]).endswith(".npy"):
        raise ValueError(f"--vocabulary {options['vocabulary']} is too small for bytes, of which there are 256")
    if options["data_dtype"] != "bytes" and options["data"] is None:
        raise ValueError("--data-dtype needs --data FILE")


def micro_batches(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """(windows a rank takes at a time, how often) in one optimizer step.

    Raises:
        ValueError: the batch can't be shared among the ranks like that.
    """
    if batch % ranks:
        raise ValueError(f"--batch {batch} windows can't be shared evenly among {ranks} data-parallel ranks: choose a multiple of {ranks}")
    share = batch // ranks
    taken = share if micro_batch is None else micro_batch
    if share % taken:
        raise ValueError(f"--micro-batch {taken} does not divide the {share} windows of --batch {batch} that each of {ranks} ranks takes")
    return taken, share // taken
