"""Files of JSON lines that several runs of one job append to, and that a kill may leave with half a line at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append_lines(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Append a line per record. What a killed process left of a line is cut off first."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record; a last line without its end is being written, or was torn by a kill, and is left out.

    Raises:
        ValueError: a whole line that is not JSON.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return records
