"""Reports of what steps do to matrices: sizes of updates and weights at any placement, and what was left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from muon_dist import MuonDist
from muon_dist.cli.main import main
from muon_dist.metrics import LAG, REPORT_EVERY

from . import models
from .ranks import run_ranks
from .recording import Collectives


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("spectrum*.jsonl")) for line in path.read_text().splitlines()]


def reported(placement: str, shapes: str, folder: str, options: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Root mean squares of the first update and of the weights after it, from whole parameters."""
    model = models.place(models.make_bank(models.SHAPES[shapes], torch.float64), placement)
    optimizer = MuonDist(model.named_parameters(), lr=0.3, weight_decay=0.0, ns_steps=5, telemetry_dir=folder, **options)
    expected = {}
    for seed in range(1 + LAG):
        models.backward(model, seed, placement)
        before = models.whole_parameters(model)
        optimizer.step()
        if seed == 0:
            after = models.whole_parameters(model)
            rms = {name: (((after[name] - p) ** 2).mean().sqrt(), (after[name] ** 2).mean().sqrt()) for name, p in before.items()}
            expected = {name: (float(a), float(b)) for name, (a, b) in rms.items() if before[name].ndim == 2}
    return expected


@pytest.mark.parametrize(
    ("placement", "world", "shapes", "options"),
    [
        ("replicas", 1, "odd", {}),
        ("replicas", 3, "odd", {}),
        ("fsdp2", 2, "odd", {"rule": "normuon"}),
        ("fsdp2", 3, "odd", {"placement": "gram"}),
        ("hsdp", 4, "odd", {}),
        ("tp", 2, "even", {}),
        ("mixed", 2, "odd", {}),
    ],
)
def test_sizes_are_those_of_whole_matrices(placement: str, world: int, shapes: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every piece is counted once, however many ranks hold it; with fixed steps, too."""
    expected = run_ranks(world, reported, placement, shapes, str(tmp_path), options)[0]
    found = [line for line in lines(tmp_path) if line["type"] == "update"]
    assert len(found) == len(expected) and {line["step"] for line in found} == {1}
    for line in found:
        update, weight = expected[line["name"].removeprefix("module.")]
        assert line["update_rms"] == pytest.approx(update, rel=1e-6) and line["weight_rms"] == pytest.approx(weight, rel=1e-6)
        assert line["update_to_weight"] == pytest.approx(update / weight, rel=1e-6)


def left_out(folder: str) -> list[Counter[str]]:
    """The collectives of each step."""
    counts = []
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = MuonDist([("w", p)], ns_steps=5, telemetry_dir=folder)
    for k in range(REPORT_EVERY + LAG):
        p.grad = torch.randn(6, 4)
        if k in (3, 4) and dist.get_rank() == dist.get_world_size() - 1:
            p.grad[0, 0] = float("inf")
        with Collectives() as seen:
            optimizer.step()
        counts.append(Counter(seen.names))
    return counts


@pytest.mark.parametrize("world", [1, 2])
def test_left_out_steps_are_reported_and_reports_are_seldom(world: int, tmp_path: Path) -> None:
    counts = run_ranks(world, left_out, str(tmp_path))[0]
    assert counts[REPORT_EVERY - 1] - counts[REPORT_EVERY] == Counter({"allreduce_": 1} if world > 1 else {})
    told = {line["step"]: line for line in lines(tmp_path) if line["type"] == "skipped"}
    assert {step: (line["skipped_steps"], line["skipped_updates"]) for step, line in told.items()} == {1: (0, 0), REPORT_EVERY: (2, 0)}
    assert Counter(line["type"] for line in lines(tmp_path)) == {"run": 1, "update": 2, "skipped": 2}


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    parameters = {"w": nn.Parameter(torch.randn(6, 4)), "norm": nn.Parameter(torch.ones(4))}

    def made(folder: str) -> MuonDist:
        return MuonDist(parameters.items(), ns_steps=5, telemetry_dir=tmp_path / folder)

    def train(optimizer: MuonDist, steps: int) -> None:
        for _ in range(steps):
            for p in parameters.values():
                p.grad = torch.randn(p.shape)
            optimizer.step()

    first = made("first")
    train(first, REPORT_EVERY - 2)
    second = made("second")
    second.load_state_dict(first.state_dict())
    train(second, 2)
    second.state_dict()  # writes what is on its way
    assert {line["step"] for line in lines(tmp_path / "second") if line["type"] == "update"} == {REPORT_EVERY}


def test_the_command_shows_them_with_and_without_spectra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (("fixed", {"ns_steps": 5}), ("adaptive", {"measure_every": 2})):
        p = nn.Parameter(torch.randn(8, 4))
        optimizer = MuonDist([("blocks.0.mlp.up.weight", p)], telemetry_dir=tmp_path / name, **options)
        for _ in range(8):
            p.grad = torch.randn(8, 4)
            optimizer.step()
        assert main(["spectrum", str(tmp_path / name)]) == 0
        shown = capsys.readouterr().out
        assert "blocks.0.mlp.up.weight" in shown and "root mean square, without weight decay" in shown
        assert ("no spectra: they are measured where step counts adapt" in shown) == (name == "fixed")


def test_sinks_get_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    p = nn.Parameter(torch.randn(8, 4))
    optimizer = MuonDist([("w", p)], ns_steps=5, telemetry_dir=tmp_path, telemetry_sinks=["tensorboard"])
    for _ in range(1 + LAG):
        p.grad = torch.randn(8, 4)
        optimizer.step()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (line,) = [line for line in lines(tmp_path) if line["type"] == "update"]
    (scalar,) = events.Scalars("muon_dist/w/update_rms")
    assert scalar.step == 1 and scalar.value == pytest.approx(line["update_rms"], rel=1e-6)
    assert events.Scalars("muon_dist/skipped_steps")[0].value == 0
