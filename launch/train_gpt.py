"""Train a small byte-level GPT with MuonDist under FSDP2 or in DeepSpeed, and the same model with AdamW beside it.

    torchrun --standalone --nproc_per_node 2 launch/train_gpt.py --steps 100 --out runs/quickstart
    deepspeed --num_gpus 2 launch/train_gpt.py --engine deepspeed --deepspeed_config configs/deepspeed/zero2.json

Text: the Python standard library's own sources, or `--data FILE`. Every rank reads its own random windows. Rank 0 prints a line
of progress (loss, tokens/s, share of the step that the optimizer takes), and at the end a table of both runs and one of what
each matrix got; it writes `results.json`, `loss.png`, `spectrum.png` and the measurements (`telemetry/`) to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from engines import telemetry_folder, with_deepspeed, with_fsdp2
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dist.bench.small_gpt import GPT, read_text, windows
from muon_dist.cli import spectrum


@dataclass
class Run:
    """What one optimizer did: per step the mean loss over ranks, seconds, and seconds inside `optimizer.step()`."""

    optimizer: str
    lr: float
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    state_bytes_per_rank: int = 0
    skipped_steps: int = 0

    def summary(self) -> dict[str, float]:
        """Means without the first step, which allocates and binds."""
        seconds, inside = self.seconds[1:] or self.seconds, self.optimizer_seconds[1:] or self.optimizer_seconds
        last = self.loss[-10:]
        return {
            "final_loss": sum(last) / len(last),
            "tokens_per_second": self.tokens_per_step * len(seconds) / sum(seconds),
            "optimizer_share": sum(inside) / sum(seconds),
        }


def train(name: str, text: Tensor, device: torch.device, options: argparse.Namespace) -> Run:
    torch.manual_seed(options.seed)
    model = GPT(layers=options.layers, width=options.width, heads=options.heads, context=options.context)
    engine = {"torch": with_fsdp2, "deepspeed": with_deepspeed}[options.engine](name, model, device, options)
    run = Run(optimizer=name, lr=engine.lr, tokens_per_step=engine.batch * options.context * engine.shards)
    for step in range(options.steps):
        started = time.perf_counter()
        tokens, targets = windows(text, engine.batch, options.context, options.seed + step * engine.shards + engine.shard)
        loss, seconds = engine.take_step(tokens.to(device), targets.to(device))
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        run.loss.append(mean.item() / dist.get_world_size())
        run.optimizer_seconds.append(seconds)
        run.seconds.append(time.perf_counter() - started)
        if dist.get_rank() == 0:
            progress(run, step, options.steps)
    held = (v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    run.state_bytes_per_rank = sum(t.numel() * t.element_size() for t in (v.to_local() if isinstance(v, DTensor) else v for v in held))
    run.skipped_steps = getattr(engine.optimizer, "skipped_steps", 0)
    return run


def progress(run: Run, step: int, steps: int) -> None:
    """One line that is written over on a terminal; every tenth step a line of its own elsewhere."""
    terminal = sys.stdout.isatty()
    if not terminal and (step + 1) % 10 and step + 1 != steps:
        return
    seconds, inside = run.seconds[-10:], run.optimizer_seconds[-10:]
    rate = run.tokens_per_step * len(seconds) / sum(seconds)
    share = sum(inside) / sum(seconds)
    line = f"{run.optimizer:8}  step {step + 1:4}/{steps}  loss {run.loss[-1]:.3f}  {rate:,.0f} tokens/s  optimizer {share:.0%}"
    print(f"\r{line}" if terminal else line, end="\n" if step + 1 == steps or not terminal else "", flush=True)


def report(runs: list[Run], options: argparse.Namespace) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"options": vars(options), "world_size": dist.get_world_size(), "runs": [{**asdict(r), **r.summary()} for r in runs]}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{'optimizer':10}{'lr':>8}{'loss':>8}{'tokens/s':>11}{'optimizer share':>17}{'state per rank':>16}{'skipped':>9}")
    for r in runs:
        s = r.summary()
        print(
            f"{r.optimizer:10}{r.lr:8g}{s['final_loss']:8.3f}{s['tokens_per_second']:11,.0f}{s['optimizer_share']:17.1%}"
            f"{r.state_bytes_per_rank / 1e6:13.1f} MB{r.skipped_steps:9}"
        )
    print("loss: mean of the last ten steps. optimizer share: of the step's time, the first step left out.")
    draw(runs, out / "loss.png")
    print(f"written: {out / 'results.json'}, {out / 'loss.png'}")
    if (telemetry_folder(options) / "spectrum.jsonl").exists():
        print("\nwhat each matrix got, as measured last:")
        spectrum.run(str(telemetry_folder(options)), str(out / "spectrum.png"), None)


def draw(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run, color in zip(runs, ("#c0392b", "#34495e"), strict=False):
        smooth = [sum(run.loss[max(0, k - 4) : k + 1]) / len(run.loss[max(0, k - 4) : k + 1]) for k in range(len(run.loss))]
        steps = range(1, len(run.loss) + 1)
        axes.plot(steps, run.loss, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=color, linewidth=2, label=f"{run.optimizer}, lr {run.lr:g}", marker="o" if len(steps) < 10 else None)
    axes.set(xlabel="step", ylabel="cross-entropy per byte (nats)", title="Byte-level GPT, mean over ranks; bold: mean of five steps")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT with MuonDist, and with AdamW beside it.")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="torch", help="FSDP2, or a DeepSpeed engine")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="for --engine deepspeed: batch, schedule, clipping and optimizer")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default 100)")
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: the Python standard library's sources)")
    parser.add_argument("--out", metavar="DIR", default="runs/quickstart", help="where results.json and loss.png go")
    parser.add_argument("--optimizers", nargs="+", default=["MuonDist", "AdamW"], choices=["MuonDist", "AdamW"])
    parser.add_argument("--lr", type=float, help="peak learning rate of MuonDist (default 4e-3, or as the DeepSpeed config says)")
    parser.add_argument("--adamw-lr", type=float, default=5e-4, help="peak learning rate of the AdamW run")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, help="windows per rank and step (default 4; the DeepSpeed config says it there)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.engine == "deepspeed":
        if options.deepspeed_config is None:
            parser.error("--engine deepspeed needs --deepspeed_config FILE, such as configs/deepspeed/zero2.json")
        if options.batch is not None:
            parser.error("--batch is said by train_micro_batch_size_per_gpu in the DeepSpeed config")
    elif options.deepspeed_config is not None:
        parser.error("--deepspeed_config needs --engine deepspeed")
    options.batch = 4 if options.batch is None else options.batch
    for key in ("steps", "layers", "width", "heads", "context", "batch"):
        if getattr(options, key) < 1:
            parser.error(f"--{key} must be at least 1, got {getattr(options, key)}")
    if options.width % options.heads:
        parser.error(f"--heads {options.heads} does not divide --width {options.width}")
    if options.data is not None:
        if not Path(options.data).is_file():
            parser.error(f"--data {options.data} is not a file")
        if Path(options.data).stat().st_size < options.context + 2:
            parser.error(f"--data {options.data} is too short: a window of --context {options.context} needs {options.context + 2} bytes")
    return options


def main() -> None:
    options = parse()
    text = read_text(options.data)
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun or deepspeed, e.g. torchrun --standalone --nproc_per_node 2 launch/train_gpt.py")
    device, gpus = torch.device("cpu"), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])  # torchrun, deepspeed
    if gpus >= here:  # NCCL wants a device for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif gpus and os.environ["RANK"] == "0":
        print(f"{here} processes but {gpus} GPU(s) here: training on the CPU; --nproc {gpus} would use the GPU(s)")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() == 0:
        (telemetry_folder(options) / "spectrum.jsonl").unlink(missing_ok=True)  # of an earlier run
        model = GPT(layers=options.layers, width=options.width, heads=options.heads, context=options.context)
        size = sum(p.numel() for p in model.parameters())
        how = "FSDP2" if options.engine == "torch" else f"DeepSpeed, {options.deepspeed_config}"
        print(
            f"{size / 1e6:.1f} M parameters, {len(text) / 1e6:.1f} MB of text, {dist.get_world_size()} ranks on {device.type}, {how}",
            flush=True,
        )
    runs = [train(name, text, device, options) for name in options.optimizers]
    if dist.get_rank() == 0:
        report(runs, options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
