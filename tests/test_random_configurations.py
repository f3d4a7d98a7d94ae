"""Random configurations, right and wrong ones: each trains a step on two ranks or raises a clear error on both; none hangs.

The same ones at every run, so that a failure is nobody's bad luck; `--hypothesis-seed N` draws others, `--all` a thousand.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .jobs import ROOT
from .ranks import run_ranks

RANKS = 2
AT_ONCE = 25  # configurations that ranks try one after the other before others take their places
PATIENCE = 120.0  # seconds for so many, until one is taken to hang

Outcome = tuple[bool, str]  # whether it is clear what became of it, and "trained" or the error


def drawn(strategy: Any, count: int) -> list[Any]:
    """`count` examples."""
    found: list[Any] = []
    same = not any(word.startswith("--hypothesis-seed") for word in sys.argv)

    @settings(
        max_examples=count,
        derandomize=same,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(example=strategy)
    def draw(example: Any) -> None:
        found.append(example)

    draw()
    return found


def try_all(kind: str, configurations: list[Any], folder: Path) -> Counter[str]:
    """How many were "trained" and "refused"; fails where ranks disagree about one, or where one is neither."""
    counts: Counter[str] = Counter()
    for first in range(0, len(configurations), AT_ONCE):
        some = configurations[first : first + AT_ONCE]
        try:
            ranks = run_ranks(RANKS, try_some, kind, some, str(folder), first, timeout=PATIENCE)
        except RuntimeError as error:
            at = [path.read_text() for path in sorted(folder.glob("trying-*"))]
            pytest.fail(f"{error}\n\nat the time ranks tried:\n" + "\n".join(at))
        for configuration, outcomes in zip(some, zip(*ranks, strict=True), strict=True):
            for clear, words in outcomes:
                assert clear, f"{configuration} is neither trained nor refused clearly:\n{words}"
            assert len({words == "trained" for _, words in outcomes}) == 1, f"{configuration}: ranks disagree: {outcomes}"
            counts["trained" if outcomes[0][1] == "trained" else "refused"] += 1
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data of several kinds."""
    (tmp_path / "text").write_bytes(b"to be or not to be, that is the question. " * 40)
    (tmp_path / "short").write_bytes(b"to be")
    np.save(tmp_path / "tokens.npy", np.arange(900, dtype=np.uint16) % 256)
    np.save(tmp_path / "large.npy", np.arange(900, dtype=np.int32) + 5000)
    (tmp_path / "tokens.bin").write_bytes((np.arange(900, dtype=np.uint32) % 256).tobytes())
    return tmp_path


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


def flags_of(configuration: dict[str, Any]) -> list[str]:
    """A flag that the engine or the optimizer has no use for is refused, so most of those are left out."""
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
    return [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]


@pytest.mark.parametrize("count", [50, pytest.param(600, marks=pytest.mark.more("random"))])
def test_every_configuration_of_the_trainer_trains_or_is_refused(count: int, folder: Path) -> None:
    counts = try_all("trainer", [flags_of(each) for each in drawn(st.fixed_dictionaries(FLAGS), count)], folder)
    assert sum(counts.values()) == count and min(counts["trained"], counts["refused"]) >= count // 5, counts  # enough of either


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


def arguments_of(configuration: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in configuration.items() if value is not None}
    if len(arguments) % 2 and arguments.get("ns_steps", "adaptive") != "adaptive":
        arguments = {name: value for name, value in arguments.items() if name not in ADAPTIVE_ONLY}
    return arguments


@pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.more("random"))])
def test_every_configuration_of_the_optimizer_steps_or_is_refused(count: int, folder: Path) -> None:
    counts = try_all("optimizer", [arguments_of(each) for each in drawn(st.fixed_dictionaries(ARGUMENTS), count)], folder)
    assert sum(counts.values()) == count and min(counts["trained"], counts["refused"]) >= count // 10, counts


# --------------------------------------------------------------------------------------------------------------- on the ranks


def try_some(kind: str, configurations: list[Any], folder: str, first: int) -> list[Outcome]:
    os.chdir(folder)
    sys.path.insert(0, str(ROOT / "launch"))
    result: list[Outcome] = []
    for count, configuration in enumerate(configurations, first):
        Path(f"trying-{dist.get_rank()}").write_text(f"{configuration}\n")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                (_train if kind == "trainer" else _step)(configuration, count)
                result.append((True, "trained"))
            except ValueError as error:
                result.append((len(str(error)) > 15, str(error)))
            except SystemExit:
                result.append(("error: " in told.getvalue(), told.getvalue()))
            except BaseException:
                result.append((False, traceback.format_exc()))
    return result


def _train(flags: list[str], count: int) -> None:
    import train_gpt
    from options import parse

    from muon_dist.run import Ranks, Watchdog

    options = parse([*flags, "--steps=1", "--eval-batches=1", f"--out=out-{count}"])
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
