"""A timeline of one optimizer step: its parts on one rank, and on all ranks as Chrome's tracing and Perfetto show it, with how much of the
travelling it hides."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch

COLLECTIVES = ("gloo:", "nccl:")
NEWTON_SCHULZ = "muon_dist::newton_schulz"
TRAVEL = ("muon_dist::start_gather", "muon_dist::finish_gather", "muon_dist::start_scatter")
PARTS = {
    "momentum": ("muon_dist::momentum",),
    "travel": (*TRAVEL, *COLLECTIVES),
    "Newton–Schulz": (NEWTON_SCHULZ,),
    "apply": ("muon_dist::apply",),
    "AdamW": ("muon_dist::adamw",),
}

Interval = tuple[float, float]


def traced(step: Callable[[], Any], folder: str, rank: int) -> None:
    """Take one step under torch's profiler; what this rank did goes to a file in `folder`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler starts; else it says so on stderr
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    profile.export_chrome_trace(os.path.join(folder, f"trace-{rank}.json"))


def parts(folder: str, rank: int) -> dict[str, float]:
    """Milliseconds of the parts of the step that `traced` wrote: the device's, or the host's where there is no device; "all" is from the
    first event to the last.
    """
    events = [e for e in _events(folder, rank) if e["name"].startswith(("muon_dist::", *COLLECTIVES)) or e.get("cat") == "kernel"]
    found = {name: length(union([e for e in events if e["name"].startswith(starts)])) / 1e3 for name, starts in PARTS.items()}
    ends = [(e["ts"], e["ts"] + e["dur"]) for e in events]
    return {**found, "all": (max(stop for _, stop in ends) - min(start for start, _ in ends)) / 1e3}


def _events(folder: str, rank: int) -> list[dict[str, Any]]:
    """What lasted in a rank's step. Of a range that is there twice, when the host queued it and when the device did it, the latter."""
    with open(os.path.join(folder, f"trace-{rank}.json")) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    on_device = any(e.get("cat") == "gpu_user_annotation" for e in events)
    return [e for e in events if not (on_device and e.get("cat") == "user_annotation")]


def summary(folder: str, ranks: int, out: str) -> str:
    """Join the ranks' traces into the file `out`, a process per rank, and say how much of the travelling lay beside Newton–Schulz.

    Kept are the parts of MuonDist's step, collectives, and kernels of an accelerator; not the host's single operations.
    """
    events: list[dict[str, Any]] = []
    lines = []
    for rank in range(ranks):
        own = [e for e in _events(folder, rank) if _is_kept(e)]
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events += [{**e, "pid": rank} for e in own]
        iterating = union([e for e in own if e["name"].startswith(NEWTON_SCHULZ)])
        travelling = union([e for e in own if e["name"].startswith(COLLECTIVES)])
        total, hidden = length(travelling), length(travelling) + length(iterating) - length(merged(travelling + iterating))
        share = f"{hidden / total:.0%} of it beside Newton–Schulz" if total else "nothing"
        lines.append(f"  rank {rank}: Newton–Schulz {length(iterating) / 1e3:.1f} ms, travelling {total / 1e3:.1f} ms, {share}")
    with open(out, "w") as file:
        json.dump({"traceEvents": events}, file)
    return "\n".join([f"\none step on {ranks} ranks: {out} (open it in ui.perfetto.dev or chrome://tracing)", *lines])


def _is_kept(event: dict[str, Any]) -> bool:
    return event["name"].startswith(("muon_dist::", *COLLECTIVES)) or event.get("cat") in ("kernel", "gpu_memcpy")


def union(events: list[dict[str, Any]]) -> list[Interval]:
    """The times covered by any of the events, without overlaps, in microseconds."""
    return merged([(e["ts"], e["ts"] + e["dur"]) for e in events])


def merged(intervals: list[Interval]) -> list[Interval]:
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def length(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)
