"""What the server of ranks and jobs does once, so that every forked process starts in a tenth of a second: imports, and first times."""

import gc
import importlib.util
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import muon_dist

if importlib.util.find_spec("deepspeed"):
    import muon_dist.integrations.deepspeed  # changes DeepSpeed, so before its state is remembered
if importlib.util.find_spec("megatron"):
    import muon_dist.integrations.megatron

torch.set_num_threads(1)


def take_first_steps() -> None:
    """Polynomials and the trial of Newton–Schulz's forms are worked out once in a process: a third of a second."""
    for dtype in (torch.float32, torch.float64):
        for options in ({"ns_steps": 5}, {"ns_steps": "adaptive", "burn_in": 1, "measure_every": 2}):
            named = [(f"blocks.{k}.attn.q.weight", torch.nn.Parameter(torch.ones(3, 4 + k, dtype=dtype))) for k in range(3)]
            optimizer = muon_dist.MuonDist(named, **options)
            for _ in range(6):
                for _, p in named:
                    p.grad = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
                optimizer.step()


take_first_steps()
gc.collect()
gc.freeze()  # a collection in a forked process would touch, and so copy, all of this
