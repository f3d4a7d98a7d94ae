"""Checkpoints that are whole or not there: written beside, listed file by file, and renamed when every rank is done.

    RUN/checkpoints/step-00000200/            whole: it has checkpoint.json, and its files have the sizes told there
    RUN/checkpoints/.partial-step-00000300/   being written, or left by a run that was killed meanwhile

The folder must be one that all ranks see. What lies in a checkpoint is the caller's.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

ABOUT = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the step it was saved after, and what was told about it."""

    path: Path
    step: int
    about: dict[str, Any]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, write: Callable[[Path], None], about: Mapping[str, Any], *, keep: int, syncs: bool = True
) -> Path:
    """Save a checkpoint, and let go of all but the newest `keep` up to this step and of any that are said to be later. Collective.

    Args:
        write: is called on every rank with an empty folder, and writes this rank's part of the state there; may be collective.
        about: is kept beside it, in JSON; equal on all ranks.
        syncs: whether this rank brings the files to disk (fsync): one rank of each host is enough.

    Raises:
        OSError: a full disk or a folder that can't be written. Earlier checkpoints stay as they are.
    """
    root = Path(folder)
    done, partial = root / f"step-{step:08d}", root / f".partial-step-{step:08d}"
    if _rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for left in [*root.glob(".partial-*"), *root.glob(".old-*")]:
            shutil.rmtree(left, ignore_errors=left.name.startswith(".old-"))  # someone may still read it, on a network file system
        partial.mkdir()
    _barrier()
    write(partial)
    _barrier()  # before files are brought to disk, everyone has written them
    if syncs:
        for path in partial.rglob("*"):
            _sync(path)
    _barrier()
    if _rank() == 0:
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        with open(partial / ABOUT, "w") as file:
            json.dump({**about, "step": step, "files": files}, file, indent=1)
        _sync(partial / ABOUT)
        _sync(partial)
        replaced = [_put_aside(done)] if done.exists() else []  # it was damaged, or it would not be saved again
        partial.rename(done)
        _sync(root)
        others = [path for path in _folders(root) if path != done]
        later = [path for path in others if int(path.name[5:]) > step]  # passed over when this run went on from an earlier one
        too_old = others[len(later) :][max(0, keep - 1) :]
        for aside in [*replaced, *map(_put_aside, [*later, *too_old])]:
            shutil.rmtree(aside, ignore_errors=True)  # what can't be removed now is at the next save
    _barrier()
    return done


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_aside(path: Path) -> Path:
    """Where it is no checkpoint any more, at once."""
    return path.rename(path.with_name(f".old-{path.name}-{os.getpid()}"))


def _folders(root: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest_checkpoint(folder: str | os.PathLike[str]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in _folders(Path(folder)):
        try:
            return read_checkpoint(path), problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What is told about a checkpoint.

    Raises:
        ValueError: it is not whole; which file is missing or has another size.
    """
    root = Path(path)
    try:
        about = json.loads((root / ABOUT).read_text())
        files, step = dict(about["files"]), int(about["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root} is no whole checkpoint: {ABOUT} can't be read ({error})") from error
    for name, size in files.items():
        held = (root / name).stat().st_size if (root / name).is_file() else None
        if held != size:
            state = "is gone" if held is None else f"has {held} bytes"
            raise ValueError(f"{root} is damaged: {name} {state}, and was saved with {size}")
    return Checkpoint(path=root, step=step, about=about)


def claim(folder: str | os.PathLike[str], *, patience: float = 10) -> Any:
    """Make this job the only one that writes to a folder, for as long as rank 0 keeps what is returned. Collective.

    Raises:
        ValueError: on all ranks: another job has it, and kept it for `patience` seconds.
    """
    held, told = None, [""]
    if _rank() == 0:
        deadline = time.monotonic() + patience
        while True:
            try:
                (Path(folder) / ".lock").touch()
                held = held or open(Path(folder) / ".lock")  # noqa: SIM115  # open as long as the job lives
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # maybe one that was killed, and is just ending
                if time.monotonic() > deadline:
                    told = [f"another job writes to {folder}: choose another folder, or end that job first"]
                    break
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    if told[0]:
        raise ValueError(told[0])
    return held


def require_shared(folder: str | os.PathLike[str], *, patience: float = 10) -> None:
    """Make a folder and see that every rank sees the same one. Collective.

    Raises:
        ValueError: on all ranks: it can't be made or written, or some ranks have another folder of that name.
    """
    root, mine = Path(folder), _rank()
    told: list[Any] = [("", "")]
    name = f".shared-{os.getpid()}"
    if mine == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
            told = [(name, "")]
        except OSError as error:
            told = [("", str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    name, problem = told[0]
    if problem:
        raise ValueError(f"{root} can't be written by rank 0: {problem}. Choose a folder that this job may write to")
    deadline = time.monotonic() + patience
    while not (sees := (root / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)  # network file systems remember for a while what was not there
    views: list[Any] = [sees]
    if dist.is_initialized():
        views = [None] * dist.get_world_size()
        dist.all_gather_object(views, sees)
    if mine == 0:
        (root / name).unlink()
    blind = [rank for rank, view in enumerate(views) if not view]
    if blind:
        raise ValueError(f"ranks {blind} don't see what rank 0 writes to {root}: it must be a folder on a file system that all hosts share")
