"""launch/slurm.sbatch on a real Slurm with two virtual nodes: trains, restarts, goes back into the queue, ends on scancel."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from muon_dist.run.checkpoints import latest_checkpoint

from .jobs import ROOT, SMALL, losses
from .slurm import Cluster

FLAGS = [*SMALL, "--save-every", "5"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=2)
    yield made
    made.stop()


class Submitted:
    def __init__(self, cluster: Cluster, folder: Path, *flags: str, options: tuple[str, ...] = (), **variables: str) -> None:
        self.cluster, self.out, self.log = cluster, folder / "out", folder / "job.log"
        shape = ("--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={self.log}", f"--chdir={ROOT}")
        given = {"MASTER_ADDR": "127.0.0.1", "OUT": str(self.out), "PYTHON": sys.executable, "RESTART_DELAY": "1", **variables}
        printed = cluster.run(
            "sbatch", *shape, *options, str(ROOT / "launch" / "slurm.sbatch"), *FLAGS, *flags, MUON_DIST_ROOT=str(ROOT), **given
        )
        self.number = re.search(r"job (\d+)", printed)[1]

    def text(self) -> str:
        logs = "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted(self.out.glob("logs/*.log")))
        return f"{self.log.read_text() if self.log.exists() else ''}\n{logs}"

    def reaches(self, step: int) -> None:
        there = lambda: (self.out / "log.jsonl").exists() and max(losses(self.out), default=0) >= step  # noqa: E731
        self.cluster.wait_for(there, what=self.text)

    def ends(self, state: str, timeout: float = 120) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait_for(lambda: self.cluster.state(self.number) in over, timeout, self.text)
        assert self.cluster.state(self.number) == state, self.text()

    def pid(self, rank: int) -> int:
        """Of a rank's process on this machine."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(line.split("=", 1) for line in path.read_bytes().decode(errors="replace").split("\0") if "=" in line)
                command = (path.parent / "cmdline").read_bytes()
            except OSError:
                continue
            mine = variables.get("SLURM_JOB_ID") == self.number and variables.get("SLURM_PROCID") == str(rank)
            if mine and b"train_gpt.py" in command.split(b"\0", 3)[1] and "SLURM_STEP_ID" in variables:
                return int(path.parent.name)
        raise AssertionError(f"rank {rank} has no process")


def starts_again(cluster: Cluster, job: Submitted) -> None:
    """Waits until Slurm has put the job back (it runs on for a moment after it said so), and lets it begin in five seconds instead of the
    two minutes that Slurm holds it: sooner, the nodes still refuse it, since they revoked its credential in that second."""
    cluster.wait_for(lambda: cluster.field(job.number, "Restarts") == "1" and cluster.state(job.number) == "PENDING", what=job.text)
    cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+5seconds")
    cluster.wait_for(lambda: cluster.state(job.number) == "RUNNING", what=job.text)


@pytest.mark.more("slow system")
def test_a_job_on_two_nodes_trains_and_survives_a_killed_rank(cluster: Cluster, tmp_path: Path) -> None:
    job = Submitted(cluster, tmp_path, "--steps", "60")
    job.reaches(7)
    os.kill(job.pid(3), 9)
    job.ends("COMPLETED")
    assert "4 ranks on cpu" in job.text() and "from Slurm" in job.text()
    assert "rank 3" in job.text() and "was lost" in job.text() and "starting again from the newest checkpoint" in job.log.read_text()
    assert "going on from" in (job.out / "logs" / "0.log").read_text()
    assert sorted(losses(job.out)) == list(range(1, 61))


@pytest.mark.more("slow system")
def test_a_job_goes_on_with_the_nodes_that_are_left(cluster: Cluster, tmp_path: Path) -> None:
    job = Submitted(cluster, tmp_path, "--steps", "60")
    job.reaches(7)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # comes back for other jobs: its daemon is alive
    job.ends("COMPLETED")
    assert "starting 4 ranks on n1,n2" in job.log.read_text() and "starting 2 ranks on n1;" in job.log.read_text()
    assert "saved by 4 ranks" in job.text()
    assert sorted(losses(job.out)) == list(range(1, 61))


@pytest.mark.more("slow system")
def test_a_job_whose_time_is_nearly_over_saves_and_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    job = Submitted(cluster, tmp_path, "--steps", "400")
    job.reaches(7)
    cluster.run("scancel", "--signal=USR1", job.number)  # what --signal=USR1@300 sends
    cluster.wait_for(lambda: job.log.exists() and "back into the queue" in job.log.read_text(), what=job.text)
    newest, _ = latest_checkpoint(job.out / "checkpoints")
    assert newest is not None
    starts_again(cluster, job)
    job.reaches(newest.step + 3)
    cluster.run("scancel", job.number)  # SIGTERM: saves, and is not queued again
    job.ends("CANCELLED")
    assert "SIGTERM came: saved after step" in job.text() and job.log.read_text().count("back into the queue") == 1
    newest, damaged = latest_checkpoint(job.out / "checkpoints")
    assert newest is not None and not damaged and newest.step == max(losses(job.out))
    assert sorted(losses(job.out)) == list(range(1, newest.step + 1))


def test_the_doctor_checks_a_step_of_slurm(cluster: Cluster) -> None:
    command = [str(Path(sys.executable).with_name("muon-dist")), "doctor", "--launcher", "slurm"]
    told = cluster.run("srun", "--nodes=2", "--ntasks=4", *command, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    assert "4 ranks, from Slurm" in told and told.rstrip().endswith(": ok") and told.count("largest relative error") == 1


def test_a_process_that_srun_did_not_start_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "bare.sh"
    script.write_text(f"#!/bin/sh\n{sys.executable} {ROOT}/launch/train_gpt.py --dry-run\n")
    number = re.search(r"job (\d+)", cluster.run("sbatch", "--ntasks=2", f"--output={tmp_path}/log", str(script)))[1]
    cluster.wait_for(lambda: cluster.state(number) in ("COMPLETED", "FAILED"))
    assert "SLURM_NTASKS=2 but SLURM_STEP_ID is not set" in (tmp_path / "log").read_text()
