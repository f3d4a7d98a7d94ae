"""`bash tests/gpu.sh`: everything that a GPU can tell about MuonDist, in parts that have a time box each, the most telling first.

Every part is a command of its own: tests, or a bench. After each of them gpu.json and gpu.md are written, so that a run that is cut off
still tells what it has seen. What doesn't fit into the time is said there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .report import markdown

ROOT = Path(__file__).parent.parent.parent
LLAMA = ["4096x4096", "1024x4096", "14336x4096", "4096x14336"]  # the matrices of Llama 8B
VARIANTS = ["five Jordan steps", "adaptive steps", "AdamW"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command and how long it may take.

    Attributes:
        name: of its entry in gpu.json.
        question: what it answers, for gpu.md.
        seconds: its time box.
        figures: it writes NAME.json, as benches do; tests don't.
    """

    name: str
    question: str
    command: list[str]
    seconds: float
    figures: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def parts(device: str, quick: bool, out: Path) -> list[Part]:
    """In the order in which they run. `quick`: the smallest sizes, to see that every part works."""

    def bench(name: str, question: str, seconds: float, *words: str | int) -> Part:
        json_path = str(out / f"{name}.json")
        command = [sys.executable, "-m", "muon_dist.cli.main", "bench", *map(str, words), "--device", device, "--json", json_path]
        environment = {"TORCHDYNAMO_DISABLE": "1"} if quick else {}  # compiling takes minutes
        return Part(name=name, question=question, command=command, seconds=seconds, environment=environment)

    chosen = ["-k", "(fp64 or bf16 or finite or waits) and not deep"] if quick else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    right = [
        Part(
            name="right",
            question="Is every update right, and does the host never wait?",
            command=[*pytest, "tests/gpu/test_right.py", *chosen],
            seconds=150,
            figures=False,
            environment={"MUON_DIST_TEST_DEVICE": device},
        )
    ]
    hosts = [
        Part(
            name="hosts",
            question="Is it right in DeepSpeed and in Megatron?",
            command=[*pytest, "tests/gpu/test_hosts.py"],
            seconds=60,
            figures=False,
            environment={"DS_ACCELERATOR": device},
        )
    ]
    if quick:
        most = 200  # a machine that runs other tests beside these may be many times slower
        small = (
            "training",
            "--steps",
            4,
            "--seeds",
            0,
            "--lr",
            0.01,
            "--adam-lr",
            0.01,
            "--width",
            16,
            "--layers",
            1,
            "--batch",
            2,
            "--context",
            16,
        )
        return [
            *right,
            bench("ns", "", most, "ns", "--shapes", "48x48", "40x160", "--batch", 1, 2, "--rounds", 1, "--compiled"),
            bench("step", "", most, "step", "--model", "configs/models/gpt-5m.json", "--layers", 1, "--pairs", 1, "--ranks", 1),
            bench("overhead", "", most, "overhead", "--width", 16, "--layers", 1, "--cycles", 1),
            bench("training", "", most, *small, "--dtype", "bf16", "--variants", *VARIANTS, *_picture(out)),
            bench("probes", "", most, "probes", "--sizes", 32, 64, "--directions", 4, "--batch", 2, "--rounds", 1),
        ]
    kernels = ["--symmetric-kernels"] if device == "cuda" else []
    model = ("--model", "configs/models/llama-8b.json", "--layers", 4)
    gpt = ("--width", 768, "--layers", 12, "--batch", 16, "--context", 1024, "--lr", 2e-3, "--adam-lr", 6e-4)
    return [
        *right,
        bench("ns", "How fast is Newton–Schulz?", 120, "ns", "--shapes", *LLAMA, "--batch", 1, 4, "--rounds", 5, "--compiled", *kernels),
        bench("step", "How fast is the optimizer's step?", 60, "step", *model, "--dtype", "bf16", "--ranks", 1, "--pairs", 5),
        bench("overhead", "What does adapting cost?", 45, "overhead", "--width", 4096, "--layers", 2, "--cycles", 1),
        bench(
            "training",
            "Does adapting pay? Each trains for 35 s",
            150,
            *("training", *gpt, "--seconds", 35, "--seeds", 0, "--dtype", "bf16", "--variants", *VARIANTS, *_picture(out)),
        ),
        bench("probes", "What would other ways stand on?", 60, "probes", "--rounds", 5),
        *hosts,
    ]


def _picture(out: Path) -> list[str]:
    return ["--picture", str(out / "training.png")] if find_spec("matplotlib") else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description="What a GPU does with MuonDist.")
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help="for gpu.json, gpu.md and pictures (default runs/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: does every part work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default 8)")
    arguments = parser.parse_args()
    missing = [name for name in ("torch", "numpy", "pytest") if find_spec(name) is None]
    if missing:
        parser.error(f"{sys.executable} has no {', '.join(missing)}: name another Python with PYTHON=/path/to/python")
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} of {sys.executable} finds no CUDA device; --device cpu runs the same without one")
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    import numpy

    record: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "triton": _version("triton"),
        "matplotlib": _version("matplotlib"),
        "quick": arguments.quick,
        "parts": [],
    }
    deadline = time.monotonic() + 60 * arguments.minutes
    for part in parts(arguments.device, arguments.quick, out):
        print(f"== {part.name}: {part.question or 'quick'}", flush=True)
        record["parts"].append(_run(part, deadline, out))
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "gpu.md").write_text(markdown(record))
    wrong = [each["name"] for each in record["parts"] if each["state"] == "wrong"]
    unseen = [f"{each['name']} ({each['state']})" for each in record["parts"] if each["state"] in ("cut off", "did not fit")]
    print(f"\n{out / 'gpu.md'}, {out / 'gpu.json'}")
    print(f"wrong: {', '.join(wrong) or 'nothing'}; not seen to the end: {', '.join(unseen) or 'nothing'}")
    return 1 if wrong or any(each["name"] == "right" and each["state"] != "done" for each in record["parts"]) else 0


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _run(part: Part, deadline: float, out: Path) -> dict[str, Any]:
    """What became of a part: its state is "done", "wrong", "cut off" or "did not fit"; all that it printed, and its figures."""
    entry: dict[str, Any] = {"name": part.name, "question": part.question, "state": "did not fit", "seconds": 0.0, "printed": ""}
    left = deadline - time.monotonic()
    if left < 5:
        return entry
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **part.environment}
    started, log = time.monotonic(), out / f"{part.name}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(min(part.seconds, left))
            entry["state"] = "wrong" if status else "done"
        except subprocess.TimeoutExpired:
            entry["state"] = "cut off"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    entry["seconds"], entry["printed"] = round(time.monotonic() - started, 1), log.read_text()
    figures = out / f"{part.name}.json"
    if part.figures and entry["state"] == "done":
        entry["figures"] = json.loads(figures.read_text())
    if not part.figures:
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", entry["printed"].strip().splitlines()[-1] if entry["printed"] else "")
        entry["tests"] = {kind: int(count) for count, kind in counts}
        entry["told"] = re.findall(r"^(?:SKIPPED|FAILED|ERROR).*", entry["printed"], re.M)
        if entry["state"] == "done" and part.name == "right" and not entry["tests"].get("passed"):
            entry["state"] = "wrong"  # a run of no tests shows nothing
    print(entry["printed"], end="", flush=True)
    print(f"-- {part.name}: {entry['state']} after {entry['seconds']:.0f} s\n", flush=True)
    return entry


if __name__ == "__main__":
    sys.exit(main())
