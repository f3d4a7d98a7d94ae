"""DeepSpeed #8437: under AutoTP every rank orthogonalised its shard as if it were a matrix, so the update depended on the degree.

Still so in 0.19.8, silently.
"""

import pytest
from torch import Tensor

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs


def updates(stage: int, ours: bool) -> dict[str, Tensor]:
    """Four ranks as 1 × 4 and as 2 × 2 would see other data, so this is one data-parallel rank at tp 1 or 2."""
    from torch import distributed as dist

    make = hosts.config if ours else theirs.config
    tp = dist.get_world_size()
    parallel = {"tensor_parallel": hosts.tensor_parallel(tp)} if tp > 1 else {}
    engine = hosts.start(make(stage, **parallel))
    cut = {name: t.clone() for name, t in theirs.whole(engine).items()}
    hosts.train_step(engine, 0)
    after = theirs.whole(engine)
    result = {name: after[name] - cut[name] for name in sorted(hosts.MATRICES)}
    everyone: list[dict[str, Tensor]] = [{}] * tp
    dist.all_gather_object(everyone, result)
    import torch

    column = ("layers.0.weight", "layers.2.weight")
    return result if tp == 1 else {n: torch.cat([each[n] for each in everyone], 0 if n in column else 1) for n in result}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_update_does_not_depend_on_the_degree(stage: int) -> None:
    for ours in (False, True):
        one, two = (run_ranks(n, updates, stage, ours)[0] for n in (1, 2))
        difference = theirs.differs(two, one)
        assert difference < 2e-5 if ours else difference > 0.3
