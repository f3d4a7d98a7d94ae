"""Update rules: what becomes of a gradient. `RULES` has them by the "algorithm" of a parameter group."""

from .adamw import AdamW
from .muon import Muon
from .rule import ElementwiseRule, MatrixRule, Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (Muon(), AdamW())}

__all__ = ["RULES", "ElementwiseRule", "MatrixRule", "Rule"]
