"""DeepSpeed #7713: its schedulers wrote one learning rate into Muon's and AdamW's groups, whatever muon_lr and adam_lr said.

Still so in 0.19.8 where a config gives WarmupLR one maximum, as most do.
"""

from .. import deepspeed_hosts as hosts
from ..ranks import run_ranks
from . import theirs

WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.02, "warmup_num_steps": 2}}
RATES = {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 1e-5}


def rates() -> tuple[set[float], set[float]]:
    result = []
    for make in (theirs.config, hosts.config):
        engine = hosts.start(make(1, params=RATES, scheduler=WARMUP))
        for k in range(4):
            hosts.train_step(engine, k)
        result.append({float(group["lr"]) for group in engine.basic_optimizer.param_groups})
    return result[0], result[1]


def test_each_group_keeps_its_rate() -> None:
    for fault, ours in run_ranks(1, rates):
        assert fault == {0.02}
        assert ours == {0.02, 1e-5}
