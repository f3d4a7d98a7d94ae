"""Muon for large models under the sharding their trainers already use: one owner per matrix, the same update everywhere."""

from .optimizer import MuonDist
from .polar.newton_schulz import orthogonalize
from .polar.polynomials import Schedule
from .routing import build_param_groups
from .sharding.layout import ShardLayout
from .spectrum.policy import choose_schedule
from .version import __version__

__all__ = ["MuonDist", "Schedule", "ShardLayout", "__version__", "build_param_groups", "choose_schedule", "orthogonalize"]
