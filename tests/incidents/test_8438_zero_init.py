"""DeepSpeed #8438: under zero.Init every parameter reported one dimension, so none was taken for a matrix and all got AdamW, silently.

Repaired before 0.19.8, which looks at the layer's shape; BROKEN is the rule by `p.ndim`.
"""

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks


def routed() -> tuple[set[str], set[str]]:
    import deepspeed

    ds_config = hosts.config(3)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = hosts.make_net()
    broken = {name for name, p in model.named_parameters() if p.ndim >= 2}  # BROKEN
    engine = hosts.start(ds_config, model)
    return broken, {route.name for route in engine.basic_optimizer.routes if route.algorithm == "muon"}


def test_partitioned_parameters_are_still_matrices() -> None:
    for fault, ours in run_ranks(2, routed):
        assert fault == set()
        assert ours == hosts.MATRICES
