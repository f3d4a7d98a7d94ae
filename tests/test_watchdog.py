"""Every rank ends, in the set time, with a message that names the rank at fault: killed, failed, stopped, standing still, rank 0."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muon_dist.run import Watchdog, find_ranks, start_process_group

from .jobs import Job, wait_for

TIMEOUT = 4.0


def ranks_at_work(folder: str, fault: str, timeout: float, steps: int = 10_000) -> None:
    """Steps with an all-reduce in each; rank 2 has the fault at step 20."""
    ranks = find_ranks()
    start_process_group(ranks, timeout=600)
    with Watchdog(ranks, timeout=timeout) as watchdog:
        for step in range(steps):
            watchdog.mark("compute", step)
            if step == 20:
                (Path(folder) / f"reached-{ranks.rank}").touch()
                if ranks.rank == 2:
                    if fault == "raises":
                        raise ValueError("the data of step 20 is broken")
                    if fault == "exits":
                        raise SystemExit(3)
                    if fault == "sleeps":
                        time.sleep(1000)
                if fault == "all raise":
                    raise ValueError(f"rank {ranks.rank} found it")
                if fault == "deadlock":  # everybody listens, nobody speaks
                    dist.recv(torch.ones(1), (ranks.rank + 1) % ranks.world_size)
            watchdog.mark("exchange", step)
            dist.all_reduce(torch.ones(1))
            time.sleep(0.002)
    dist.destroy_process_group()
    print("ended well")


def start(tmp_path: Path, fault: str, n: int = 4, timeout: float = TIMEOUT, steps: int = 10_000) -> Job:
    return Job(n, [str(tmp_path), fault, timeout, steps], tmp_path, function=ranks_at_work)


def reached(tmp_path: Path, n: int = 4) -> None:
    wait_for(lambda: len(list(tmp_path.glob("reached-*"))) == n)


def speakers(job: Job) -> list[str]:
    return re.findall(r"rank \d+ ends: .*", job.text())


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_rank_is_named_at_once(victim: int, tmp_path: Path) -> None:
    job = start(tmp_path, "none")
    reached(tmp_path)
    began = time.monotonic()
    job.kill(victim)
    statuses = job.wait(30)
    assert time.monotonic() - began < 5
    assert statuses[victim] == -signal.SIGKILL and statuses.count(1) == 3
    [line] = speakers(job)  # one of each host
    assert f"rank {victim}" in line and "was lost: its connection closed" in line, job.text()


def test_several_ranks_that_die_together_are_all_named(tmp_path: Path) -> None:
    job = start(tmp_path, "none")
    reached(tmp_path)
    job.kill(1), job.kill(3)
    job.wait(30)
    [line] = speakers(job)
    assert "rank 1 (process" in line and "rank 3 (process" in line


@pytest.mark.parametrize(
    ("fault", "words"), [("raises", "failed: ValueError: the data of step 20 is broken"), ("exits", "failed: SystemExit: 3")]
)
def test_a_rank_that_fails_is_named_with_its_error(fault: str, words: str, tmp_path: Path) -> None:
    job = start(tmp_path, fault)
    assert job.wait(30) == [1, 1, 1, 1]
    [line] = speakers(job)
    assert re.search(rf"rank 2 \(process \d+ on \S+\) at step 20 \(compute\) {words}", line), job.text()
    assert ("the data of step 20 is broken" in job.outputs[2].read_text()) == (fault == "raises")


def test_a_fault_that_all_ranks_find_is_told_once(tmp_path: Path) -> None:
    job = start(tmp_path, "all raise")
    assert job.wait(30) == [1, 1, 1, 1]
    [line] = speakers(job)
    assert re.search(r"failed: ValueError: rank \d found it$", line)


def test_a_rank_that_stands_still_is_named_in_the_set_time(tmp_path: Path) -> None:
    job = start(tmp_path, "sleeps")
    reached(tmp_path)
    began = time.monotonic()
    assert job.wait(30) == [1, 1, 1, 1]
    assert TIMEOUT - 1 < time.monotonic() - began < TIMEOUT + 5
    [line] = speakers(job)
    assert re.search(r"rank 2 \(process \d+ on \S+\) at step 20 \(compute\) stands still", line), job.text()
    assert "time.sleep(1000)" in job.outputs[2].read_text()  # where it stood


def test_a_deadlock_in_which_nobody_is_behind_is_told_as_one(tmp_path: Path) -> None:
    job = start(tmp_path, "deadlock", n=3)
    assert job.wait(40) == [1, 1, 1]
    [line] = speakers(job)
    assert f"no rank has made progress for {TIMEOUT:g} s, and none is behind: all are at step 20 (compute)" in line
    assert all("dist.recv(torch.ones(1)" in output.read_text() for output in job.outputs)  # where each of them is


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_in_the_set_time(victim: int, tmp_path: Path) -> None:
    job = start(tmp_path, "none")
    reached(tmp_path)
    began = time.monotonic()
    job.kill(victim, signal.SIGSTOP)
    others = [process for rank, process in enumerate(job.processes) if rank != victim]
    wait_for(lambda: not any(process.is_alive() for process in others), 30)
    assert TIMEOUT - 2 < time.monotonic() - began < TIMEOUT + 5
    job.kill(victim)
    job.wait(10)
    [line] = speakers(job)
    assert f"rank {victim}" in line and ("not a word from it" in line or "it has been silent" in line), job.text()


def test_ranks_that_end_well_end_quietly_whatever_the_order(tmp_path: Path) -> None:
    job = start(tmp_path, "none", steps=30)
    assert job.wait(30) == [0, 0, 0, 0]
    assert job.text().count("ended well") == 4 and not speakers(job)


def test_strangers_at_the_port_change_nothing(tmp_path: Path) -> None:
    job = start(tmp_path, "none", n=2)
    reached(tmp_path, 2)
    pids = [process.pid for process in job.processes]
    listening = subprocess.run(["ss", "-tlnpH"], capture_output=True, text=True, check=False).stdout
    ports = {int(m[1]) for line in listening.splitlines() if f"pid={pids[0]}," in line and (m := re.search(r"\*:(\d+)", line))}
    assert ports, "no port of rank 0 was found"
    for port in ports:
        for words in (b"[" * 100_000 + b"\n", b'{"token": "x"}\n', b'{"token": 7}\n', b"\xff\n", b"x" * 3_000_000, b"GET / HTTP/1.1\r\n"):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as stranger:
                stranger.sendall(words)
    time.sleep(TIMEOUT + 1)
    assert all(process.is_alive() for process in job.processes), job.text()
    job.kill(1)
    job.wait(10)
    assert "rank 1" in speakers(job)[0]


def test_one_process_needs_no_watching(tmp_path: Path) -> None:
    job = start(tmp_path, "none", n=1, steps=30)
    assert job.wait(30) == [0]
    with pytest.raises(ValueError, match="positive number of seconds"):
        Watchdog(find_ranks({}), timeout=0)
    assert os.environ.get("RANK") is None
