"""DeepSpeed #8442: without ZeRO nothing orthogonalised, and "Muon" was plain SGD without momentum.

Its optimizer's step relied on ZeRO's gradient hooks for the rest. Repaired before 0.19.8; BROKEN applies the gradient as that step did.
"""

import pytest
import torch
from torch import Tensor

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def spread(update: dict[str, Tensor]) -> float:
    """The largest over the median singular value, at worst."""
    values = [torch.linalg.svdvals(t) for t in update.values()]
    return max(float(v[0] / v.median()) for v in values)


def spreads(dtype: str) -> tuple[float, float]:
    model = hosts.make_net()
    model(hosts.batch(0, 0)).backward()
    broken = {name: -0.5 * p.grad for name, p in model.named_parameters() if name in hosts.MATRICES}  # BROKEN: lr · gradient
    return spread(broken), spread(theirs.change(hosts.config(0, dtype=dtype)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_0_orthogonalises(dtype: str) -> None:
    for fault, ours in run_ranks(2, spreads, dtype):
        assert fault > 10
        assert ours < 4
