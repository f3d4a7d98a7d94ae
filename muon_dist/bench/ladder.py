"""`muon-dist bench ladder`: GPTs of several widths trained on one machine, their spectra written as telemetry for `muon-dist fit`."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..example.small_gpt import GPT, read_text, windows
from ..optimizer import MuonDist
from ..routing import build_param_groups

CONTEXT, BATCH = 128, 16


def run(*, out: str, widths: list[int], layers: int, steps: int, lr: float, threads: int, seed: int) -> int:
    if len(set(widths)) < 2 or any(w < 8 or w % 8 for w in widths) or min(layers, steps, threads) < 1 or lr <= 0:
        raise ValueError(f"--widths needs two or more multiples of 8, and all other numbers must be positive; got {widths}")
    torch.set_num_threads(threads)
    text = read_text(None)
    folders = []
    for width in sorted(set(widths)):
        folder = Path(out) / f"width-{width}"
        if (folder / "spectrum.jsonl").exists():
            raise ValueError(f"{folder} holds a run already: choose another --out")
        torch.manual_seed(seed)
        model = GPT(layers=layers, width=width, heads=4, context=CONTEXT)
        groups = build_param_groups(model, split={"attn.qkv.weight": [width] * 3})
        every = max(2, steps // 15)
        optimizer = MuonDist(groups, lr=lr, weight_decay=0.1, ns_steps="adaptive", burn_in=0, measure_every=every, telemetry_dir=folder)
        started = time.perf_counter()
        recent: list[float] = []
        for step in range(steps):
            tokens, targets = windows(text, BATCH, CONTEXT, seed * 1_000_003 + step)
            loss = model(tokens, targets)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 20, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent = [*recent[-19:], loss.item()]
        size = sum(p.numel() for p in model.parameters())
        seconds = time.perf_counter() - started
        print(
            f"  width {width}: {size / 1e6:.2f} M parameters, {steps} steps, loss {sum(recent) / len(recent):.3f}, {seconds:.0f} s",
            flush=True,
        )
        folders.append(str(folder))
    print(f"\nNext: muon-dist fit {' '.join(folders)}")
    return 0
