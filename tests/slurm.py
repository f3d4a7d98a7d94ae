"""A private Slurm on this machine: munged, slurmctld and a slurmd for each of some virtual nodes, as root, all in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from muon_dist.run.bootstrap import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")


class Cluster:
    """`nodes` virtual nodes n1, n2, … whose names don't resolve, so jobs need MASTER_ADDR. Skips where it can't be had."""

    def __init__(self, folder: Path, nodes: int) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
        if missing:
            pytest.skip(f"Slurm is not installed: {', '.join(missing)} (Debian: slurmd slurmctld slurm-client munge)")
        if os.geteuid() != 0:
            pytest.skip("Slurm's daemons need root")
        self.folder, self.nodes = folder, [f"n{k + 1}" for k in range(nodes)]
        for name in ("state", "log", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        folder.chmod(0o755)
        (folder / "slurm.conf").write_text(self._config())
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]
        munge = [f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
        self.run("munged", "--force", *munge, f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munged.seed")
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.run("slurmd", "-N", node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * nodes)

    def _config(self) -> str:
        host, ports = socket.gethostname().split(".")[0], [free_port() for _ in range(len(self.nodes) + 1)]
        lines = [
            "ClusterName=tests",
            f"FirstJobId={secrets.randbelow(10_000) + 1}",  # a job's port follows from its number: two clusters on a machine don't meet
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/munge.sock",
            "CredType=cred/munge",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log",
            f"SlurmdLogFile={self.folder}/log/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,defer_batch",
            "KillWait=20",  # seconds from scancel's SIGTERM to SIGKILL
        ]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 State=UNKNOWN")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO")
        return "\n".join(lines) + "\n"

    def run(self, *command: str, **more: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(field.removeprefix(f"{name}=") for field in fields if field.startswith(f"{name}="))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait_for(self, condition, timeout: float = 90, what=lambda: "") -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in time\n{what()}"
            time.sleep(0.1)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=self.environment, capture_output=True, check=False)
        time.sleep(0.5)
        for path in (*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"):
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
