"""A thousand random configurations, right and wrong ones: each trains a step on two ranks or raises a clear error on both; none hangs."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .jobs import ROOT
from .ranks import _context

RANKS = 2
PATIENCE = 60.0  # seconds until a configuration is taken to hang
TRAINER, OPTIMIZER = 600, 400  # configurations of the trainer's flags, and of MuonDist's arguments

SETTINGS = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), "database": None}
seen: Counter[str] = Counter()


class Workers:
    """Ranks of one process group that try one configuration after the other."""

    def __init__(self, folder: Path) -> None:
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, rank, str(folder)))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def try_out(self, kind: str, configuration: Any) -> str:
        """What became of it: "trained", or the error, the same on all ranks; fails the test where it is none of both."""
        for pipe in self._pipes:
            pipe.send((kind, configuration))
        deadline, outcomes = time.monotonic() + PATIENCE, []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                pytest.fail(f"{configuration}: rank {rank} hangs; others: {outcomes}")
            try:
                outcomes.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                pytest.fail(f"{configuration}: rank {rank} died")
        for clear, words in outcomes:
            assert clear, f"{configuration} is neither trained nor refused clearly:\n{words}"
        told = {words == "trained" for _, words in outcomes}
        assert len(told) == 1, f"{configuration}: ranks disagree: {outcomes}"
        return str(outcomes[0][1])

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("random")
    (folder / "text").write_bytes(b"to be or not to be, that is the question. " * 40)
    (folder / "short").write_bytes(b"to be")
    np.save(folder / "tokens.npy", np.arange(900, dtype=np.uint16) % 256)
    np.save(folder / "large.npy", np.arange(900, dtype=np.int32) + 5000)
    (folder / "tokens.bin").write_bytes((np.arange(900, dtype=np.uint32) % 256).tobytes())
    made = Workers(folder)
    yield made
    made.stop()


def maybe(strategy: Any) -> Any:
    return st.one_of(st.none(), strategy)


def mostly(good: list[Any], bad: list[Any]) -> Any:
    """A good value, or one time in thirty a bad one, so that a configuration of many is right about as often as wrong."""
    return st.integers(0, 29).flatmap(lambda k: st.sampled_from(bad if k == 17 else good))


FLAGS = {
    "engine": mostly(["torch"] * 9 + ["megatron"], ["jax"]),
    "layers": mostly([1, 2], [0, -1]),
    "width": mostly([8, 16, 24, 40], [0, 7]),
    "heads": mostly([1, 2, 4], [3, 0]),
    "context": mostly([2, 5, 16], [0, 5000]),
    "vocabulary": mostly([256, 300, 1000], [10, 0]),
    "precision": maybe(mostly(["fp32", "bf16"], ["fp8"])),
    "data": mostly(["text", "tokens.npy", "tokens.bin"], ["short", "none", "large.npy"]),
    "data_dtype": mostly(["bytes", "uint32"], ["uint16", "float32"]),
    "holdout": maybe(mostly([0.1, 0.5], [0, 1, -1, 2])),
    "batch": mostly([2, 4, 6, 8], [3, 0]),
    "micro_batch": maybe(mostly([1, 2], [5, 0])),
    "optimizer": maybe(mostly(["muon_dist", "muon_dist", "adamw"], ["sgd"])),
    "lr": maybe(mostly([0.0, 1e-3, 1.0, 1e30], [-1, "nan", "inf"])),
    "adam_lr": maybe(mostly([1e-3], [-1])),
    "weight_decay": maybe(mostly([0.0, 0.1], [-1])),
    "clip": maybe(mostly([0.0, 1.0], [-1])),
    "warmup": maybe(mostly([0, 3], [-1])),
    "decay": maybe(mostly([0, 3], [-2])),
    "min_lr_ratio": maybe(mostly([0.0, 0.5, 1.0], [2])),
    "ns_steps": maybe(mostly(["adaptive", 1, 5, 12], [0, -1, "x", 1.5])),
    "coverage": maybe(mostly([0.5, 0.99], [0, 1.5])),
    "burn_in": maybe(mostly([0, 1, 7], [-1])),
    "measure_every": maybe(mostly([2, 9], [0])),
    "deflation": maybe(mostly([0, 1, 4], [-1, 1000])),
    "tp": maybe(mostly([1, 2], [3, 0])),
    "save_every": maybe(mostly([0, 1], [-1])),
    "eval_every": maybe(mostly([0, 1], [-1])),
    "keep": maybe(mostly([1, 3], [0])),
    "resume": maybe(mostly(["auto", "never"], ["always"])),
}


@settings(max_examples=TRAINER, **SETTINGS)
@given(configuration=st.fixed_dictionaries(FLAGS))
def test_every_configuration_of_the_trainer_trains_or_is_refused(workers: Workers, configuration: dict[str, Any]) -> None:
    # a flag that the engine or the optimizer has no use for is refused, so most of those are left out
    words = {name: value for name, value in configuration.items() if value is not None}
    if len(words) % 3:
        for name in ("tp",) if words["engine"] != "megatron" else ():
            words.pop(name, None)
        unused = ("adam_lr", "ns_steps", "coverage", "burn_in", "measure_every", "deflation") if words.get("optimizer") == "adamw" else ()
        if str(words.get("ns_steps", "adaptive")) != "adaptive":
            unused = ("coverage", "burn_in", "measure_every")
        for name in unused:
            words.pop(name, None)
        if words["data"] != "tokens.bin":
            words.pop("data_dtype")
        else:
            words["data_dtype"] = "uint32"
    outcome = workers.try_out("trainer", words)
    seen["trained" if outcome == "trained" else "refused"] += 1


FLOATS = [0.0, -1.0, float("nan"), float("inf"), "0.1", None]
ARGUMENTS = {
    "lr": maybe(mostly([0.0, 1e-3, 0.5], FLOATS[1:5])),
    "weight_decay": maybe(mostly([0.0, 0.1], FLOATS[1:5])),
    "momentum": maybe(mostly([0.0, 0.95], [1.0, -0.1, "x"])),
    "nesterov": maybe(mostly([True, False], ["yes"])),
    "ns_steps": maybe(mostly(["adaptive", 1, 5, 8], [0, -3, 2.5, "many", True])),
    "polynomial": maybe(
        mostly(["jordan", "polar_express", "minimax", "cans", (3.4445, -4.775, 2.0315)], ["newton", (1.0, 2.0), [(1, 2, 3)] * 40, 5])
    ),
    "adjust_lr_fn": maybe(mostly(["match_rms_adamw", "original", "spectral", "none"], ["max", 3])),
    "muon_lr": maybe(mostly([1e-3], FLOATS[1:5])),
    "adam_lr": maybe(mostly([1e-3], FLOATS[1:5])),
    "adam_betas": maybe(mostly([(0.9, 0.95), (0.0, 0.5)], [(1.0, 0.5), (0.9,), 0.9])),
    "adam_eps": maybe(mostly([1e-8], [0.0, -1.0])),
    "compute_dtype": maybe(mostly(["fp32", "fp64", torch.float32], ["int8", torch.int32, "bf17"])),
    "wire_dtype": maybe(mostly(["fp32", "bf16", torch.float64], ["fp16", "fp8"])),
    "bucket_mb": maybe(mostly([0.001, 1, 64], [0, -1, "big", True])),
    "placement": maybe(mostly(["owner", "gram", "auto"], ["shard", 3])),
    "eps": maybe(mostly([1e-20, 1e-7], [-1.0, "x"])),
    "nonfinite": maybe(mostly(["skip", "raise"], ["ignore"])),
    "extra_scale_factor": maybe(mostly([1.0, 0.2], [float("nan"), "x"])),
    "deflation": maybe(mostly([0, 2], [-1, 1.5, 10_000])),
    "coverage": maybe(mostly([0.5, 0.9], [0.0, 1.1, "x"])),
    "tol": maybe(mostly([0.2, 0.3], [0.0, 1.0, -1])),
    "min_ns_steps": maybe(mostly([1, 2, 3], [0, 20])),
    "max_ns_steps": maybe(mostly([6, 8, 12], [0, 1, 100])),
    "measure_every": maybe(mostly([3, 50], [0, -1])),
    "burn_in": maybe(mostly([0, 1], [-1, 0.5])),
    "noise_floor": maybe(mostly([0.0, 1e-4], [-1.0, 2.0])),
}
ADAPTIVE_ONLY = ("coverage", "tol", "min_ns_steps", "max_ns_steps", "measure_every", "burn_in", "noise_floor")


@settings(max_examples=OPTIMIZER, **SETTINGS)
@given(configuration=st.fixed_dictionaries(ARGUMENTS), matched=st.booleans())
def test_every_configuration_of_the_optimizer_steps_or_is_refused(workers: Workers, configuration: dict[str, Any], matched: bool) -> None:
    arguments = {name: value for name, value in configuration.items() if value is not None}
    if matched and arguments.get("ns_steps", "adaptive") != "adaptive":
        arguments = {name: value for name, value in arguments.items() if name not in ADAPTIVE_ONLY}
    outcome = workers.try_out("optimizer", arguments)
    seen["stepped" if outcome == "trained" else "refused by MuonDist"] += 1


def test_both_kinds_were_met() -> None:
    """Enough configurations were right, and enough were wrong, for the two tests above to say something."""
    assert sum(seen.values()) == TRAINER + OPTIMIZER, seen
    assert min(seen["trained"], seen["refused"]) >= TRAINER // 5 and min(seen["stepped"], seen["refused by MuonDist"]) >= OPTIMIZER // 10, (
        seen
    )


# --------------------------------------------------------------------------------------------------------------- on the ranks


def _serve(pipe: Any, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    sys.path.insert(0, str(ROOT / "launch"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    count = 0
    while True:
        kind, configuration = pipe.recv()
        count += 1
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
                try:
                    (_train if kind == "trainer" else _step)(configuration, count)
                    outcome = (True, "trained")
                except ValueError as error:
                    outcome = (len(str(error)) > 15, str(error))
                except SystemExit:
                    outcome = ("error: " in told.getvalue(), told.getvalue())
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))


def _train(configuration: dict[str, Any], count: int) -> None:
    import train_gpt
    from options import parse

    from muon_dist.run import Ranks, Watchdog

    words = [f"--{name.replace('_', '-')}={value}" for name, value in configuration.items()]
    options = parse([*words, "--steps=1", "--eval-batches=1", f"--out=out-{count}"])
    alone = Ranks(launcher="none", rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="", master_port=0, source="")
    here = Ranks(**{**alone.__dict__, "rank": dist.get_rank(), "world_size": RANKS, "local_rank": dist.get_rank()})
    with Watchdog(alone, timeout=60) as watchdog, train_gpt.Signals() as signals:
        train_gpt.Trainer(options, here, torch.device("cpu"), watchdog, signals, train_gpt.Log(options, here)).train()


def _step(arguments: dict[str, Any], count: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from muon_dist import MuonDist

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 3, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = MuonDist(model.named_parameters(), **arguments)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    for p in model.parameters():
        assert p.full_tensor().isfinite().all(), "an update is not finite"
    with tempfile.TemporaryFile() as file:
        torch.save(optimizer.state_dict(), file)
