"""What watch and report show of a run: from its lines alone, on a page that opens without errors, wide and narrow."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muon_dist.cli.main import main
from muon_dist.run.lines import append_lines
from muon_dist.show.run_log import read_log

from .jobs import LOGS, SIZE, SMALL, train

QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


FIGURES = """
const edges = (figure, anchor, low, high) => [...figure.querySelectorAll(`text[text-anchor=${anchor}]`)]
    .map(label => label.getBoundingClientRect()).map(box => [box[low], box[high]]);
return [...document.querySelectorAll("figure")].map(figure => ({
    width: figure.clientWidth,
    box: figure.querySelector("svg").viewBox.baseVal.width,
    paths: figure.querySelectorAll("path").length,
    size: parseFloat(getComputedStyle(figure.querySelector("svg text")).fontSize),
    labels: edges(figure, "middle", "left", "right"),
    heights: edges(figure, "end", "bottom", "top"),
}));
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the trainer: one that was resumed at another world size, and AdamW's."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, "--eval-every", "5", "--tensorboard"]
    train(2, [*flags, "--steps", "12"], folder / "muon")
    train(3, [*flags, "--steps", "20"], folder / "muon")
    train(1, [*SIZE, *LOGS, "--eval-every", "5", "--optimizer", "adamw", "--steps", "20"], folder / "adamw")
    return folder


def test_the_log_of_a_resumed_run_counts_every_step_once(runs: Path) -> None:
    log = read_log(str(runs / "muon"))
    assert [start["step"] for start in log.starts] == [0, 12]
    assert [start["environment"]["world_size"] for start in log.starts] == [2, 3]
    assert [step["step"] for step in log.steps] == list(range(1, 21))
    assert [e["step"] for e in log.evaluations] == [5, 10, 12, 15, 20] and log.state() == "finished"
    assert log.plan is not None and {m["owner"] for m in log.plan["domains"][0]["matrices"]} == {0, 1, 2}
    assert len(log.last_matrices) == 12 and 0 < log.mean_coverage() <= 1


def test_steps_that_were_done_again_replace_those_before(tmp_path: Path) -> None:
    environment = {"world_size": 1, "hosts": 1, "launcher": "none", "device": "cpu", "packages": {}, "platform": "x"}
    start = {
        "type": "start",
        "time": 1.0,
        "options": {"steps": 9, "log_every": 1, "engine": "torch", "ns_steps": 5},
        "optimizer": "muon_dist",
    }
    start |= {"parameters": 10, "environment": environment}
    step = {
        "type": "step",
        "steps": 1,
        "lr": 0.1,
        "gradient_norm": None,
        "seconds": 1.0,
        "optimizer_seconds": 0.5,
        "tokens_per_second": 7.0,
    }
    step |= {"skipped_steps": 0}
    lines = [{**start, "step": 0}, *({**step, "step": k, "loss": float(k)} for k in (1, 2, 3, 4)), {**start, "step": 2}]
    lines += [{**step, "step": 3, "loss": 30.0}]
    append_lines(tmp_path / "log.jsonl", lines)
    log = read_log(str(tmp_path))
    assert [(s["step"], s["loss"]) for s in log.steps] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert log.state() == "running" and log.optimizer_share() == 0.5
    log.changed = time.time() - 3600
    assert log.state() == "silent for 1 h 0 min: it may have been killed"
    append_lines(tmp_path / "log.jsonl", [{"type": "end", "time": 2.0, "reason": "rank 1 was lost", "failed": True}])
    assert read_log(str(tmp_path)).state() == "failed: rank 1 was lost"


def test_watch_shows_loss_share_error_and_steps(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(runs / "muon")]) == 0
    text = capsys.readouterr().out
    log = read_log(str(runs / "muon"))
    assert text.startswith("muon: finished\n") and "step 20 of 20" in text and f"loss {log.steps[-1]['loss']:.4f}" in text
    assert "3 rank(s) on 1 host(s)" in text and "resumed 1 time(s)" in text and "0 step(s) skipped" in text
    assert f"{log.flops_over_five():.2f}× the FLOPs of five Jordan steps" in text and f"coverage {log.mean_coverage():.2f}" in text
    assert f"error {log.mean_errors()[0]:.4g}, of five Jordan steps {log.mean_errors()[1]:.4g}" in text
    assert "last checkpoint: after step 20" in text and "of which the optimizer takes" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:2] in ("q ", "k ", "v ", "o ", "up", "do")}
    assert set(rows) == {"q", "k", "v", "o", "up", "down"} and all(row[1] == "2" for row in rows.values())


def test_folders_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("watch", "report"):
        assert main([command, str(tmp_path)]) == 2 and "has no log.jsonl" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    assert main(["watch", str(tmp_path)]) == 2 and "has not begun" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--every", "0"]) == 2


def test_tensorboard_gets_what_the_log_gets(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for path in sorted((runs / "muon").glob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    log = read_log(str(runs / "muon"))
    assert found["train/loss"] == pytest.approx({s["step"]: s["loss"] for s in log.steps})
    assert found["train/evaluation_loss"] == pytest.approx({e["step"]: e["loss"] for e in log.evaluations})
    assert "muon_dist/blocks.0.mlp.up.weight/coverage" in found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed (Debian: chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", *QUIET):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.mark.more("slow system")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("names", [["muon", "adamw"], ["adamw"]])
def test_the_page_opens_without_errors_and_fits(names: list[str], width: int, runs: Path, browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", *(str(runs / name) for name in names), "--out", str(page)]) == 0
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    titles = browser.execute_script("return [...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    expected = {"Loss", "Gradient norm", "Learning rate", "Tokens per second", "Optimizer's share of a step"}
    measured = {"Quantiles over the run, median of all matrices", "Share of matrices whose quantile is below the resolution"}
    measured |= {"σ at q = 0.5 over relative depth, at the end", "Steps, mean by kind"}
    measured |= {"Error: root mean square of (gain − 1), mean of all matrices", "Newton–Schulz FLOPs over five Jordan steps, by kind"}
    assert set(titles) == expected | (measured if "muon" in names else set())
    # every chart is drawn as wide as its figure, with axis labels that don't touch, in letters of 12 px or more
    for figure in browser.execute_script(FIGURES):
        assert figure["box"] == figure["width"] and figure["paths"] >= 1 and figure["size"] >= 12
        assert all(a[1] < b[0] for a, b in zip(figure["labels"], figure["labels"][1:], strict=False)), figure
        assert len(figure["heights"]) >= 2 and all(b[0] <= a[1] + 3 for a, b in zip(figure["heights"], figure["heights"][1:], strict=False))
    smallest = "return Math.min(...[...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    assert browser.execute_script(smallest) >= 12
    assert ("http://" not in page.read_text().replace("http://www.w3.org/2000/svg", "")) and "https://" not in page.read_text()
    if "muon" in names:
        rows = browser.execute_script("return document.querySelectorAll('#layers tbody tr').length")
        assert rows == 12 and "Resumed after step 12" in browser.execute_script("return document.getElementById('beside').textContent")
        assert browser.execute_script("return document.querySelectorAll('#plans tbody tr').length") == 3


@pytest.mark.more("slow system")
def test_what_a_name_holds_can_not_break_the_page(runs: Path, tmp_path: Path, browser: Any) -> None:
    out = tmp_path / "<b>&amp;"
    shutil.copytree(runs / "adamw", out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines[-1]["reason"] = "</script><script>console.error('broken')</script>"
    lines[1]["loss"] = None  # not finite
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(out)]) == 0
    browser.get((out / "report.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelector('h1').textContent") == "<b>&amp;"
    assert "</script>" in browser.execute_script("return document.getElementById('state').textContent")
