"""What a training run does when ranks are killed, disks fill up and signals come: the last checkpoint is whole, and a resumed run is the
uninterrupted one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from muon_dist.run.checkpoints import latest_checkpoint
from muon_dist.run.lines import read_lines

from .jobs import LOGS, SIZE, SMALL, Job, losses, train, wait_for, whole_state


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.more("kills"))])
def test_a_run_whose_ranks_are_killed_again_and_again_is_the_uninterrupted_one(kills: int, tmp_path: Path) -> None:
    """Random ranks, at random moments of a step, every second time in the middle of a checkpoint."""
    steps = 20 + 5 * kills
    flags = [*SMALL, "--steps", str(steps), "--save-every", "4", "--keep", "2"]
    train(3, flags, tmp_path / "whole")
    out, chance, in_checkpoint, reached = tmp_path / "killed", random.Random(0), 0, 0
    for k in range(kills):
        job = Job(3, [*flags, "--out", str(out)], tmp_path / f"try-{k}")
        log = out / "log.jsonl"
        before = log.stat().st_size if log.exists() else 0
        wait_for(lambda log=log, before=before: log.exists() and log.stat().st_size > before)  # it trains
        if k % 2:
            wait_for(lambda job=job: any((out / "checkpoints").glob(".partial-*")) or not job.processes[0].is_alive())
            in_checkpoint += any((out / "checkpoints").glob(".partial-*"))
        else:
            time.sleep(chance.uniform(0, 0.4))
        victim = chance.randrange(3)
        alive = job.processes[victim].is_alive()
        job.kill(victim)
        statuses = job.wait(60)
        if alive:
            assert statuses[victim] == -signal.SIGKILL and 0 not in statuses, job.text()
            others = "\n".join(path.read_text() for rank, path in enumerate(job.outputs) if rank != victim)
            assert f"rank {victim}" in others and "lost" in others, job.text()
        newest, damaged = latest_checkpoint(out / "checkpoints")
        assert not damaged
        step = 0 if newest is None else newest.step
        assert step >= reached, "a checkpoint was lost"
        reached = step
    assert in_checkpoint >= kills // 4, "hardly any kill came during a checkpoint: the test does not see what it is about"
    assert reached < steps, "the run ended before the last kill: give it more steps"
    train(3, flags, out)
    assert losses(out) == losses(tmp_path / "whole")
    ours, theirs = (whole_state(folder / "checkpoints" / f"step-{steps:08}", tmp_path) for folder in (out, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name in ours:
        assert torch.equal(ours[name].nan_to_num(-1.0), theirs[name].nan_to_num(-1.0)), name


MORE = pytest.mark.more("repeat")


# In these first steps spectra are steep, and deflated steps amplify rounding of 1e-7 up to three hundredfold; five steps fiftyfold
FIXED, ADAPTIVE = ([*SMALL[:-4], "--ns-steps", "5"], 2e-5), (SMALL, 5e-4)


@pytest.mark.parametrize(("small", "bound"), [FIXED, ADAPTIVE], ids=["five", "adaptive"])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=MORE), 2, pytest.param(4, marks=MORE)])
def test_a_run_resumed_at_another_world_size_is_the_uninterrupted_one_to_fp32_rounding(
    ranks: int, small: list[str], bound: float, tmp_path: Path
) -> None:
    flags = [*small, "--steps", "12", "--save-every", "6", "--keep", "3"]
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    train(3, flags, whole)
    out.mkdir()
    os.rename(whole / "checkpoints" / "step-00000012", tmp_path / "end")
    os.rename(whole / "checkpoints", out / "checkpoints")
    job = train(ranks, flags, out)
    assert "saved by 3 ranks" in job.text()
    theirs, ours = losses(whole), losses(out)
    assert sorted(ours) == list(range(7, 13)) and abs(ours[7] - theirs[7]) < 1e-6 * theirs[7]
    ours, theirs = whole_state(out / "checkpoints" / "step-00000012", tmp_path), whole_state(tmp_path / "end", tmp_path / "..")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.is_floating_point() and "spectrum" not in name:
            assert (ours[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=MORE)])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(number: signal.Signals, tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "2000", "--save-every", "0", "--out", str(tmp_path / "out")]
    job = Job(2, flags, tmp_path / "job")
    wait_for(lambda: (tmp_path / "out" / "log.jsonl").exists() and len(losses(tmp_path / "out")) > 3)
    job.kill(1, number)
    assert job.wait(60) == [0, 0], job.text()
    newest, damaged = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert newest is not None and not damaged and newest.step == max(losses(tmp_path / "out"))
    assert f"{number.name} came: saved after step {newest.step}" in job.outputs[0].read_text()
    assert read_lines(tmp_path / "out" / "log.jsonl")[-1]["type"] == "end"
    again = Job(2, [*flags[:-2], "--out", str(tmp_path / "out")], tmp_path / "again")
    wait_for(lambda: max(losses(tmp_path / "out")) > newest.step)
    again.kill(0, number)
    assert again.wait(60) == [0, 0], again.text()
    assert sorted(losses(tmp_path / "out")) == list(range(1, max(losses(tmp_path / "out")) + 1))  # no step twice, none left out


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; needs root."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "400", "--save-every", "2", "--keep", "100"]
    with mounted(tmp_path / "disk", "size=4m"):
        out = tmp_path / "disk" / "out"
        job = Job(2, [*flags, "--out", str(out)], tmp_path / "job")
        assert job.wait(60) == [1, 1], job.text()
        assert "No space left on device" in job.text() and "rank" in job.text()
        newest, damaged = latest_checkpoint(out / "checkpoints")
        assert newest is not None and not damaged
        whole_state(newest.path, tmp_path)
        for old in sorted((out / "checkpoints").glob("step-*"))[:-1]:  # room again
            subprocess.run(["rm", "-r", str(old)], check=True)
        again = Job(2, [*SMALL, "--steps", str(newest.step + 4), "--save-every", "2", "--keep", "1", "--out", str(out)], tmp_path / "again")
        assert again.wait(60) == [0, 0], again.text()
        assert not list((out / "checkpoints").glob(".*"))  # what the failed save had left


def test_a_folder_that_becomes_read_only_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "2000", "--save-every", "5", "--keep", "1"]
    with mounted(tmp_path / "disk", "size=64m"):
        out = tmp_path / "disk" / "out"
        job = Job(2, [*flags, "--out", str(out)], tmp_path / "job")
        wait_for(lambda: latest_checkpoint(out / "checkpoints")[0] is not None)
        while subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], capture_output=True, check=False).returncode:
            time.sleep(0.001)  # while a file is open for writing the kernel refuses
        assert job.wait(60) == [1, 1], job.text()
        assert "Read-only file system" in job.text()
        newest, damaged = latest_checkpoint(out / "checkpoints")
        assert newest is not None and not damaged
        whole_state(newest.path, tmp_path)
        refused = Job(2, [*flags, "--out", str(out)], tmp_path / "again")
        assert refused.wait(60) == [1, 1] and "can't be written" in refused.text()


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(2, [*SMALL, "--steps", "4", "--save-every", "2"], out)
    piece = next((out / "checkpoints" / "step-00000004").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:100])
    job = train(2, [*SMALL, "--steps", "6", "--save-every", "2"], out)
    assert f"is damaged: {piece.name} has 100 bytes" in job.text() and "going on from" in job.text()
    assert min(r["step"] for r in read_lines(out / "log.jsonl")[-6:] if r["type"] == "step") >= 3


def test_a_rank_that_was_given_another_shape_is_named_by_all(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "3", "--out", str(tmp_path / "out")]
    job = Job(2, flags, tmp_path / "job", {"MUON_DIST_TEST_WIDTH_OF_RANK_1": "48"})
    statuses = job.wait(60)
    assert statuses == [1, 1]
    for output in job.outputs:
        assert "rank 1 was started with --width 48, rank 0 32: give all the same" in output.read_text()
    assert not (tmp_path / "out").exists()


def test_a_rank_that_stands_still_is_named_within_the_set_time(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "100000", "--save-every", "50", "--rank-timeout", "4", "--out", str(tmp_path / "out")]
    job = Job(3, flags, tmp_path / "job")
    wait_for(lambda: latest_checkpoint(tmp_path / "out" / "checkpoints")[0] is not None)
    job.kill(1, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: not job.processes[0].is_alive() and not job.processes[2].is_alive(), 30)
    assert time.monotonic() - began < 4 + 6
    assert "rank 1 (process" in job.outputs[0].read_text() and "not a word from it" in job.outputs[0].read_text(), job.text()
    job.kill(1)
    job.wait(10)
    assert latest_checkpoint(tmp_path / "out" / "checkpoints")[0] is not None


def test_other_flags_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(1, [*SMALL, "--steps", "2"], out)
    for flags, words in ((["--width", "64"], "is of a run with --width 32, not 64"), (["--resume", "never"], "--resume is never")):
        job = Job(1, [*SMALL, *flags, "--out", str(out)], tmp_path / "job")
        assert job.wait(60) == [1] and words in job.text()


def test_flags_that_changed_since_the_checkpoint_count(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(2, [*SMALL, "--steps", "2"], out)
    job = train(2, [*SMALL, "--steps", "3", "--weight-decay", "0.3", "--coverage", "0.8", "--ns-steps", "adaptive", "--lr", "0.01"], out)
    for words in ("--weight-decay changed from 0.1 to 0.3", "--coverage changed from None to 0.8", "--lr changed from 0.004 to 0.01"):
        assert f"since the checkpoint {words}" in job.text()
    dcp_to_torch_save(out / "checkpoints" / "step-00000003", tmp_path / "state.pt")
    groups = torch.load(tmp_path / "state.pt", weights_only=False)["optimizer"]["param_groups"]
    muon = [group for group in groups if group["algorithm"] == "muon"]
    assert {group["weight_decay"] for group in groups} == {0.3} and {group["coverage"] for group in muon} == {0.8}
    assert all(group["lr"] == pytest.approx(0.01) for group in groups)


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(1, [*SMALL, "--steps", "2"], out)
    before = (out / "log.jsonl").read_text()
    (out / "checkpoints" / "step-00000002" / "checkpoint.json").unlink()
    job = Job(1, [*SMALL, "--steps", "4", "--out", str(out)], tmp_path / "job")
    assert job.wait(60) == [1] and "none of the checkpoints in" in job.text() and (out / "log.jsonl").read_text() == before


def test_batches_that_are_accumulated_are_the_same_batch(tmp_path: Path) -> None:
    """The windows of a step don't depend on the ranks or on how often they take some; the loss agrees to rounding."""
    runs = []
    for n, more in ((1, []), (2, ["--micro-batch", "2"]), (4, ["--micro-batch", "1"])):
        train(n, [*SMALL, "--steps", "3", "--save-every", "0", *more], tmp_path / f"run-{n}")
        runs.append(losses(tmp_path / f"run-{n}"))
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for step, loss in other.items():
            assert abs(loss - runs[0][step]) < 1e-5 * loss


DEEPSPEED = """{"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "gradient_clipping": 1.0, "steps_per_print": 1000000,
"zero_optimization": {"stage": %d}, "optimizer": {"type": "MuonDist", "params": {"lr": 0.004, "burn_in": 2, "measure_every": 3}}}"""
ENGINES = {
    "deepspeed stage 1": 1,
    "deepspeed stage 3": 3,
    "megatron tp 2": ["--tp", "2"],
    "megatron distributed optimizer": ["--distributed-optimizer", "--micro-batch", "3"],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("deepspeed stage 1", marks=MORE),
        "deepspeed stage 3",
        pytest.param("megatron tp 2", marks=MORE),
        "megatron distributed optimizer",
    ],
)
def test_runs_in_deepspeed_and_megatron_resume_bit_for_bit_and_at_another_world_size(name: str, tmp_path: Path) -> None:
    engine = ENGINES[name]
    if isinstance(engine, int):
        (tmp_path / "config.json").write_text(DEEPSPEED % engine)
        flags = [*SIZE, *LOGS, "--engine", "deepspeed", "--deepspeed-config", str(tmp_path / "config.json")]
    else:
        flags = [*SMALL, "--engine", "megatron", *engine]
    flags += ["--steps", "8", "--save-every", "4", "--eval-every", "4"]
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    train(2, flags, whole)
    (out / "checkpoints").mkdir(parents=True)
    os.rename(whole / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000004")
    subprocess.run(["cp", "-r", str(out), str(tmp_path / "elsewhere")], check=True)
    train(2, flags, out)
    theirs, ours = losses(whole), losses(out)
    assert sorted(ours) == [5, 6, 7, 8] and all(ours[step] == theirs[step] for step in ours)
    other = 4 if "tp 2" in name else 1
    job = train(other, flags, tmp_path / "elsewhere", environment={"DS_ACCELERATOR": "cpu"})
    assert "saved by 2 ranks" in job.text()
    elsewhere = losses(tmp_path / "elsewhere")
    assert abs(elsewhere[5] - theirs[5]) < 1e-5 * theirs[5] and abs(elsewhere[8] - theirs[8]) < 1e-2 * theirs[8]
