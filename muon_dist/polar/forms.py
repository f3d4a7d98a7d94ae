"""Which segments each schedule may take: read from segments.csv, which `restarts` has derived, so that no machine has to try it.

Ranks whose CPUs round unlike then choose alike, and a hundred candidates are priced at once. Schedules that are not in the table, a
user's own polynomials above all, are tried where they are used.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .coefficients import Coefficients
from .polynomials import schedule_for, widest_schedule
from .products import Precision
from .restarts import LONGEST, WORSE, best_segments, how_much_worse, possible_segments, single_steps, stands

TABLE = Path(__file__).with_name("segments.csv")
COLUMNS = ("schedule", "digest", "precision", "segments")
BANDS = (0.2, 0.28, 0.35)  # how near 1 the generated schedules of the table aim
DEEP = 8  # their most steps
PRECISIONS: tuple[Precision, ...] = (torch.float32, torch.bfloat16, torch.float16, "tf32", "bf16")

Segments = tuple[int, ...]


def cheapest_segments(steps: tuple[Coefficients, ...], precision: Precision, cost: Callable[[int], float]) -> Segments:
    """The lengths of the segments, in order, that cost least among those that the schedule may take in `precision`.

    `cost(length)` is of one segment; where nothing is cheaper every step stays single.
    """
    if (known := _table().get((digest(steps), name_of(precision)))) is None:
        return best_segments(steps, precision, cost)
    each = {length: cost(length) for length in range(1, LONGEST + 1)}
    return min((single_steps(len(steps)), *known), key=lambda segments: sum(each[length] for length in segments))


def digest(steps: tuple[Coefficients, ...]) -> str:
    """Tells schedules apart, by all digits of their coefficients."""
    return hashlib.sha256(repr(steps).encode()).hexdigest()[:16]


def name_of(precision: Precision) -> str:
    """As in the table. fp64 loses the same share of its digits as fp32."""
    if precision in (torch.float32, torch.float64):
        return "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[precision] if isinstance(precision, torch.dtype) else f"fp32 in {precision}"


@functools.cache
def _table() -> dict[tuple[str, str], tuple[Segments, ...]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return {
        (row["digest"], row["precision"]): tuple(tuple(map(int, segments.split("+"))) for segments in row["segments"].split())
        for row in csv.DictReader(lines)
    }


def derive(steps: tuple[Coefficients, ...], precision: Precision) -> tuple[Segments, ...]:
    """All segments with which the schedule comes out as exact as `restarts` asks for, single steps aside; tried on this machine."""
    possible = possible_segments(steps, precision)

    def compositions(first: int) -> Iterator[Segments]:
        if first == len(steps):
            yield ()
        for length in range(1, min(LONGEST, len(steps) - first) + 1):
            if length == 1 or (first, length) in possible:
                yield from ((length, *rest) for rest in compositions(first + length))

    found = (s for s in compositions(0) if max(s) > 1 and how_much_worse(steps, precision, s) <= WORSE and stands(steps, precision, s))
    return tuple(sorted(found, key=lambda s: (len(s), s)))


def schedules_of_the_table() -> Iterator[tuple[str, tuple[Coefficients, ...]]]:
    """What the table lists: published families, and what adaptive steps choose from."""
    for name, counts in (("jordan", (1, 8)), ("polar_express", (3, 8)), ("cans", (3, 8)), ("deepseek_v4", (10, 10)), ("minimax", (1, 8))):
        for k in range(counts[0], counts[1] + 1):
            yield f"{name} {k}", schedule_for(name, k).steps
    for tol in BANDS:
        for k in range(1, DEEP + 1):
            yield f"generated {k} within {tol:g}", widest_schedule(k, tol).steps


def write_table() -> None:
    """Derive the table anew: `python -c "from muon_dist.polar.forms import write_table; write_table()"`, minutes."""
    lines = [
        "# Segments of Newton–Schulz steps that share a Gram matrix, by schedule and precision: see forms.py and restarts.py",
        ",".join(COLUMNS),
    ]
    for name, steps in schedules_of_the_table():
        for precision in PRECISIONS:
            segments = " ".join("+".join(map(str, s)) for s in derive(steps, precision))
            print(name, name_of(precision), segments, flush=True)
            lines.append(f"{name},{digest(steps)},{name_of(precision)},{segments}")
    TABLE.write_text("\n".join(lines) + "\n")
