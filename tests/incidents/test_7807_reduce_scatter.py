"""DeepSpeed #7807: with reduce_scatter a matrix that lies across two ranks was orthogonalised from a half-reduced gradient.

Each rank had the reduced values of its own part only and its own, unreduced ones of the rest, so the two ranks' parts of the update
came from two different matrices. Repaired before 0.19.8: every part goes to all ranks that hold some of the matrix; BROKEN undoes that.
"""

from typing import Any

import pytest

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def cut_matrices(stage: int) -> tuple[float, float, float]:
    """What reduce_scatter changes in the update of theirs, of theirs without the repair, and of ours."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    whole = DeepSpeedZeroOptimizer.average_tensor

    def broken(self: Any, *args: Any, **options: Any) -> Any:  # BROKEN: nobody but a part's own rank gets its reduced values
        tagged = [p for group in self.bit16_groups for p in group if getattr(p, "use_muon", False)]
        for p in tagged:
            p.use_muon = False
        try:
            return whole(self, *args, **options)
        finally:
            for p in tagged:
                p.use_muon = True

    def difference(make: Any) -> float:
        scattered, reduced = (theirs.change(make(stage, zero={"reduce_scatter": how})) for how in (True, False))
        return theirs.differs(scattered, reduced)

    repaired = difference(theirs.config)
    DeepSpeedZeroOptimizer.average_tensor = broken
    try:
        fault = difference(theirs.config)
    finally:
        DeepSpeedZeroOptimizer.average_tensor = whole
    return repaired, fault, difference(hosts.config)


@pytest.mark.parametrize("stage", [1, 2])
def test_cut_matrices_are_orthogonalised_from_the_whole_gradient(stage: int) -> None:
    for repaired, fault, ours in run_ranks(2, cut_matrices, stage):
        assert repaired < 2e-5 and fault > 0.1
        assert ours < 2e-5
