"""MuonDist in the Hugging Face Trainer, without DeepSpeed: pass `optimizer_cls_and_kwargs(args, ...)` to it.

With DeepSpeed, import muon_dist.integrations.deepspeed and name "MuonDist" in the config that `TrainingArguments(deepspeed=...)` gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

import muon_dist
from muon_dist.groups import read_groups

from ..settings import DEFAULTS, names_given, naming, read_settings

_NOT_HERE = {"params": "the Trainer passes its model's parameters"}


class MuonDistFactory:
    """What the Trainer calls with its model to get the optimizer; see `optimizer_cls_and_kwargs`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        muon: Sequence[str] = (),
        adamw: Sequence[str] = (),
        split: Mapping[str, Sequence[int] | int] | None = None,
        transpose: Sequence[str] = (),
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> muon_dist.MuonDist:
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # the Trainer's rule; it uses the model alone
        groups = []
        for group in muon_dist.build_param_groups(model, muon=muon, adamw=adamw, split=split, transpose=transpose):
            for rate, wanted in ((weight_decay, True), (0.0, False)):
                members = [(m, r) for m, r in zip(group["params"], group["reasons"], strict=True) if (m[0] in decayed) is wanted]
                if members:
                    groups.append({**group, "params": [m for m, _ in members], "reasons": [r for _, r in members], "weight_decay": rate})
        return muon_dist.MuonDist(groups, **{"replicate_momentum": False, **settings})  # `register` completes it before it is saved


def optimizer_cls_and_kwargs(args: TrainingArguments, **settings: Any) -> tuple[type[MuonDistFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, with learning rate, weight decay and AdamW's numbers from its arguments.

        trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, accuracy="jordan4"), ...)

    Args:
        args: the Trainer's.
        **settings: what a DeepSpeed config's entry takes: arguments of `muon_dist.MuonDist`, which win over `args`, "betas" and "eps"
            for AdamW's, and the patterns muon, adamw, split and transpose of `muon_dist.build_param_groups`. Biases and norms are not
            decayed, as the Trainer has it.

    Raises:
        ValueError: `args` ask for DeepSpeed, whose config names the optimizer; an unknown setting, with the nearest known one; or a value.
    """
    if args.deepspeed is not None:
        raise ValueError(
            'TrainingArguments(deepspeed=...) takes its optimizer from that config: put "optimizer": {"type": "MuonDist"} there and '
            "import muon_dist.integrations.deepspeed"
        )
    arguments, patterns = read_settings(settings, _NOT_HERE, "the Trainer")
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adam_betas": (args.adam_beta1, args.adam_beta2),
        "adam_eps": args.adam_epsilon,
    }
    with naming(names_given(settings)):
        read_groups([{"params": [], "algorithm": "muon"}], {**DEFAULTS, **given, **arguments}, {})  # raises for a value
    return MuonDistFactory, {**given, **arguments, **patterns}


def register() -> None:
    """Let every Trainer complete MuonDist's state on all ranks before rank 0 saves it. Nothing happens the second time.

    Raises:
        ImportError: a Trainer that saves in another way.
    """
    save = getattr(Trainer, "_save_optimizer_and_scheduler", None)
    if save is None:
        raise ImportError(f"muon_dist was tested with transformers 5.23; the Trainer of {transformers.__version__} saves in another way")
    if not hasattr(save, "consolidates"):
        Trainer._save_optimizer_and_scheduler = _consolidating(save)  # type: ignore[method-assign]


def _consolidating(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def consolidating(trainer: Any, output_dir: str) -> None:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        if isinstance(optimizer, muon_dist.MuonDist):
            optimizer.consolidate()
        save(trainer, output_dir)

    consolidating.consolidates = True  # type: ignore[attr-defined]
    return consolidating


register()

__all__ = ["MuonDistFactory", "optimizer_cls_and_kwargs"]
