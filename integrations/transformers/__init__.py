"""MuonDist in the Hugging Face Trainer, without DeepSpeed: pass `optimizer_cls_and_kwargs(args, ...)` to it.

With DeepSpeed, import muon_dist.integrations.deepspeed and name "MuonDist" in the config that `TrainingArguments(deepspeed=...)` gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

import muon_dist


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
        return muon_dist.MuonDist(groups, **settings)


def optimizer_cls_and_kwargs(args: TrainingArguments, **settings: Any) -> tuple[type[MuonDistFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, with learning rate, weight decay and AdamW's numbers from its arguments.

        trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, coverage=0.9), ...)

    Args:
        args: the Trainer's.
        **settings: arguments of `muon_dist.MuonDist`, which win over `args`, and the patterns muon, adamw, split and transpose of
            `muon_dist.build_param_groups`. Biases and norms are not decayed, as the Trainer has it.

    Raises:
        ValueError: `args` ask for DeepSpeed, whose config names the optimizer.
    """
    if args.deepspeed is not None:
        raise ValueError(
            'TrainingArguments(deepspeed=...) takes its optimizer from that config: put "optimizer": {"type": "MuonDist"} there and '
            "import muon_dist.integrations.deepspeed"
        )
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adam_betas": (args.adam_beta1, args.adam_beta2),
        "adam_eps": args.adam_epsilon,
    }
    return MuonDistFactory, {**given, **settings}


__all__ = ["MuonDistFactory", "optimizer_cls_and_kwargs"]
