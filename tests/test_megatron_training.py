"""Flags in Megatron's own parser, and unchanged scripts under its training code, as users start them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muon_dist.run.bootstrap import free_port

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="megatron.training comes with megatron-core 0.19 (Python 3.12)"
)

SMALL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16", "--max-position-embeddings", "16"),
    *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "3", "--lr", "1e-2", "--lr-decay-style", "constant"),
    *("--vocab-size", "64", "--transformer-impl", "local", "--mock-data", "--distributed-backend", "gloo", "--use-cpu-initialization"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"),
    *("--no-rope-fusion", "--no-persist-layer-norm", "--hidden-dropout", "0", "--attention-dropout", "0"),
    *("--position-embedding-type", "rope"),
]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=own, cwd=ROOT)


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {int(rank): json.loads(text) for rank, text in re.findall(r"rank (\d): (\{.*?\}+)(?=rank|$)", done.stdout, re.M)}
    return [found[rank] for rank in sorted(found)]


def launch(*flags: str) -> subprocess.CompletedProcess[str]:
    return run(["bash", "launch/pretrain_megatron.sh", "tests/megatron_pretrain.py", *SMALL, *flags], NPROC="2")


def test_an_unchanged_script_trains_with_flags_alone() -> None:
    """Megatron refuses the distributed optimizer and overlap for optimizers it doesn't know, so it is told of Adam."""
    flags = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--optimizer", "muon_dist"]
    ranks = told(launch(*flags, "--muon-num-ns-steps", "7", "--muon-momentum", "0.95"))
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["optimizer"] == "MuonDistOptimizer" and rank["wrappers"] == ["FlatBuffers"]
        assert rank["steps"] == [7] and rank["lr"] == 0.01 and len(rank["losses"]) == 3


def test_other_optimizers_stay_megatrons() -> None:
    for rank in told(launch("--use-distributed-optimizer")):
        assert rank["optimizer"] == "ChainedOptimizer" and rank["wrappers"] == ["DistributedOptimizer"]


@pytest.mark.parametrize("first", ["muon_dist.integrations.megatron", "megatron.training"])
def test_one_line_in_the_script_does_the_same_wherever_it_stands(first: str) -> None:
    lines = [f"import {first}", "import muon_dist.integrations.megatron", "import runpy, sys", "sys.argv = sys.argv[1:]"]
    code = "; ".join([*lines, "runpy.run_path(sys.argv[0], run_name='__main__')"])
    where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = [*SMALL, "--optimizer", "muon_dist", "--muon-coverage", "0.8"]
    (rank,) = told(run([sys.executable, "-c", code, "tests/megatron_pretrain.py", *flags], **where))
    assert rank["optimizer"] == "MuonDistOptimizer" and max(rank["steps"]) <= 6


def test_what_the_flags_contradict_is_said_before_training() -> None:
    for flags, message in (
        (["--muon-tp-mode", "duplicated"], "does not support muon_tp_mode"),
        (["--muon-num-ns-steps", "5", "--muon-coverage", "0.9"], "coverage only work with ns_steps='adaptive'"),
        (["--muon-adamw-params", "rooter"], "'rooter' matches no trainable parameter"),
        (["--muon-coverage", "2"], "coverage"),
    ):
        done = launch("--optimizer", "muon_dist", *flags)
        assert done.returncode != 0 and message in done.stderr and "ValueError" in done.stderr, flags


def test_the_launch_script_says_what_is_wrong() -> None:
    for arguments, environment, message in (
        ([], {}, "usage: bash launch/pretrain_megatron.sh SCRIPT"),
        (["nowhere.py"], {}, "there is no script nowhere.py"),
        (["tests/megatron_pretrain.py", "--args", "nowhere.args"], {}, "--args names a file of flags"),
        (["tests/megatron_pretrain.py"], {"NNODES": "2"}, "MASTER_ADDR is not set"),
    ):
        done = run(["bash", "launch/pretrain_megatron.sh", *arguments], **environment)
        assert done.returncode == 2 and message in done.stderr
    done = run([sys.executable, "-m", "muon_dist.integrations.megatron", "nowhere.py"])
    assert done.returncode == 2 and "there is no script 'nowhere.py'" in done.stderr


# --------------------------------------------------------------------------------------------------------------- parser

PARSE = """
import json, sys
from muon_dist.example.megatron_host import run_without_cuda
run_without_cuda()
import muon_dist.integrations.megatron as ours
from muon_dist.integrations.megatron.settings import arguments, completed
from megatron.training.arguments import parse_args, validate_args
from megatron.training.training import get_megatron_optimizer_config
args = parse_args()
validate_args(args)
config, _ = get_megatron_optimizer_config(args)
whole = completed(config, args)
told = {"asked": getattr(args, "muon_dist", False), "optimizer": args.optimizer, "flat": args.use_distributed_optimizer}
told |= {"lr": whole.lr, "steps": whole.muon_num_ns_steps, "coefficients": whole.muon_coefficient_type, "mode": whole.muon_tp_mode}
told |= {"theirs": [config.muon_num_ns_steps, config.muon_coefficient_type, config.muon_tp_mode]}
told |= {"given": {key: str(value) for key, value in arguments(whole).items()} if told["asked"] else {}}
print("rank 0: " + json.dumps(told))
"""


def parsed(*flags: str, ranks: int = 1) -> dict[str, Any]:
    return told(
        run([sys.executable, "-W", "ignore", "-c", PARSE, *flags], WORLD_SIZE=str(ranks), RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    )[0]


@pytest.mark.parametrize(("name", "ranks"), [("quickstart", 2), ("llama-8b", 16), ("llama-70b", 64)])
def test_the_examples_pass_megatrons_parser_and_checks(name: str, ranks: int) -> None:
    lines = [line for line in (ROOT / "configs" / "megatron" / f"{name}.args").read_text().splitlines() if not line.startswith("#")]
    # a CPU has neither Transformer Engine nor its fusions; data come from the user
    more = ["--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--mock-data"]
    more += [] if name == "quickstart" else ["--tokenizer-type", "NullTokenizer", "--vocab-size", "128256"]
    found = parsed(*" ".join(lines).split(), *more, ranks=ranks)
    assert found["asked"] and found["optimizer"] == "adam" and found["flat"]
    given = found["given"]
    assert [given[key] for key in ("ns_steps", "accuracy", "coverage", "nesterov")] == ["adaptive", "jordan4", "None", "True"]
    assert float(given["extra_scale_factor"]) == pytest.approx(1.0)  # 0.2 of √max, five times match_rms_adamw's


def test_not_given_is_told_apart_from_megatrons_defaults() -> None:
    found = parsed(*SMALL, "--optimizer", "muon_dist")
    assert (found["steps"], found["coefficients"], found["mode"]) == ("adaptive", None, None)
    assert found["theirs"] == [5, "quintic", "blockwise"]
    found = parsed(*SMALL, "--optimizer", "muon_dist", "--muon-num-ns-steps", "5", "--muon-coefficient-type", "quintic")
    assert (found["steps"], found["coefficients"]) == (5, "quintic")
    found = parsed(*SMALL, "--optimizer", "muon")
    assert not found["asked"] and found["optimizer"] == "muon" and found["theirs"] == [5, "quintic", "blockwise"]


def test_an_unknown_optimizer_or_flag_is_still_refused() -> None:
    for flags, message in ((["--optimizer", "muon_dst"], "muon_dist"), (["--muon-covrage", "0.9"], "unrecognized arguments")):
        done = run([sys.executable, "-W", "ignore", "-c", PARSE, *SMALL, *flags], WORLD_SIZE="1", RANK="0")
        assert done.returncode == 2 and message in done.stderr


# ---------------------------------------------------------------------------------------------------------------- bench


def test_the_bench_compares_all_modes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "muon_dist.cli.main", "bench", "megatron"]
    done = run([*command, "--hidden", "128", "--layers", "1", "--rounds", "1", "--warmup", "1", "--json", str(tmp_path / "all.json")])
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = json.loads((tmp_path / "all.json").read_text())["runs"]
    theirs = [f"Megatron's, {mode}" for mode in ("blockwise", "duplicated", "distributed")]
    assert list(record["seconds"]) == [*theirs, "MuonDist, 5 steps", "MuonDist, adaptive"]
    assert record["differs"]["Megatron's, blockwise"] > 0.1 and record["differs"]["MuonDist, 5 steps"] < 2e-4
    # every matrix once instead of on both ranks; as many bytes as gathering it there takes, and two numbers that are added up
    assert record["flops"]["MuonDist, 5 steps"] < 0.5 * record["flops"]["Megatron's, duplicated"]
    assert record["received"]["MuonDist, 5 steps"] <= record["received"]["Megatron's, duplicated"] + 8
    done = run([*command, "--hidden", "64"])
    assert done.returncode == 2 and "--hidden is one of 64 × --tp" in done.stderr
