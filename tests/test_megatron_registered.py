"""How muon_dist gets known in Megatron, whichever way a script is started, and what it tells of itself there."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from muon_dist.integrations.megatron import MuonDistConfig, add_muon_dist_args, get_muon_dist_optimizer
from muon_dist.integrations.megatron.arguments import was_asked_for

from . import megatron_hosts as hosts
from .megatron_hosts import Setup
from .ranks import run_ranks

MORE = pytest.mark.more("product")
ADAPTIVE = {"muon_num_ns_steps": "adaptive", "muon_coefficient_type": None}


def test_flags_are_those_of_either_version_and_pickle_as_plain_values() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    parser.add_argument("--muon-use-nesterov", action="store_true", help="Nesterov")
    parser.add_argument("--muon-fp32-matmul-prec", default="medium", choices=["low", "medium", "high"])
    known = add_muon_dist_args(parser)
    args = known.parse_args(["--optimizer", "muon_dist", "--muon-nesterov", "--muon-fp32-matmul-prec", "highest"])
    assert type(args.optimizer) is str and args.optimizer == "adam" and args.muon_dist and was_asked_for()
    assert args.muon_use_nesterov and args.muon_fp32_matmul_prec == "highest"  # 0.16's name of the one, and config's value of the other
    assert not known.parse_args(["--optimizer", "sgd"]).muon_dist and not was_asked_for()
    torch.save({"args": args}, buffer := io.BytesIO())  # as a checkpoint keeps it: loaded where nothing of ours is known
    buffer.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(buffer, weights_only=True)["args"].optimizer == "adam"


def asked_of_megatron(how: str) -> str:
    """What a trainer gets whose factory was imported by another name before MuonDist was registered."""
    from megatron.core.optimizer import OptimizerConfig
    from muon_dist.integrations.megatron import arguments
    from muon_dist.integrations.megatron.optimizer import megatrons  # Megatron's own, as such an import holds it

    setup = Setup()
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    config = hosts.optimizer_config(setup, OptimizerConfig)
    arguments._asked = how == "flag"
    config.optimizer = "muon_dist" if how == "config" else "adam"
    try:
        return type(megatrons(config, chunks).chained_optimizers[0].optimizer).__name__
    except ValueError as error:
        return str(error)


def test_megatrons_own_factory_does_not_make_an_adam_where_muon_dist_was_asked_for() -> None:
    assert run_ranks(1, asked_of_megatron, "adam") == ["AdamW"]
    ours = "--optimizer muon_dist was asked for, but Megatron's own get_megatron_optimizer was called"
    assert run_ranks(1, asked_of_megatron, "flag")[0].startswith(ours)
    assert run_ranks(1, asked_of_megatron, "config")[0].startswith(
        (ours, "Unsupported emerging optimizer: muon_dist")
    )  # 0.19 says so itself


def test_names_that_a_script_has_imported_already_are_taken_over() -> None:
    code = (
        "from megatron.core.optimizer import get_megatron_optimizer\n"
        "import muon_dist.integrations.megatron, megatron.core.optimizer as core\n"
        "assert get_megatron_optimizer is core.get_megatron_optimizer\n"
        "from muon_dist.integrations.megatron.optimizer import megatrons\n"
        "assert get_megatron_optimizer is not megatrons"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("how", ["module", pytest.param("launcher", marks=pytest.mark.more("repeat"))])
def test_the_scripts_own_megatron_wins(how: str, tmp_path: Path) -> None:
    """A fork beside its script, started from somewhere else; an installed megatron-core must not come before it."""
    import megatron.core

    fork, elsewhere, root = tmp_path / "fork", tmp_path / "elsewhere", Path(__file__).parent.parent
    (fork / "megatron").mkdir(parents=True)
    elsewhere.mkdir()
    (fork / "megatron" / "core").symlink_to(Path(megatron.core.__file__).parent)
    (fork / "pretrain.py").write_text("import megatron.core, sys; print('script', megatron.core.__file__, sys.argv[1:])")
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "1", "PYTHONPATH": str(root)}
    if how == "module":
        command = [sys.executable, "-W", "ignore", "-m", "muon_dist.integrations.megatron", str(fork / "pretrain.py"), "--flag"]
    else:
        command = ["bash", str(root / "launch" / "pretrain_megatron.sh"), str(fork / "pretrain.py"), "--flag"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"script {fork}/megatron/core/__init__.py ['--flag']" in done.stdout
    assert f"in Megatron core {megatron.core.__version__}, {fork}/megatron/core" in done.stdout


def told_of(setup: Setup, given: dict[str, Any], mark: str) -> tuple[str, list[str]]:
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    for name, p in chunks[0].named_parameters():
        if mark and mark in name:
            p.use_muon = False
    optimizer = get_muon_dist_optimizer(hosts.optimizer_config(setup, MuonDistConfig, **given), chunks)
    return optimizer.summary(), [r.name for r in optimizer.routes if r.algorithm == "muon"]


def test_a_block_says_what_really_trains_and_use_muon_is_honoured() -> None:
    ((text, muon),) = run_ranks(
        1, told_of, Setup(), {"muon_coverage": 0.8, "muon_num_ns_steps": "adaptive", "muon_coefficient_type": None}, "linear_fc1"
    )
    assert not any("linear_fc1" in name for name in muon) and len(muon) == 6
    assert "     6 Muon   weight matrix" in text and "     2 AdamW  use_muon is False, as Megatron marks it" in text
    assert "Newton–Schulz steps: adaptive (coverage 0.8); the whole matrix's update at any tensor-parallel size; placement owner" in text
    ((text, _),) = run_ranks(1, told_of, Setup(), {"muon_num_ns_steps": 7, "muon_params": "output_layer"}, "")  # a string is one pattern
    assert "Newton–Schulz steps: 7, quintic" in text and "     1 Muon   asked for by 'output_layer'" in text


def in_flags(given: dict[str, Any]) -> str:
    setup = Setup()
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    try:
        optimizer = get_muon_dist_optimizer(hosts.optimizer_config(setup, MuonDistConfig, **given), chunks)
        hosts.train_step(setup, chunks, optimizer, 0)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({**ADAPTIVE, "muon_coverage": 2.0}, "--muon-coverage must be a number in (0, 1]"),
        pytest.param({**ADAPTIVE, "muon_burn_in": 1.5}, "--muon-burn-in must be an integer", marks=MORE),
        pytest.param({"muon_momentum": 1.5}, "--muon-momentum must be a number in [0, 1)", marks=MORE),
        ({"muon_bucket_mb": -1}, "--muon-bucket-mb must be a positive number"),
        pytest.param({"muon_placement": "shard"}, "--muon-placement='shard': choose one of", marks=MORE),
        pytest.param({"muon_deflation": -1}, "deflation", marks=MORE),
    ],
)
def test_errors_name_the_flag(given: dict[str, Any], words: str) -> None:
    assert words in run_ranks(1, in_flags, given)[0]
