"""Update rules: what becomes of a gradient. `RULES` has them by name."""

from collections.abc import Mapping
from typing import Any

from .adamw import AdamW
from .muon import Muon
from .normuon import NorMuon
from .rule import ElementwiseRule, MatrixRule, Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (Muon(), NorMuon(), AdamW())}
MATRIX_RULES = tuple(name for name, rule in RULES.items() if isinstance(rule, MatrixRule))


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter group: its "rule" where it has one, else that of its algorithm's name.

    Raises:
        ValueError: no rule for matrices.
    """
    return matrix_rule(group["rule"]) if "rule" in group else RULES[group["algorithm"]]


def matrix_rule(name: str) -> Rule:
    """The rule for matrices of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in MATRIX_RULES:
        raise ValueError(f"rule={name!r}: choose one of {', '.join(MATRIX_RULES)}")
    return RULES[name]


__all__ = ["MATRIX_RULES", "RULES", "ElementwiseRule", "MatrixRule", "Rule", "matrix_rule", "rule_of"]
