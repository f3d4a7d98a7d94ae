"""Muon for large models under the sharding their trainers already use: one owner per matrix, the same update everywhere."""

from .optimizer import MuonDist
from .polar.newton_schulz import orthogonalize
from .routing import build_param_groups
from .sharding.layout import ShardLayout
from .version import __version__

__all__ = ["MuonDist", "ShardLayout", "__version__", "build_param_groups", "orthogonalize"]
