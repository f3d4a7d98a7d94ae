"""On PYTHONPATH: Megatron-LM's own pretrain_gpt.py runs on CPU ranks under `python -m muon_dist.integrations.megatron`.

What Megatron asks of CUDA is redirected before the script begins; the script, its parser and its training loop stay as they are.
"""

from __future__ import annotations

import collections
import functools
import os
import runpy
import sys
from typing import Any

if "RANK" in os.environ and "muon_dist.integrations.megatron" in sys.orig_argv:
    run_path = runpy.run_path

    def without_cuda(*args: Any, **options: Any) -> Any:
        from muon_dist.example.megatron_host import run_without_cuda

        run_without_cuda()
        import torch
        from megatron.core import tensor_parallel
        from megatron.core.datasets import utils
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import torch_norm
        from megatron.training import training

        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
        cuda: Any = torch.cuda
        cuda.device_count = lambda: 1  # else no process groups are made
        cuda.set_device = cuda.set_rng_state = cuda.empty_cache = lambda *a, **k: None
        cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "device_memory_used"):
            setattr(cuda, name, lambda *a, **k: 0)
        cuda.memory_stats = lambda *a, **k: collections.defaultdict(int)
        random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        tensor_parallel.model_parallel_cuda_manual_seed = lambda *a, **k: None
        utils.compile_helpers = lambda: None  # needs make and pybind11; mock data do without
        try:
            from megatron.legacy import fused_kernels

            fused_kernels.load = lambda args: None
        except ImportError:
            pass
        new = torch_norm.WrappedTorchNorm.__new__

        def norm(cls: Any, config: Any, *a: Any, **k: Any) -> Any:
            """torch's norms refuse sequence parallelism, which Transformer Engine's take by this mark on their parameters."""
            asked, config.sequence_parallel = config.sequence_parallel, False
            try:
                made = new(cls, config, *a, **k)
            finally:
                config.sequence_parallel = asked
            for p in made.parameters():
                p.sequence_parallel = asked
            return made

        torch_norm.WrappedTorchNorm.__new__ = norm
        return run_path(*args, **options)

    runpy.run_path = without_cuda
