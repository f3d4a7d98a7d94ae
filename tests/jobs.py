"""Jobs of launch/train_gpt.py whose ranks are forked from a server that has imported torch: started, killed and waited for as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from muon_dist.run.bootstrap import free_port
from muon_dist.run.checkpoints import read_checkpoint
from muon_dist.run.lines import read_lines

from .ranks import _context

ROOT = Path(__file__).parent.parent
SIZE = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16"]
LOGS = ["--log-every", "1", "--eval-every", "0", "--rank-timeout", "30"]
SMALL = [*SIZE, *LOGS, "--batch", "12", "--burn-in", "2", "--measure-every", "3"]


class Job:
    """`n` ranks of the trainer, or of `function(*arguments)`, as torchrun would start them, with their output in files."""

    def __init__(
        self,
        n: int,
        arguments: Sequence[Any],
        folder: Path,
        environment: dict[str, str] | None = None,
        function: Callable[..., None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(n)]
        port = free_port()
        self.processes = []
        for rank, output in enumerate(self.outputs):
            variables = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
            given = {**{k: str(v) for k, v in variables.items()}, "MASTER_ADDR": "127.0.0.1", **(environment or {})}
            process = _context.Process(target=_main, args=(given, function or _trainer, list(arguments), str(output)))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int]:
        """The ranks' exit statuses; those that don't end in time are killed and the test fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join(10)
        assert not late, f"ranks {late} did not end within {timeout} s:\n{self.text()}"
        return [int(process.exitcode or 0) for process in self.processes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def text(self) -> str:
        return "\n".join(f"--- rank {k}\n{path.read_text()}" for k, path in enumerate(self.outputs) if path.exists())


def train(n: int, arguments: Sequence[str], out: Path, *, environment: dict[str, str] | None = None, timeout: float = 120) -> Job:
    """A job that must end well."""
    job = Job(n, [*arguments, "--out", str(out)], out.parent / f"{out.name}-output", environment)
    assert job.wait(timeout) == [0] * n, job.text()
    return job


def wait_for(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def losses(out: Path) -> dict[int, float]:
    """What was logged at every step; of a step that was done again, what it was the last time."""
    return {r["step"]: r["loss"] for r in read_lines(out / "log.jsonl") if r["type"] == "step"}


def whole_state(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of --engine torch, by name."""
    read_checkpoint(checkpoint)
    path = scratch / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, path)
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{name}.{key}")

    walk(torch.load(path, weights_only=False), "")
    return found


def _main(environment: dict[str, str], function: Callable[..., None], arguments: list[Any], output: str) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*arguments)


def _trainer(*arguments: str) -> None:
    sys.path.insert(0, str(ROOT / "launch"))
    other_width = os.environ.get(f"MUON_DIST_TEST_WIDTH_OF_RANK_{os.environ['RANK']}")
    sys.argv = ["train_gpt.py", *arguments, *(["--width", other_width] if other_width else [])]
    import train_gpt

    train_gpt.main()
