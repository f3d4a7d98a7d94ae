"""What the server imports once, so that every forked rank starts in a tenth of a second."""

import importlib.util
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import muon_dist

if importlib.util.find_spec("deepspeed"):
    import deepspeed  # noqa: F401
    import muon_dist.integrations.deepspeed
if importlib.util.find_spec("megatron"):
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    import muon_dist.integrations.megatron  # noqa: F401

torch.set_num_threads(1)
