"""`muon-dist bench step`: the time of an optimizer step, MuonDist beside a peer, in pairs within one run.

One rank: plain parameters, against torch.optim.Muon. Several: FSDP2-style row shards, against a Muon that gathers every matrix
on every rank. Both sides do five Jordan steps in fp32 on the same matrices with the same gradients.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from ..cli.models import model_parameters
from ..cli.table import table, write_json
from ..optimizer import MuonDist
from ..polar.matrix_view import matrices_of
from .peers import NaiveShardedMuon, TorchMuon

# GPT-2 small, so that the benchmark runs from any directory: (768, 3072) and (3072, 768) MLPs, q, k, v and the output
GPT2_SMALL_LAYER = ((768, 768),) * 4 + ((3072, 768), (768, 3072))


def run(model: str | None, *, layers: int | None, ranks: list[int], pairs: int, threads: int | None, json_path: str | None) -> int:
    if pairs < 1 or min(ranks) < 1 or (threads is not None and threads < 1) or (layers is not None and layers < 1):
        raise ValueError(f"--pairs, --ranks, --threads and --layers must be at least 1, got {pairs}, {ranks}, {threads} and {layers}")
    if model is None:
        model, shapes = "GPT-2 small", list(GPT2_SMALL_LAYER * (layers or 12))
    else:
        shapes = [
            m.shape
            for p in model_parameters(model)
            if p.route.view is not None and (layers is None or _layer(p.name) < layers)
            for m in matrices_of(p.shape, p.route.view, p.name)
        ]
    if not shapes:
        raise ValueError(f"{model} has no matrices for Muon in its first {layers} layers")
    cores = os.cpu_count() or 1
    print(f"{model}: {len(shapes)} matrices, {sum(m * n for m, n in shapes) / 1e6:.1f} M elements; {pairs} pairs after one warm-up")
    print(f"torch {torch.__version__}, {platform.machine()}, {cores} cores; fp32 on both sides, five Jordan steps", flush=True)
    rows, records = [], []
    for n in ranks:
        per_rank = threads or max(1, cores // n)
        with tempfile.TemporaryDirectory() as folder:
            spawn(_measure, args=(n, folder, shapes, pairs, per_rank), nprocs=n)
            record: dict[str, Any] = torch.load(os.path.join(folder, "times"))
        ratios = [a / b for a, b in record["seconds"]]
        ours, theirs = (statistics.median(times) for times in zip(*record["seconds"], strict=True))
        record.update(ranks=n, threads=per_rank, ratio=statistics.median(ratios), median_seconds=[ours, theirs])
        records.append(record)
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
        rows.append((n, record["peer"], f"{ours * 1e3:.0f} ms", f"{theirs * 1e3:.0f} ms", f"{record['ratio']:.2f}×", spread))
        print(f"  {n} rank{'s' if n > 1 else ''} done", flush=True)
    print()
    print(table(("ranks", "peer", "MuonDist", "peer's step", "ratio", "least … most"), rows, right=(0, 2, 3, 4, 5)))
    print("\nratio: MuonDist's time over the peer's, median of the pairs; below 1 MuonDist is faster.")
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": cores}
    write_json(
        json_path, {**machine, "model": model, "layers": layers, "shapes": [list(s) for s in shapes], "pairs": pairs, "runs": records}
    )
    return 0


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _measure(rank: int, world: int, folder: str, shapes: list[tuple[int, int]], pairs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        result = []
        for shape in shapes:
            value, gradient = torch.randn(shape), torch.randn(shape)
            if world > 1:
                value, gradient = (distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (value, gradient))
            p = nn.Parameter(value)
            p.grad = gradient
            result.append(p)
        return result

    mine = MuonDist([{"params": parameters(), "algorithm": "muon"}], lr=1e-3, ns_steps=5)
    peer = (TorchMuon if world == 1 else NaiveShardedMuon)(parameters())
    seconds = []
    for _ in range(pairs + 1):
        pair = []
        for optimizer in (mine, peer):
            dist.barrier()
            started = time.perf_counter()
            optimizer.step()
            dist.barrier()
            pair.append(time.perf_counter() - started)
        seconds.append(tuple(pair))
    if rank == 0:
        torch.save({"peer": peer.name, "seconds": seconds[1:]}, os.path.join(folder, "times"))
    dist.destroy_process_group()
