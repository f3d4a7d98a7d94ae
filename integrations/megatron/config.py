"""The settings as a host may hold them that asks its config for the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .optimizer import get_muon_dist_optimizer
from .settings import MuonDistSettings


@dataclass
class MuonDistConfig(MuonDistSettings):
    """All settings of Megatron's optimizers and of MuonDist (`MuonDistSettings`), with what Megatron-Bridge calls."""

    def provide(self, model_chunks: Any, **options: Any) -> Any:
        """The optimizer of these model chunks, a list or one; `options` as for `get_muon_dist_optimizer`."""
        chunks = list(model_chunks) if isinstance(model_chunks, (list, tuple)) else [model_chunks]
        return get_muon_dist_optimizer(self, chunks, **options)
