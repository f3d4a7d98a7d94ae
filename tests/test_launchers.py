"""launch/train_gpt.py as users start it: torchrun, DeepSpeed's launcher, mpirun, by hand; flags from files; what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muon_dist.run.checkpoints import latest_checkpoint
from muon_dist.run.lines import read_lines

from .jobs import LOGS, SIZE, SMALL, losses, wait_for

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def launch(command: list[str], *flags: str, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False)


def script(name: str) -> list[str]:
    return ["bash", str(ROOT / "launch" / name)]


class Here:
    """The trainer's main function in this process, which is quicker where nothing is trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(str(ROOT / "launch"))
        monkeypatch.chdir(ROOT)

    def refuses(self, *flags: str) -> str:
        """What it says on its way out."""
        with pytest.raises(SystemExit) as end:
            self._run(*flags)
        assert end.value.code not in (0, None)
        return f"{self._capsys.readouterr().err}{end.value}"

    def prints(self, *flags: str) -> str:
        self._run(*flags)
        return self._capsys.readouterr().out

    def _run(self, *flags: str) -> None:
        import train_gpt

        self._monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags])
        train_gpt.main()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


MORE = pytest.mark.more("repeat")
TRAIN = [sys.executable, str(ROOT / "launch" / "train_gpt.py")]


@pytest.mark.parametrize(
    ("name", "ranks", "found"),
    [
        ("torchrun.sh", 2, "torchrun"),
        ("mpirun.sh", 3, "MPI"),
        pytest.param("mpirun.sh", 4, "MPI", marks=MORE),
        pytest.param("torchrun.sh", 1, "torchrun", marks=MORE),
    ],
)
def test_launchers_train_alike(name: str, ranks: int, found: str, tmp_path: Path) -> None:
    done = launch(script(name), *SMALL, "--steps", "4", "--out", str(tmp_path / "out"), NPROC=str(ranks))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{ranks} ranks on cpu, 1 host\(s\), from {found} \(", done.stdout)
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]
    start = read_lines(tmp_path / "out" / "log.jsonl")[0]
    assert start["environment"]["world_size"] == ranks and start["environment"]["launcher"] == found.lower()
    plan = next(r for r in read_lines(tmp_path / "out" / "log.jsonl") if r["type"] == "plan")
    assert sorted({m["owner"] for m in plan["domains"][0]["matrices"]}) == list(range(ranks))


@pytest.mark.parametrize("config", [pytest.param("zero2", marks=MORE), "zero3"])
def test_deepspeeds_launcher(config: str, tmp_path: Path) -> None:
    flags = [*SIZE, *LOGS, "--steps", "8", "--out", str(tmp_path)]
    port = "29611" if config == "zero2" else "29613"
    done = launch(script("deepspeed.sh"), *flags, NPROC="2", CONFIG=f"configs/deepspeed/{config}.json", MASTER_PORT=port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on cpu, 1 host(s), from deepspeed" in done.stdout
    assert f"DeepSpeed, configs/deepspeed/{config}.json" in done.stdout
    found = losses(tmp_path)
    assert len(found) == 8 and found[8] < found[1]
    plan = next(r for r in read_lines(tmp_path / "log.jsonl") if r["type"] == "plan")
    assert plan["state_bytes"] > 0 and sum(len(d["matrices"]) for d in plan["domains"]) == 12


class Running:
    """A launcher in the background, until it has trained some steps; then something happens to it."""

    def __init__(self, command: list[str], out: Path, *flags: str, steps: int) -> None:
        given = [*command, *SMALL, *flags, "--out", str(out)]
        environment = {**ENVIRONMENT, "NPROC": "2"}
        self.log = out.with_suffix(".txt")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(given, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        wait_for(lambda: (out / "log.jsonl").exists() and max(losses(out), default=0) >= steps, 90)

    def ranks(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid), "-f", "train_gpt.py"], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def ends(self, timeout: float = 90) -> str:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(30)
            raise AssertionError(f"it did not end within {timeout} s:\n{self.log.read_text()}") from None
        return self.log.read_text()


BARE = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "--max_restarts", "2", str(ROOT / "launch" / "train_gpt.py")]


@pytest.mark.parametrize("command", [script("torchrun.sh"), pytest.param(BARE, marks=MORE)], ids=["script", "torchrun"])
def test_torchrun_starts_all_ranks_again_after_one_is_killed(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Running(command, out, "--steps", "60", "--save-every", "5", steps=7)
    os.kill(job.ranks()[-1], signal.SIGKILL)
    text = job.ends()
    assert job.process.returncode == 0, text
    assert re.search(r"rank \d ends: rank \d .*was lost", text) and "going on from" in text
    assert sorted(losses(out)) == list(range(1, 61))


@pytest.mark.more("repeat")
def test_a_signal_to_torchrun_saves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Running(script("torchrun.sh"), out, "--steps", "5000", "--save-every", "0", steps=3)
    job.process.send_signal(signal.SIGUSR1)
    found = re.search(r"SIGUSR1 came: saved after step (\d+)", job.ends())
    newest, damaged = latest_checkpoint(out / "checkpoints")
    assert found is not None and newest is not None and not damaged and newest.step == int(found[1])


def test_mpi_ranks_with_other_flags_are_named(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "2", "--out", str(tmp_path)]
    command = [str(BIN / "mpiexec"), "-n", "1", *TRAIN, *flags, ":", "-n", "1", *TRAIN, *flags, "--heads", "4"]
    done = launch(command)
    assert done.returncode != 0 and "rank 1 was started with --heads 4, rank 0 2" in done.stdout + done.stderr


def test_an_mpi_rank_whose_environment_is_set_in_part_ends_all_of_them() -> None:
    bad = f"if [ $PMI_RANK = 1 ]; then export RANK=1; fi; exec {' '.join(TRAIN)} --steps 1"
    for _ in range(3):  # mpiexec may end before it has passed on what a rank that ends at once has said
        done = launch([str(BIN / "mpiexec"), "-n", "2", "bash", "-c", bad], timeout=60)
        assert done.returncode != 0
        if done.stderr:
            break
    assert "the environment is set in part: RANK=1" in done.stderr


@pytest.mark.parametrize(
    ("command", "launcher"),
    [
        pytest.param(["torchrun", "--standalone", "--nproc_per_node", "3", "--no-python"], "torchrun", marks=MORE),
        (["mpiexec", "-n", "2"], "mpi"),
    ],
)
def test_the_doctor_checks_a_launcher(command: list[str], launcher: str) -> None:
    done = launch([str(BIN / command[0]), *command[1:], str(BIN / "muon-dist"), "doctor", "--launcher", launcher])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"largest relative error of an update: .*: ok", done.stdout) and "all-to-all of 8 MB a rank" in done.stdout
    assert done.stdout.count("largest relative error") == 1  # rank 0 alone


def test_the_doctor_says_how_to_start_it_and_finds_unlike_ranks() -> None:
    from muon_dist.cli.doctor_launcher import _unlike

    done = launch([str(BIN / "muon-dist"), "doctor", "--launcher", "slurm"])
    assert done.returncode == 2 and "srun --nodes 2 --ntasks-per-node 8 muon-dist doctor --launcher slurm" in done.stderr
    one = {"host": "a", "device": "CPU", "cores": 4, "threads": 4, "time": 0.0, "versions": {"torch": "2.13"}}
    assert _unlike([one]) == []
    found = _unlike([one, {**one, "host": "b", "versions": {"torch": "2.9"}, "device": "H100", "time": 60.0}, {**one, "host": "a"}, one])
    assert found == [
        "rank 1 on b has torch 2.9, rank 0 has 2.13",
        "rank 1 on b computes on H100, rank 0 on CPU",
        "the clock of b differs by 60 s from that of a",
        "3 ranks on a take 4 threads each, and it has 4 cores: set OMP_NUM_THREADS",
    ]


def test_flags_come_from_a_file_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'out = "{tmp_path}/from-file"\nsteps = 9\n[model]\nlayers = 2\nwidth = 32\nheads = 2\ncontext = 16\n[optimizer]\nlr = 0.01\n'
    )
    done = launch(TRAIN, "--config", str(tmp_path / "run.toml"), "--steps", "2", "--eval-every", "0")
    assert done.returncode == 0, done.stderr
    options = read_lines(tmp_path / "from-file" / "log.jsonl")[0]["options"]
    assert (options["steps"], options["layers"], options["lr"]) == (2, 2, 0.01)


@pytest.mark.more("repeat")
def test_a_dry_run_prints_the_plan_of_all_ranks() -> None:
    done = launch(script("torchrun.sh"), *SIZE, "--dry-run", "--distributed-optimizer", "--engine", "megatron", NPROC="2", MAX_RESTARTS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sharded like ZeRO 1" in done.stdout and "2 owners" in done.stdout and "imbalance" in done.stdout
    assert not (ROOT / "runs" / "train_gpt" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer", "adamw"],
        ["--ns-steps", "5"],
        ["--engine", "megatron"],
        ["--engine", "deepspeed", "--deepspeed-config", "configs/deepspeed/zero3.json"],
    ],
    ids=" ".join,
)
def test_what_a_dry_run_prints_is_read_back(flags: list[str], tmp_path: Path, here: Here) -> None:
    one = here.prints(*SIZE, *flags, "--dry-run")
    (tmp_path / "again.toml").write_text(one.split("\nrank 0 of 1")[0])
    again = here.prints("--config", str(tmp_path / "again.toml"), "--dry-run")
    assert again == one and ("sharded like ZeRO 3" in one) == ("megatron" not in flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "deepspeed"], "needs --deepspeed-config"),
        (["--deepspeed-config", "configs/deepspeed/zero2.json"], "needs --engine deepspeed"),
        (["--engine", "deepspeed", "--deepspeed_config", "x.json", "--batch", "3"], "said by the DeepSpeed config (train_batch_size)"),
        (["--engine", "deepspeed", "--deepspeed_config", "x.json"], "can't be read"),
        (["--tp", "2"], "--tp needs --engine megatron"),
        (["--optimizer", "adamw", "--coverage", "0.8"], "--coverage needs --optimizer muon_dist"),
        (["--ns-steps", "5", "--burn-in", "3"], "--burn-in is for adaptive steps"),
        (["--ns-steps", "few"], "must be 'adaptive' or a number"),
        (["--heads", "3"], "does not divide --width"),
        (["--vocabulary", "100"], "too small for bytes"),
        (["--holdout", "1"], "leaves nothing to train on"),
        (["--holdout", "0"], "needs windows to evaluate on"),
        (["--rank-timeout", "0"], "positive number of seconds"),
        (["--lr", "nan"], "--lr must be 0 or more"),
        (["--speed", "9"], "unrecognized arguments"),
        (["--config", "none.toml"], "can't be read"),
        (["--data", "none.txt"], "can't be read"),
        (["--data", ".gitignore"], "none is left to train on"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--micro-batch", "3"], "does not divide the 8 windows"),
    ],
)
def test_flags_that_are_wrong_end_with_one_clear_line(flags: list[str], words: str, tmp_path: Path, here: Here) -> None:
    assert words in here.refuses(*flags, "--out", str(tmp_path / "out"), "--dry-run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 9", "there is no flag 'speed'"),
        ("[model]\nlr = 1.0", "there is no flag 'lr' in [model]"),
        ("[models]\nlayers = 1", "there is no table [models]"),
        ("layers = [1, 2]", "must be a number or a string"),
        ("wandb = 1", "must be true or false"),
        ("layers = many", "can't be read"),
        ('layers = "many"', "invalid int value"),
        ("config = 'x'", "there is no flag 'config'"),
    ],
)
def test_files_of_flags_that_are_wrong_end_with_one_clear_line(text: str, words: str, tmp_path: Path, here: Here) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert words in here.refuses("--config", str(tmp_path / "run.toml"), "--dry-run")


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_an_engine_whose_framework_is_missing_is_refused(engine: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    import options

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    flags = ["--deepspeed-config", "configs/deepspeed/zero2.json"] if engine == "deepspeed" else []
    assert f"pip install 'muon-dist[{engine}]'" in here.refuses("--engine", engine, *flags, "--steps", "1")


def test_a_config_of_another_optimizer_is_refused(tmp_path: Path, here: Here) -> None:
    (tmp_path / "sgd.json").write_text(json.dumps({"optimizer": {"type": "SGD"}}))
    told = here.refuses("--engine", "deepspeed", "--deepspeed-config", str(tmp_path / "sgd.json"))
    assert 'must be of type "MuonDist" or "AdamW"' in told


def test_a_process_that_no_launcher_started_right_says_what_is_missing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "train_gpt.py: the environment is set in part: WORLD_SIZE=2" in here.refuses("--steps", "1")
