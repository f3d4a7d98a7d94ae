"""DeepSpeed's `_hp_mapping` under round_robin_gradients: it says where parameters would lie had they not been reordered.

Whoever believes it reads, and updates, the values of other parameters; DeepSpeed's own `safe_get_full_fp32_param` does. Seen in 0.19.8
at stages 1 and 2 where nothing is padded. Ours takes the order that the partitions were made in, and compares values before the
first update.
"""

from typing import Any

import pytest
import torch

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks


def misplaced(stage: int) -> tuple[int, int]:
    """Pieces that are not where they are said to be: by DeepSpeed's mapping, by ours."""
    engine = hosts.start(hosts.config(stage, zero={"round_robin_gradients": True}))
    fault = ours = 0
    for p in engine.module.parameters():
        mapping: Any = p._hp_mapping
        if mapping is not None:
            place = mapping.lp_fragment_address
            mine = p.detach().view(-1)[place.start : place.start + place.numel]
            fault += not torch.equal(mapping.get_hp_fragment().detach(), mine)
    for store in engine.basic_optimizer.stores:
        for piece in store.pieces:
            ours += not torch.equal(hosts.piece_of(store, piece, store.tensor), piece.values())
    return fault, ours


@pytest.mark.parametrize("stage", [1, 2])
def test_pieces_are_where_the_partitions_have_them(stage: int) -> None:
    for fault, ours in run_ranks(2, misplaced, stage):
        assert fault > 0
        assert ours == 0
