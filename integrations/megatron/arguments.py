"""Flags: Megatron's own `--muon-*` keep their meaning, ours stand beside them, and `--optimizer` takes muon_dist."""

from __future__ import annotations

import argparse
from typing import Any

from muon_dist.rules import MATRIX_RULES, RULES
from muon_dist.sharding.owners import PLACEMENTS
from muon_dist.spectrum.policy import ACCURACIES, ACCURACY, FEWEST

from .settings import GIVEN, NAME, PRECISIONS, TOLD_APART

# Set on Megatron's parsed flags where --optimizer is muon_dist. Megatron itself reads "adam" there: it refuses the distributed
# optimizer and overlap for names that it doesn't know, and MuonDist goes into the wrappers that it builds for Adam.
ASKED = "muon_dist"


_NESTEROV = ("--muon-nesterov", "--muon-use-nesterov")


_asked = False  # whether the flags that this process parsed last ask for MuonDist


def was_asked_for() -> bool:
    return _asked


class _Optimizer(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        global _asked
        _asked = values == NAME
        setattr(namespace, ASKED, _asked)
        namespace.optimizer = "adam" if _asked else values


class _Given(argparse.Action):
    """Keep a value, and that it was given: MuonDist's default is another than the flag's."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, GIVEN, [*getattr(namespace, GIVEN, ()), self.dest])


class _Pairs(argparse.Action):
    """NAME=NUMBER … as a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, {name: float(number) for name, number in (pair.split("=") for pair in values)})
        except ValueError:
            parser.error(f"{option_string} takes NAME=NUMBER, as in beta2=0.95, got {' '.join(values)}")


def _own_of_rules() -> dict[str, Any]:
    return {key: value for name in MATRIX_RULES for key, value in RULES[name].hyperparameters.items()}


def add_muon_dist_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add MuonDist's flags to Megatron's parser; for `extra_args_provider`. Nothing happens the second time."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    if "--muon-coverage" in known:
        return parser
    parser.conflict_handler = "resolve"  # the flags below that Megatron has are declared anew, with the same meaning
    group = parser.add_argument_group("muon_dist", "what --optimizer muon_dist takes beside Megatron's --muon-* flags")
    group.conflict_handler = "resolve"
    choices = list(known["--optimizer"].choices or ()) if "--optimizer" in known else ["adam", "sgd"]
    group.add_argument(
        "--optimizer",
        default="adam",
        choices=[*choices, NAME],
        action=_Optimizer,
        help="muon_dist: Muon for matrices, orthogonalised whole on one rank each, and AdamW for the rest, at any parallelism.",
    )
    for dest in TOLD_APART:
        option = "--" + dest.replace("_", "-")
        theirs = known.get(option)
        kind: Any = int if dest == "muon_num_ns_steps" else str
        more: dict[str, Any] = {"choices": theirs.choices, "help": theirs.help} if theirs is not None else {}
        group.add_argument(option, type=kind, default=None if theirs is None else theirs.default, action=_Given, **more)
    add = group.add_argument
    nesterov = [option for option in _NESTEROV if option in known]
    for option in _NESTEROV if nesterov else ():  # 0.16 and 0.19 have one of them each
        if option not in known:
            add(option, action="store_true", dest=known[nesterov[0]].dest, help=known[nesterov[0]].help)
    if "--muon-fp32-matmul-prec" in known:  # "highest" is what Megatron's config takes beside its parser's choices
        theirs = known["--muon-fp32-matmul-prec"]
        add(theirs.option_strings[0], default=theirs.default, choices=PRECISIONS, help=theirs.help)
    add("--muon-no-split-fc1", action="store_false", dest="muon_split_fc1", help="Gate and up of a gated MLP as one matrix.")
    add("--muon-lr", type=float, help="Peak learning rate of Muon's matrices; --lr is then that of all others. Both follow the schedule.")
    add(
        "--muon-accuracy",
        choices=ACCURACIES,
        help=f"Adaptive steps leave no matrix further from UVᵀ than so many Jordan steps ({ACCURACY}).",
    )
    add("--muon-coverage", type=float, help="Instead: share of every matrix's directions that adaptive steps bring near 1, at any price.")
    add("--muon-tol", type=float, help="For --muon-coverage: how near (.3).")
    add("--muon-min-ns-steps", type=int, help=f"Fewest adaptive steps ({FEWEST}; 1 with --muon-coverage).")
    add("--muon-max-ns-steps", type=int, help="Most adaptive steps (12).")
    add("--muon-measure-every", type=int, help="Steps between two measurements of a matrix's spectrum, denser at first (100).")
    add("--muon-burn-in", type=int, help="Steps before the first measurement; until then scaling laws predict (0).")
    add("--muon-noise-floor", type=float, help="Singular values below this share of the Frobenius norm don't count (1e-4).")
    add("--muon-deflation", type=int, help="Dominant directions that are flattened first (0; for adaptive steps chosen with them).")
    add("--muon-rule", choices=MATRIX_RULES, default="muon", help="What matrices are updated by (muon).")
    add(
        "--muon-rule-options",
        nargs="+",
        action=_Pairs,
        metavar="NAME=NUMBER",
        help=f"The rule's own hyperparameters: {', '.join(f'{key}={value}' for key, value in _own_of_rules().items())}.",
    )
    add("--muon-wire-dtype", choices=["bf16", "fp32"], help="What travels between ranks: bf16 on GPUs, fp32 on CPUs.")
    add("--muon-bucket-mb", type=float, default=64, help="MiB that an owner gathers at a time (64).")
    add("--muon-placement", choices=PLACEMENTS, default="owner", help="Who works on a matrix: an owner, all ranks on slices, or by cost.")
    add(
        "--muon-symmetric-kernels", type=int, metavar="ROWS", help="From how many rows on a Triton kernel takes symmetric products (never)."
    )
    add("--muon-params", nargs="+", default=(), metavar="PATTERN", help="Names of parameters that go to Muon whatever the rules say.")
    add("--muon-adamw-params", nargs="+", default=(), metavar="PATTERN", help="Names of parameters that go to AdamW: router, …")
    add("--muon-telemetry-dir", metavar="DIR", help="Where reports of matrices go, as lines of JSON; `muon-dist spectrum DIR` shows them.")
    add("--muon-telemetry-sinks", nargs="+", default=(), choices=["tensorboard", "wandb"], help="Where else they go.")
    return parser
