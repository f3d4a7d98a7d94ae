"""The ranks that tests share: each test finds them as they were forked, and those that can't be put back are replaced."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from . import pristine
from .ranks import run_ranks


def process() -> int:
    return os.getpid()


def look() -> dict:
    """All that a test could leave behind, as this one finds it."""
    import deepspeed
    from megatron.core import parallel_state

    from muon_dist.polar import newton_schulz

    return {
        "groups": len(dist.distributed_c10d._world.pg_names),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.empty(0).device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "environment": (os.environ.get("LEFT"), os.environ.get("OMP_NUM_THREADS")),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "filters": len(warnings.filters),
        "cuda": torch.cuda.current_device.__module__,
        "chance": (torch.rand(1).item(), np.random.rand(), random.random()),
        "resolves": newton_schulz.BF16_RESOLVES,
        "kinds": len(newton_schulz.DTYPES),
        "megatron": parallel_state.is_initialized(),
        "deepspeed": deepspeed.comm.comm.cdb is None,
        "optimizer": hasattr(newton_schulz.Slices, "left"),
    }


def leave_everything_behind() -> None:
    """What careless tests do."""
    import deepspeed

    from muon_dist.example.megatron_host import Setup, initialize
    from muon_dist.polar import newton_schulz

    initialize(Setup())
    deepspeed.comm.comm.cdb = object()
    dist.new_group([0])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    os.environ["LEFT"] = "yes"
    del os.environ["OMP_NUM_THREADS"]
    os.chdir("/")
    sys.path.insert(0, "/left")
    warnings.simplefilter("error")
    newton_schulz.BF16_RESOLVES = 0.0
    newton_schulz.DTYPES["left"] = torch.float64
    newton_schulz.Slices.left = True  # type: ignore[attr-defined]


def test_a_test_finds_ranks_as_they_were_forked_whatever_the_last_one_did() -> None:
    first, processes = run_ranks(2, look), run_ranks(2, process)
    run_ranks(2, leave_everything_behind)
    assert run_ranks(2, look) == first
    assert run_ranks(2, process) == processes  # and they are the same ones
    assert first[0]["chance"] == first[1]["chance"]


def starts_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def test_ranks_with_a_thread_of_a_test_are_replaced() -> None:
    before = run_ranks(2, process)
    run_ranks(2, starts_a_thread)
    assert not set(run_ranks(2, process)) & set(before)


def fails(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("rank 1 has had enough")
        if how == "dies":
            os._exit(3)
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "words"),
    [("raises", "rank 1:\n(.|\n)*rank 1 has had enough"), ("dies", "rank 1:\nit died"), ("hangs", r"did not end within 1 s")],
)
def test_ranks_that_fail_fail_the_test_and_are_replaced(how: str, words: str) -> None:
    before = run_ranks(2, process)
    with pytest.raises(RuntimeError, match=words):
        run_ranks(2, fails, how, timeout=1 if how == "hangs" else 20)
    assert not set(run_ranks(2, process)) & set(before)


def test_what_a_test_of_this_process_leaves_behind_is_named() -> None:
    before = pristine.Interpreter()
    assert before.changed() == []
    os.environ["LEFT"] = "yes"
    torch.set_num_threads(2)
    assert before.changed() == ["threads", "environment: LEFT"]
    before.put_back()
    assert before.changed() == []


def accelerated(asks: bool) -> bool:
    """Whether Hugging Face accelerate runs this rank, by which MuonDist decides where momentum is kept."""
    from accelerate import PartialState

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if asks:
        PartialState(cpu=True)
    return bool(PartialState._shared_state)


def test_accelerate_does_not_stay() -> None:
    assert run_ranks(2, accelerated, True) == [True, True]
    assert run_ranks(2, accelerated, False) == [False, False]
