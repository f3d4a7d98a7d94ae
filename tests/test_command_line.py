"""The commands and scripts as a user runs them: what they print, write and refuse."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from muon_dist import MuonDist
from muon_dist.bench.trace import parts, summary
from muon_dist.cli.main import main
from muon_dist.show.run_log import read_log

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "muon_dist.cli.main", *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def test_doctor_takes_a_real_two_rank_step_and_finds_it_right() -> None:
    result = command("doctor")
    assert result.returncode == 0, result.stderr
    assert "torch 2." in result.stdout and "gloo" in result.stdout and result.stdout.rstrip().endswith(": ok")


def test_doctor_fails_where_an_update_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from muon_dist.cli import doctor

    monkeypatch.setattr(doctor, "BOUND", dict.fromkeys(doctor.BOUND, -1.0))  # no update is that right
    assert doctor.run() == 1 and "WRONG" in capsys.readouterr().out


def test_inspect_finds_a_users_own_module(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text("import torch\nNet = lambda: torch.nn.Linear(4, 3)\nBroken = lambda: 1 / 0\n")
    script = str(Path(sys.executable).with_name("muon-dist"))
    for name, code, words in (("Net", 0, "3×4"), ("Broken", 2, "ZeroDivisionError")):
        result = subprocess.run([script, "inspect", f"mymodel:{name}"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == code and words in result.stdout + result.stderr


def test_inspect_tells_every_parameters_route_reason_view_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "models" / "gpt-5m.json")
    assert main(["inspect", config, "--json", str(tmp_path / "inspect.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "inspect.json").read_text())
    by_name = {p["name"]: p for p in written["parameters"]}
    assert by_name["blocks.0.attn.qkv.weight"]["matrices"] == [[256, 256]] * 3
    assert by_name["blocks.0.mlp.up.weight"]["scales"] == [pytest.approx(0.2 * 32)]
    assert by_name["lm_head.weight"]["route"] == "adamw" and "head" in by_name["lm_head.weight"]["reason"]
    assert all(p["name"] in printed and p["reason"] in printed for p in written["parameters"])


def test_the_config_of_the_quickstart_is_its_model() -> None:
    from muon_dist.example.small_gpt import GPT
    from muon_dist.planner.models import model_parameters

    model = GPT(layers=6, width=256, heads=4, context=256)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape for p in model_parameters("configs/models/gpt-5m.json")} == expected


def test_inspect_reads_a_module_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tests.test_routing:Model"]) == 0
    printed = capsys.readouterr().out
    assert "frozen" in printed and "stack of 3 matrices" in printed


def test_the_models_flops_are_those_of_the_experts_that_a_token_meets(tmp_path: Path) -> None:
    """On a small mixture of the shipped one's kind."""
    mixture = json.loads((ROOT / "configs" / "models" / "moe-1t.json").read_text())
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_experts": 24}
    heads = {"num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2, "vocab_size": 1000}
    config, out = tmp_path / "mixture.json", tmp_path / "plan.json"
    config.write_text(json.dumps({**mixture, **sizes, **heads}))
    assert main(["plan", str(config), "--dp", "1", "--tp", "4", "--tokens", "1000", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    idle = 2 * (24 - 8) * 3 * 256 * 64  # 16 of 24 experts in each of two layers
    assert plan["model_flops"] == pytest.approx(6 * 1000 * (plan["parameters"] - idle), rel=1e-9)
    assert sum(row["matrices"] for row in plan["forms"]) == len(plan["matrices"]) > 2 * 24 * 3


@pytest.mark.parametrize("config", ["llama-8b", "llama-70b", "gpt-5m", "gpt2-small", "gpt2-medium"])
def test_plan_writes_what_it_prints(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    path = str(ROOT / "configs" / "models" / f"{config}.json")
    assert main(["plan", path, "--dp", "4", "--tp", "2", "--zero", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    plan = json.loads(out.read_text())
    assert set(plan["matrices"][0]) == {"name", "shape", "owner", "flops"}
    assert set(plan["ranks"][0]) >= {"flops", "bytes_sent", "bytes_received", "state_bytes", "peak_bytes"}
    assert len(plan["ranks"]) == 8
    assert sum(r["flops"] for r in plan["ranks"]) == sum(m["flops"] for m in plan["matrices"])
    assert f"imbalance {plan['imbalance']:.3f}" in printed and plan["imbalance"] >= plan["imbalance_lower_bound"] >= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "nothere.json"), "can't read"),
        (("inspect", "no.such.module:Model"), "can't import"),
        (("inspect", "torch.nn:Linear"), "without arguments"),
        (("inspect", "Model"), "neither"),
        (("plan", "configs/models/llama-8b.json", "--dp", "0"), "at least 1"),
        (("plan", "configs/models/llama-8b.json", "--tokens", "0"), "at least 1"),
        (("plan", "configs/models/llama-8b.json", "--ns-steps", "0"), "at least 1"),
        (("plan", "configs/models/gpt-5m.json", "--json", "/no/such/folder/plan.json"), "No such file"),
        (("plan", "no.json", "--zero", "1"), "can't read"),
        (("bench", "training", "--seconds", "0"), "--seconds must be above 0"),
        (("bench", "training", "--variants", "six steps"), "there is no 'six steps': choose from"),
        (("bench", "training", "--device", "cuda"), "1 rank(s): this machine has"),
        (("bench", "probes", "--sizes", "0"), "at least 1"),
        (("bench", "step", "--pairs", "0"), "at least 1"),
        (("bench", "ns", "--shapes", "768by768"), "768x3072"),
        (("bench", "ns", "--dtype", "int8", "--threads", "1"), "not a dtype"),
        (("bench", "ns", "--device", "cpu", "--symmetric-kernels", "--threads", "1"), "needs a CUDA device"),
        (("bench", "step", "--device", "cuda", "--ranks", "999"), "999 rank(s): this machine has"),
        (("bench", "step", "--symmetric-kernels", "0"), "rows of a Gram matrix"),
        (("plan", "configs/models/llama-8b.json", "--bucket-mb", "0"), "bucket_mb must be a positive number"),
        (("bench", "dion", "--ranks", "1"), "2 or more" if find_spec("dion") else "needs dion"),
    ],
)
def test_wrong_arguments_end_with_one_clear_line(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told and told.startswith(f"muon-dist {arguments[0]}: ")


def test_a_command_that_is_refused_ends_with_its_line_and_status_2() -> None:
    result = command("plan", "no.json", "--zero", "1")
    assert result.returncode == 2 and "can't read" in result.stderr and "Traceback" not in result.stderr


def test_bench_ns_measures_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ns.json"
    assert main(["bench", "ns", "--shapes", "40x200", "200x40", "48x48", "--rounds", "2", "--threads", "1", "--json", str(out)]) == 0
    assert capsys.readouterr().out.count("Gram 1+2+2") == 2
    written = json.loads(out.read_text())
    assert [s["segments"] for s in written["shapes"]] == [[1, 2, 2], [1, 2, 2], [1] * 5]
    assert all(len(times) == 2 and min(times) > 0 for s in written["shapes"] for times in s["seconds"].values())


@pytest.mark.parametrize("stage", ["1", pytest.param("3", marks=pytest.mark.more("repeat"))])
def test_bench_deepspeed_counts_what_both_sides_orthogonalise(stage: str, tmp_path: Path) -> None:
    out = tmp_path / "deepspeed.json"
    small = ("--width", "64", "--layers", "1", "--rounds", "1", "--warmup", "1")
    result = command("bench", "deepspeed", "--ranks", "2", "--stages", stage, *small, "--json", str(out))
    assert result.returncode == 0, result.stderr
    for run in json.loads(out.read_text())["runs"]:
        assert run["calls"]["MuonDist, 5 steps"] == 4 and run["steps"]["MuonDist, 5 steps"] == 5  # each of the four matrices once
        assert all(len(times) == 1 and min(times) > 0 for times in run["seconds"].values())


def test_bench_step_measures_pairs_and_draws_a_timeline(tmp_path: Path) -> None:
    out, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    small = ("--model", "configs/models/gpt-5m.json", "--layers", "1", "--pairs", "2")
    result = command("bench", "step", *small, "--ranks", "2", "--trace", str(trace), "--json", str(out))
    assert result.returncode == 0, result.stderr
    runs = json.loads(out.read_text())["runs"]
    assert [(r["ranks"], len(r["seconds"]["five steps"])) for r in runs] == [(2, 2)]  # tests/gpu/test_command.py has one rank
    assert all(f"{ratio:.2f}×" in result.stdout for r in runs for ratio in r["ratio"].values())
    assert all(r["imbalance"]["five steps"] >= 1 and r["steps"] >= 2 for r in runs)
    parts, shares = runs[0]["parts"], re.search(r"2 ranks, five steps, of one step's .* ms: momentum", result.stdout)
    assert shares and parts["travel"] > 0 and 0 < parts["Newton–Schulz"] < parts["all"]
    events = json.loads((tmp_path / "trace-2.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1} and "one step on 2 ranks" in result.stdout
    for rank in (0, 1):
        names = [e["name"].partition(" ")[0] for e in events if e["pid"] == rank]
        assert {"muon_dist::momentum", "muon_dist::start_gather", "muon_dist::newton_schulz", "muon_dist::apply"} <= set(names)
        assert names.count("gloo:all_to_all") == 2


def test_a_timeline_counts_what_is_travelling_beside_newton_schulz(tmp_path: Path) -> None:
    spans = [("gloo:all_to_all", 0, 10), ("gloo:all_to_all", 30, 20), ("muon_dist::newton_schulz 1x2x2", 5, 15), ("aten::mm", 6, 3)]
    spans += [("muon_dist::newton_schulz 1x2x2", 20, 20), ("muon_dist::apply", 60, 5)]  # beside: 5 of the first 10, 10 of the other 20
    events = [{"ph": "X", "name": name, "ts": at, "dur": lasts, "pid": 77, "cat": "cpu_op"} for name, at, lasts in spans]
    (tmp_path / "trace-0.json").write_text(json.dumps({"traceEvents": events}))
    assert "Newton–Schulz 0.0 ms, travelling 0.0 ms, 50% of it beside" in summary(str(tmp_path), 1, str(tmp_path / "out.json"))
    assert "aten::mm" not in (tmp_path / "out.json").read_text()


def test_the_parts_of_a_step_are_the_devices_where_there_is_one(tmp_path: Path) -> None:
    """A range is in the timeline when the host queued it, and when the device did it."""
    host = [("muon_dist::momentum", 0, 5), ("muon_dist::newton_schulz 2x4x4", 5, 5), ("muon_dist::start_gather", 10, 2)]
    device = [("muon_dist::momentum", 100, 10), ("muon_dist::newton_schulz 2x4x4", 110, 70), ("muon_dist::apply", 180, 20)]
    events = [{"ph": "X", "name": name, "ts": at, "dur": lasts, "cat": "user_annotation"} for name, at, lasts in host]
    (tmp_path / "trace-0.json").write_text(json.dumps({"traceEvents": events}))
    assert parts(str(tmp_path), 0) == {"momentum": 0.005, "travel": 0.002, "Newton–Schulz": 0.005, "apply": 0, "AdamW": 0, "all": 0.012}
    events += [{"ph": "X", "name": name, "ts": at, "dur": lasts, "cat": "gpu_user_annotation"} for name, at, lasts in device]
    (tmp_path / "trace-0.json").write_text(json.dumps({"traceEvents": events}))
    assert parts(str(tmp_path), 0) == {"momentum": 0.01, "travel": 0, "Newton–Schulz": 0.07, "apply": 0.02, "AdamW": 0, "all": 0.1}


def quickstart(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "launch/quickstart.sh", *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def test_the_quickstart_trains_and_draws(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.write_text("to be or not to be, that is the question\n" * 200)
    out = tmp_path / "out"
    result = quickstart("--steps", "2", "--data", str(data), "--nproc", "1", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    logs = {name: read_log(str(out / name)) for name in ("muon_dist", "adamw")}
    for name, log in logs.items():
        assert log.starts[0]["optimizer"] == name and log.starts[0]["environment"]["world_size"] == 1
        assert (
            log.steps[-1]["step"] == 2
            and log.steps[-1]["skipped_steps"] == log.steps[-1]["skipped_updates"] == 0
            and log.state() == "finished"
        )
    # one momentum for 4.7 M elements in matrices, two moments for 0.2 M in the rest, against two moments for all
    assert logs["muon_dist"].plan["state_bytes"] < 0.53 * logs["adamw"].plan["state_bytes"]
    assert "<!doctype html>" in (out / "report.html").read_text()
    assert "step 2/2" in result.stdout and "optimizer share" in result.stdout


@pytest.mark.more("repeat")
def test_the_quickstart_begins_anew_where_it_has_run_before(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.write_text("to be or not to be, that is the question\n" * 200)
    for _ in range(2):
        result = quickstart("--steps", "2", "--data", str(data), "--nproc", "1", "--out", str(tmp_path / "out"))
        assert result.returncode == 0 and "going on from" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps",), "needs a value"),
        (("--steps", "many"), "positive number"),
        (("--nproc", "0"), "positive number"),
        (("--data", "/no/such/file"), "is not a file"),
        (("--data", ".gitignore"), "too short"),
        (("--speed", "9"), "unknown option"),
    ],
)
def test_the_quickstart_refuses_what_it_does_not_know(arguments: tuple[str, ...], words: str) -> None:
    result = quickstart(*arguments)
    assert result.returncode == 2 and words in result.stderr


def trained(folder: Path, width: int) -> None:
    """A short run with telemetry, of two blocks."""
    torch.manual_seed(0)
    shapes = {"q": (width, width), "up": (4 * width, width)}
    named = [(f"blocks.{k}.{kind}.weight", torch.nn.Parameter(torch.randn(s))) for k in range(2) for kind, s in shapes.items()]
    optimizer = MuonDist(named, burn_in=0, measure_every=2, telemetry_dir=folder)
    for step in range(12):
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def test_spectrum_shows_a_run_and_fit_its_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (24, 40, 64):
        trained(tmp_path / str(width), width)
    assert main(["spectrum", str(tmp_path / "24"), "--json", str(tmp_path / "last.json")]) == 0
    text = capsys.readouterr().out
    assert "blocks.1.up.weight" in text and "the FLOPs of five Jordan steps" in text
    assert (tmp_path / "24" / "spectrum.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "last.json").read_text())) == 4

    runs = [str(tmp_path / str(width)) for width in (24, 40, 64)]
    assert main(["fit", *runs, "--csv", str(tmp_path / "law.csv"), "--picture", str(tmp_path / "law.png")]) == 0
    text = capsys.readouterr().out
    # random matrices: (1/r)^½ and M ~ r², so α is a quarter against parameters and nothing is left rank-normalised
    law = next(line.split() for line in text.splitlines() if line.startswith("up ") and " 1.00 " in line)
    assert float(law[4]) == pytest.approx(0.25, abs=0.05)
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert main(["fit", str(tmp_path / "law.csv")]) == 0
    assert law[4] in capsys.readouterr().out
    assert main(["fit", runs[0]]) == 2 and "two or more sizes" in capsys.readouterr().err
    assert main(["spectrum", str(tmp_path)]) == 2 and "has no measurements" in capsys.readouterr().err


def test_plan_with_laws_gives_steps_per_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "models" / "llama-8b.json")
    assert main(["plan", config, "--dp", "4", "--laws", "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "accuracy jordan4" in text and "the FLOPs of five Jordan steps" in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    last = {r["kind"]: r for r in plan["predicted"] if r["depth"] == 1}
    assert set(last) == {"q", "k", "v", "o", "up", "down"}
    assert all(r["steps"][0] >= 2 for r in plan["predicted"])
    assert main(["plan", config, "--dp", "4", "--laws", "--accuracy", "jordan5", "--json", str(tmp_path / "five.json")]) == 0
    assert "accuracy jordan5" in capsys.readouterr().out
    assert all(r["error"] <= r["five"] for r in json.loads((tmp_path / "five.json").read_text())["predicted"])
    assert main(["plan", config, "--dp", "4", "--laws", "--coverage", "0.9", "--json", str(tmp_path / "covered.json")]) == 0
    assert "coverage 0.9" in capsys.readouterr().out
    covered = json.loads((tmp_path / "covered.json").read_text())
    assert sum(m["flops"] for m in covered["matrices"]) > sum(m["flops"] for m in plan["matrices"])
    per_matrix = {m["flops"] for m in covered["matrices"] if m["shape"] == [4096, 4096]}
    assert len(per_matrix) > 1, "all layers got the same schedule"
    assert main(["plan", config, "--laws", "--coverage", "2"]) == 2 and "coverage" in capsys.readouterr().err
    assert main(["plan", config, "--laws", "--coverage", "0.9", "--accuracy", "jordan5"]) == 2 and "two ways" in capsys.readouterr().err


def test_benches_of_adaptivity_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "momentum.safetensors")
    save_file({f"m{k}": torch.randn(40, 60) * torch.logspace(0, -k, 40)[:, None] for k in range(3)}, data)
    assert main(["bench", "adaptive", "--data", data, "--coverage", "0.9", "--threads", "1", "--json", str(tmp_path / "a.json")]) == 0
    found = {r["variant"]: r for r in json.loads((tmp_path / "a.json").read_text())}
    five, chosen = found["five Jordan steps"], found["accuracy jordan5"]
    assert five["flops"] == five["largest_over_five"] == 1.0 and len(found) == 7
    assert found["accuracy jordan4"]["flops_of_the_form"] <= chosen["flops_of_the_form"]
    assert chosen["flops_of_the_form"] <= five["flops_of_the_form"] and chosen["largest_over_five"] <= 1.1
    assert found["coverage 0.9, without deflation"]["lowest"] >= 0.85
    assert main(["bench", "spectrum", "--data", data, "--threads", "1"]) == 0
    assert "Golub–Kahan, 24 iterations" in capsys.readouterr().out
    small = ["--horizons", "4", "8", "--betas", "1.5", "--threads", "1", "--picture", str(tmp_path / "p.png")]
    assert main(["bench", "associative-memory", *small]) == 0
    assert "theory" in capsys.readouterr().out and (tmp_path / "p.png").exists()
    assert (
        main(
            [
                "bench",
                "ladder",
                "--out",
                str(tmp_path / "ladder"),
                "--widths",
                "16",
                "32",
                "--steps",
                "4",
                "--layers",
                "1",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    assert (tmp_path / "ladder" / "width-32" / "spectrum.jsonl").exists()
    small = ["--steps", "3", "--seeds", "0", "1", "--width", "16", "24", "--layers", "1", "--batch", "2", "--context", "16"]
    small += ["--lr", "0.01", "--adam-lr", "0.01"]
    small += ["--variants", "five Jordan steps", "adaptive steps", "AdamW", "--threads", "1", "--results", str(tmp_path / "runs.jsonl")]
    assert main(["bench", "training", *small]) == 0
    text = capsys.readouterr().out
    assert "adaptive steps" in text and "width 24" in text
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2 * 3 * 2 and all(r["flops"] == 1.0 for r in runs if r["variant"] == "five Jordan steps")
    assert all(r["flops"] < 1.0 and 0.2 < r["rms"] < 1.3 for r in runs if r["variant"] == "adaptive steps")
    assert main(["bench", "training", *small, "--equal-rms"]) == 0  # what was run is not run again
    again = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert again[: len(runs)] == runs and [r["equal_rms"] for r in again[len(runs) :]] == [True] * 4
    capsys.readouterr()
    assert main(["bench", "overhead", "--width", "16", "--layers", "1", "--cycles", "1", "--threads", "1"]) == 0
    assert "bytes per measurement" in capsys.readouterr().out
    assert main(["bench", "adaptive", "--data", str(tmp_path / "none.safetensors"), "--threads", "1"]) == 2
    assert "can't read" in capsys.readouterr().err
