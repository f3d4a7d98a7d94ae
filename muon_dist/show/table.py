"""Plain-text tables and numbers for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Columns as wide as they need to be; those in `right` are aligned to the right."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def si(value: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'; with decimal prefixes."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are not None; None where all are."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def median_of_all(values: Sequence[float | None]) -> float | None:
    """The median, where None stands for a value below all others; None where that is the one in the middle."""
    return sorted(values, key=lambda v: -math.inf if v is None else v)[len(values) // 2] if values else None


def write_json(path: str | None, content: Any) -> None:
    """Write what a command printed, and what it was computed from, so that others can check it."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
