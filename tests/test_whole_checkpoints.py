"""Checkpoint folders: whole or not there, the newest kept, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from muon_dist.run.checkpoints import claim, latest_checkpoint, read_checkpoint, require_shared, save_checkpoint
from muon_dist.run.lines import append_lines, read_lines

from .ranks import run_ranks


def write(text: str):
    def to(folder: Path) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        (folder / "parts").mkdir(exist_ok=True)
        (folder / "parts" / f"{rank}.bin").write_text(text)

    return to


def test_the_newest_are_kept_and_tell_what_was_told(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, write("x" * step), {"windows": 7 * step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    newest, problems = latest_checkpoint(tmp_path)
    assert newest is not None and not problems
    assert (newest.step, newest.about["windows"], newest.about["files"]) == (10, 70, {"parts/0.bin": 10})
    assert latest_checkpoint(tmp_path / "nothing") == (None, [])


def test_a_save_that_breaks_off_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write("old"), {}, keep=1)

    def breaks(folder: Path) -> None:
        write("new")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, breaks, {}, keep=1)
    newest, problems = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1 and not problems
    save_checkpoint(tmp_path, 3, write("new"), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "parts" / "0.bin").write_text("short"), "0.bin has 5 bytes, and was saved with 20"),
        (lambda folder: (folder / "parts" / "0.bin").unlink(), "0.bin is gone, and was saved with 20"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"step": 2, "fi'), "checkpoint.json can't be read"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json can't be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), "checkpoint.json can't be read"),
    ],
)
def test_a_damaged_one_is_named_and_passed_over(harm, words: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write("x" * 20), {}, keep=5)
    harm(tmp_path / "step-00000002")
    newest, [problem] = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1 and words in problem
    with pytest.raises(ValueError, match=r"step-00000002"):
        read_checkpoint(tmp_path / "step-00000002")
    save_checkpoint(tmp_path, 2, write("again"), {}, keep=5)  # takes its place
    newest, problems = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 2 and not problems


def test_one_that_was_passed_over_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, write("x"), {}, keep=2)
    (tmp_path / "step-00000020" / "parts" / "0.bin").unlink()
    assert latest_checkpoint(tmp_path)[0].step == 10
    save_checkpoint(tmp_path, 12, write("x"), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]


def together(folder: str) -> list[str]:
    save_checkpoint(folder, 5, write("part"), {"ranks": dist.get_world_size()}, keep=1, syncs=dist.get_rank() == 0)
    return sorted(json.loads((Path(folder) / "step-00000005" / "checkpoint.json").read_text())["files"])


def test_all_ranks_write_into_one(tmp_path: Path) -> None:
    assert run_ranks(3, together, str(tmp_path)) == [["parts/0.bin", "parts/1.bin", "parts/2.bin"]] * 3


def folders_of_their_own(folder: str) -> str:
    try:
        require_shared(Path(folder) / str(dist.get_rank()), patience=0.5)
    except ValueError as error:
        return str(error)
    return ""


def test_a_folder_that_not_all_ranks_see_is_refused_on_all_of_them(tmp_path: Path) -> None:
    for told in run_ranks(3, folders_of_their_own, str(tmp_path)):
        assert "ranks [1, 2] don't see what rank 0 writes" in told
    assert not list((tmp_path / "0").iterdir())


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written by rank 0"):
        require_shared(tmp_path / "file" / "out")


def holds(folder: str, other: str) -> str:
    mine = claim(folder, patience=0.3)
    try:
        claim(folder, patience=0.3)
    except ValueError as error:
        assert mine is not None or dist.get_rank()
        claim(other)
        return str(error)
    return ""


def test_a_folder_belongs_to_one_job_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for told in run_ranks(2, holds, str(tmp_path), str(tmp_path / "other")):
        assert "another job writes to" in told
    claim(tmp_path)  # that job is gone


def test_lines_survive_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_lines(path, [{"a": 1}, {"a": 2}])
    whole = path.read_bytes()
    for torn in (b'{"a": 3, "b', b"\xff\xfe{", b"x" * 100):
        path.write_bytes(whole + torn)
        assert read_lines(path) == [{"a": 1}, {"a": 2}]
        append_lines(path, [{"a": 4}])
        assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 4}]
    path.write_bytes(b"torn")
    append_lines(path, [{"a": 5}])
    assert read_lines(path) == [{"a": 5}]
    path.write_text("no json\n")
    with pytest.raises(ValueError, match=r"line 1: not JSON"):
        read_lines(path)
