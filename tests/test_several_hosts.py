"""launch/torchrun.sh on two hosts: network namespaces with addresses of their own, joined by a bridge, and the wire pulled out of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .jobs import ROOT, SMALL, losses, wait_for

pytestmark = pytest.mark.more("slow system")

NAME = f"md{os.getpid() % 10_000}"
HOSTS = [f"{NAME}-{k}" for k in (0, 1)]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    try:
        ip("netns", "add", HOSTS[0])
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    try:
        ip("netns", "add", HOSTS[1])
        ip("link", "add", f"{NAME}a", "netns", HOSTS[0], "type", "veth", "peer", "name", f"{NAME}b", "netns", HOSTS[1])
        for k, (host, end) in enumerate(zip(HOSTS, "ab", strict=True)):
            ip("-n", host, "addr", "add", f"10.77.0.{k + 1}/24", "dev", f"{NAME}{end}")
            ip("-n", host, "link", "set", f"{NAME}{end}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def start(host: int, out: Path, *flags: str, **more: str) -> tuple[subprocess.Popen[str], Path]:
    variables = {
        **{name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"},
        "NNODES": "2",
        "NPROC": "2",
        "MASTER_ADDR": "10.77.0.1",
        "NODE_RANK": str(host),
        "LOCAL_ADDR": f"10.77.0.{host + 1}",
        "GLOO_SOCKET_IFNAME": f"{NAME}{'ab'[host]}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **more,
    }
    log = out.parent / f"host-{host}-{time.monotonic_ns()}.txt"
    command = ["ip", "netns", "exec", HOSTS[host], "bash", str(ROOT / "launch" / "torchrun.sh"), *SMALL, *flags, "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True), log


def test_two_hosts_train_together(hosts: list[str], tmp_path: Path) -> None:
    jobs = [start(k, tmp_path / "out", "--steps", "6") for k in (0, 1)]
    try:
        for job, log in jobs:
            assert job.wait(120) == 0, log.read_text()
    finally:
        for job, _ in jobs:
            job.kill()
    assert "4 ranks on cpu" in "".join(log.read_text() for _, log in jobs)
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]


def test_a_job_goes_on_with_the_host_that_is_left(hosts: list[str], tmp_path: Path) -> None:
    jobs = [start(k, tmp_path / "out", "--steps", "80", "--save-every", "20", "--rank-timeout", "30", NNODES="1:2") for k in (0, 1)]
    try:
        wait_for(lambda: (tmp_path / "out" / "log.jsonl").exists() and max(losses(tmp_path / "out"), default=0) > 25, 120)
        for pid in subprocess.run(["ip", "netns", "pids", hosts[1]], capture_output=True, text=True, check=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        assert jobs[0][0].wait(150) == 0, jobs[0][1].read_text()
    finally:
        for job, _ in jobs:
            job.kill()
    text = jobs[0][1].read_text()
    assert "4 ranks on cpu" in text and "2 ranks on cpu" in text and "saved by 4 ranks" in text
    assert sorted(losses(tmp_path / "out")) == list(range(1, 81))


def test_a_host_that_is_cut_off_is_named_on_the_other(hosts: list[str], tmp_path: Path) -> None:
    """No connection is closed, nothing answers any more: only silence tells."""
    flags = ("--steps", "100000", "--save-every", "20", "--rank-timeout", "8")
    jobs = [start(k, tmp_path / "out", *flags, MAX_RESTARTS="0") for k in (0, 1)]
    try:
        wait_for(lambda: (tmp_path / "out" / "log.jsonl").exists() and max(losses(tmp_path / "out"), default=0) > 30, 120)
        ip("-n", hosts[1], "link", "set", f"{NAME}b", "down")
        began = time.monotonic()
        wait_for(lambda: all(" ends: " in log.read_text() for _, log in jobs), 40)
        assert time.monotonic() - began < 8 + 12
        one, other = (log.read_text() for _, log in jobs)
        with_rank_0, alone = (one, other) if "rank 0 ends" in one else (other, one)
        assert "not a word from it for" in with_rank_0 and "rank 0 was lost: it has been silent for 8 s" in alone
    finally:
        for job, _ in jobs:
            job.terminate()
        for job, _ in jobs:
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                job.kill()
        ip("-n", hosts[1], "link", "set", f"{NAME}b", "up")
