"""`bash tests/gpu.sh` on a CPU, with the smallest sizes: every part runs, and what is wrong or does not fit is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .__main__ import Part, _run, parts
from .report import WRITERS, markdown

ROOT = Path(__file__).parent.parent.parent


def gpu_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "tests" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)


def test_every_part_runs_on_a_cpu_and_tells_its_figures(tmp_path: Path) -> None:
    done = gpu_sh("--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    by_name = {part["name"]: part for part in record["parts"]}
    assert list(by_name) == ["right", "ns", "step", "overhead", "training", "probes"]
    assert {part["state"] for part in record["parts"]} == {"done"}
    assert by_name["right"]["tests"]["passed"] >= 6 and "failed" not in by_name["right"]["tests"]
    assert {each["batch"] for each in by_name["ns"]["figures"]["shapes"]} == {1, 2}
    assert "its iteration, batched and compiled" in by_name["ns"]["figures"]["shapes"][0]["seconds"]
    [run] = by_name["step"]["figures"]["runs"]
    assert run["parts"]["Newton–Schulz"] > 0 and len(run["host_seconds"]) == 1 and "AdamW (fused)" in run["seconds"]
    curves = {run["variant"]: run["curve"] for run in by_name["training"]["figures"]["runs"]}
    assert len(curves) == 3 and all([step for step, *_ in curve] == [1, 2, 3, 4] for curve in curves.values())
    assert {p["size"] for p in by_name["probes"]["figures"]["probes"]} == {32, 64}
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in page for name in by_name) and page.count("| --- |") >= len(WRITERS)
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_the_parts_for_a_gpu_are_commands_that_exist(tmp_path: Path) -> None:
    """Only their arguments are read here: the sizes are a GPU's."""
    from muon_dist.cli.main import parser

    made = parts("cuda", False, tmp_path)
    assert [part.name for part in made] == ["right", "ns", "step", "overhead", "training", "probes", "hosts"]
    for part in made:
        if part.figures:
            arguments = parser().parse_args(part.command[3:])
            assert arguments.device == "cuda" and arguments.json == str(tmp_path / f"{part.name}.json") and part.name in WRITERS
        else:
            assert (ROOT / next(word for word in part.command if word.endswith(".py"))).exists()
    assert sum(part.seconds for part in made[:2]) <= 300, "what tells most has room before the rest"


@pytest.mark.parametrize(
    ("code", "seconds", "left", "state"),
    [
        ("print('1 passed in 1s')", 30, 60, "done"),
        ("raise SystemExit(3)", 30, 60, "wrong"),
        ("print('no tests ran')", 30, 60, "wrong"),
        ("import time; time.sleep(60)", 0.5, 60, "cut off"),
        ("", 30, 1, "did not fit"),
    ],
)
def test_what_became_of_a_part(code: str, seconds: float, left: float, state: str, tmp_path: Path) -> None:
    part = Part(name="right", question="", command=[sys.executable, "-c", code], seconds=seconds, figures=False)
    entry = _run(part, time.monotonic() + left, tmp_path)
    assert entry["state"] == state
    versions = dict.fromkeys(("torch", "cuda", "triton", "python", "matplotlib"), "1")
    page = markdown({**versions, "device": "a card", "quick": False, "parts": [entry]})
    assert f"| right | {state} |" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "tpu"), "invalid choice"),
        (("--device", "cpu", "--minutes", "0"), "--minutes must be above 0"),
        (("--speed",), "unrecognized"),
    ],
)
def test_wrong_arguments_end_with_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    done = gpu_sh(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
