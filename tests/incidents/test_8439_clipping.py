"""DeepSpeed #8439, #7776: gradient clipping divided the orthogonalised update.

Newton–Schulz ran inside the backward pass, so the "gradients" whose norm DeepSpeed clipped were updates already: their norm grows with the
width, and clipping to 1, DeepSpeed's default, made every step of a wide model tens of times too short. Still so in 0.19.8.
"""

import pytest

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def shrinks(stage: int, clip: float) -> tuple[float, float]:
    """The size of the first update with clipping, over that without: theirs and ours. The gradient's scale must not matter to it."""
    pairs = []
    for make in (theirs.config, hosts.config):
        off, on = (theirs.size(theirs.change(make(stage, gradient_clipping=c))) for c in (0.0, clip))
        pairs.append(on / off)
    return pairs[0], pairs[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_never_touches_the_update(stage: int) -> None:
    for fault, ours in run_ranks(2, shrinks, stage, 1.0):
        assert fault < 0.15  # a seventh and less, already at width 33
        assert ours == pytest.approx(1, abs=2e-5)
    for fault, ours in run_ranks(2, shrinks, stage, 1e-3):
        assert fault < 1e-3
        assert ours == pytest.approx(1, abs=2e-5)
