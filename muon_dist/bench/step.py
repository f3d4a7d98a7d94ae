"""`muon-dist bench step` and `bench dion`: the time of an optimizer step, MuonDist beside a peer, in pairs within one run.

One rank: plain parameters, against torch.optim.Muon, and against torch's fused AdamW. Several: row shards as FSDP2 makes them, against a
Muon that gathers every matrix on every rank, or against dion's. All do five Jordan steps on the same matrices with the same gradients,
whose singular values follow the shipped scaling laws; MuonDist is timed with adaptive steps as well, after every matrix has been
measured. What its step is made of is read off a timeline of one.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from ..groups import PlanOptions
from ..optimizer import MuonDist
from ..planner.models import model_parameters
from ..polar.matrix_view import matrices_of
from ..run.bootstrap import end_process_group
from ..show.table import table, write_json
from ..spectrum.scaling_law import ScalingLaws, layer_kind, relative_depths, shipped_laws
from .peers import DionMuon, NaiveShardedMuon, TorchMuon
from .timing import device_name, device_of, host_seconds, spread, times_in_turns
from .trace import parts, summary, traced

# GPT-2 small, so that the benchmark runs from any directory
GPT2_SMALL_LAYER = {**dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.o"), (768, 768)), "mlp.up": (3072, 768), "mlp.down": (768, 3072)}
WARM_UP = 16  # steps of adaptive schedules before they are timed, while measurements are dense
FIVE, ADAPTIVE, ADAMW = "five steps", "adaptive", "AdamW (fused)"
CPU = torch.device("cpu")

Shapes = list[tuple[str, tuple[int, int]]]  # a name, which tells the kind of layer and its depth, and rows × cols


def run(
    model: str | None,
    *,
    layers: int | None,
    ranks: list[int],
    pairs: int,
    threads: int | None,
    dtype: str,
    device: str,
    options: PlanOptions,
    trace: str | None,
    json_path: str | None,
    dion: bool = False,
) -> int:
    if pairs < 1 or min(ranks) < 1 or (threads is not None and threads < 1) or (layers is not None and layers < 1):
        raise ValueError(f"--pairs, --ranks, --threads and --layers must be at least 1, got {pairs}, {ranks}, {threads} and {layers}")
    if dion:
        DionMuon.check()
        if min(ranks) < 2:
            raise ValueError("dion is measured on sharded parameters: give --ranks of 2 or more")
    shapes = _gpt2_small(layers or 12) if model is None else _shapes_of(model, layers)
    model = model or "GPT-2 small"
    if not shapes:
        raise ValueError(f"{model} has no matrices for Muon in its first {layers} layers")
    on, cores = device_of(device, max(ranks)), os.cpu_count() or 1
    options.products_on(device)  # raises here, and not on a rank
    print(f"{model}: {len(shapes)} matrices, {sum(m * n for _, (m, n) in shapes) / 1e6:.1f} M elements; {pairs} pairs after one warm-up")
    print(f"torch {torch.__version__}, {platform.machine()}, {cores} cores, {device_name(on)}")
    print(f"{dtype} on both sides, five Jordan steps at the peer", flush=True)
    rows, records, notes = [], [], []
    for n in ranks:
        per_rank = threads or max(1, cores // n)
        peer = "dion" if dion else "torch" if n == 1 else "naive"
        with tempfile.TemporaryDirectory() as folder:
            arguments = (n, folder, per_rank, device, _measure, shapes, pairs, peer, dtype, options)
            spawn(on_rank, args=arguments, nprocs=n)
            record: dict[str, Any] = torch.load(os.path.join(folder, "record"))
            if trace is not None:
                notes.append(summary(folder, n, f"{trace.removesuffix('.json')}-{n}.json"))
        record.update(ranks=n, threads=per_rank, ratio={}, median_seconds={k: statistics.median(v) for k, v in record["seconds"].items()})
        for name in (FIVE, ADAPTIVE):
            ratios = _ratios(record, name, "peer")
            record["ratio"][name] = statistics.median(ratios)
            steps = f" ({record['steps']:.1f})" if name == ADAPTIVE else ""
            rows.append(
                (
                    n,
                    name + steps,
                    record["peer"],
                    *(f"{record['median_seconds'][k] * 1e3:.0f} ms" for k in (name, "peer")),
                    f"{record['ratio'][name]:.2f}×",
                    f"{min(ratios):.2f} … {max(ratios):.2f}",
                    f"{record['imbalance'][name]:.2f}",
                )
            )
        records.append(record)
        notes.append(_made_of(record))
        print(f"  {n} rank{'s' if n > 1 else ''} done", flush=True)
    print()
    heads = ("ranks", "MuonDist", "peer", "MuonDist's step", "peer's step", "ratio", "least … most", "imbalance")
    print(table(heads, rows, right=(0, 3, 4, 5, 6, 7)))
    print(
        "\nratio: MuonDist's time over the peer's, median of the pairs; below 1 MuonDist is faster. adaptive: with its mean number of\n"
        "steps. imbalance: the busiest owner's FLOPs over what is possible, the mean of the ranks or the largest matrix."
    )
    print("\n".join(notes))
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": cores, "device": device_name(on)}
    listed = [list(shape) for _, shape in shapes]
    write_json(
        json_path,
        {
            **machine,
            "model": model,
            "layers": layers,
            "shapes": listed,
            "dtype": dtype,
            **asdict(options),
            "pairs": pairs,
            "runs": records,
        },
    )
    return 0


def _made_of(record: dict[str, Any]) -> str:
    """What the figures of one number of ranks say beside the ratios."""
    median, made = record["median_seconds"], record["parts"]
    shares = ", ".join(f"{name} {value / made['all']:.0%}" for name, value in made.items() if name != "all")
    ranks = "1 rank" if record["ranks"] == 1 else f"{record['ranks']} ranks"
    lines = [f"\n{ranks}, five steps, of one step's {made['all']:.1f} ms: {shares}"]
    host = statistics.median(record["host_seconds"])
    lines.append(f"the host is done with a step after {host * 1e3:.1f} ms; all of it takes {median[FIVE] * 1e3:.1f} ms")
    if ADAMW in median:
        over = ", ".join(f"{name} {spread(_ratios(record, name, ADAMW))}" for name in (FIVE, ADAPTIVE, "peer"))
        lines.append(f"over torch's fused AdamW on the same parameters ({median[ADAMW] * 1e3:.2f} ms): {over}")
    return "\n".join(lines)


def _ratios(record: dict[str, Any], name: str, peer: str) -> list[float]:
    return [a / b for a, b in zip(record["seconds"][name], record["seconds"][peer], strict=True)]


def _gpt2_small(layers: int) -> Shapes:
    return [(f"blocks.{k}.{kind}.weight", shape) for k in range(layers) for kind, shape in GPT2_SMALL_LAYER.items()]


def _shapes_of(model: str, layers: int | None) -> Shapes:
    result: Shapes = []
    for p in model_parameters(model):
        if p.route.view is not None and (layers is None or _layer(p.name) < layers):
            matrices = matrices_of(p.shape, p.route.view, p.name)
            for k, m in enumerate(matrices):
                kind = layer_kind(p.name, k, len(matrices))
                result.append((p.name if len(matrices) == 1 else f"{p.name}.{k}.{kind}_proj.weight", m.shape))
    return result


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def gradients(shapes: Shapes, device: torch.device = CPU) -> list[Tensor]:
    """Gradients with the singular values that the shipped scaling laws predict, and random singular vectors; the same on all ranks."""
    laws, generator = shipped_laws(), torch.Generator(device).manual_seed(1)
    result = []
    for (name, (m, n)), depth in zip(shapes, relative_depths([name for name, _ in shapes]), strict=True):
        rank = min(m, n)
        left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator, device=device))[0] for size in (m, n))
        result.append((left * singular_values(laws, layer_kind(name), depth, rank).to(device)) @ right.mT)
    return result


def singular_values(laws: ScalingLaws, kind: str | None, depth: float, rank: int) -> Tensor:
    """(rank,), descending: between the quantiles that are known, and beyond the outer ones, ln σ is linear in the share of directions."""
    quantiles = sorted((q, sigma) for q, (sigma, _) in laws.quantiles(kind, depth, rank).items())
    at, logs = np.array([q for q, _ in quantiles]), np.log([sigma for _, sigma in quantiles])
    share = (np.arange(rank) + 0.5) / rank
    value = np.interp(share, at, logs)
    value = np.where(share < at[0], logs[0] + (share - at[0]) * (logs[1] - logs[0]) / (at[1] - at[0]), value)
    value = np.where(share > at[-1], logs[-1] + (share - at[-1]) * (logs[-1] - logs[-2]) / (at[-1] - at[-2]), value)
    return torch.from_numpy(np.exp(value)).to(torch.float32)


def on_rank(rank: int, world: int, folder: str, threads: int, device_type: str, measure: Callable[..., None], *arguments: Any) -> None:
    """Run a measurement as one rank of a process group, with a folder that all ranks share; each rank has a GPU of its own, if any."""
    torch.set_num_threads(threads)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    measure(rank, world, folder, device, *arguments)
    end_process_group()


def _measure(
    rank: int,
    world: int,
    folder: str,
    device: torch.device,
    shapes: Shapes,
    pairs: int,
    peer_name: str,
    dtype: str,
    options: PlanOptions,
) -> None:
    mesh = init_device_mesh(device.type, (world,))
    torch.manual_seed(0)
    values, grads = [torch.randn(shape, device=device) for _, shape in shapes], gradients(shapes, device)

    def parameters() -> list[tuple[str, nn.Parameter]]:
        result = []
        for (name, _), value, gradient in zip(shapes, values, grads, strict=True):
            if world > 1:
                value, gradient = (distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (value, gradient))
            p = nn.Parameter(value.clone())
            p.grad = gradient
            result.append((name, p))
        return result

    def ours(**more: Any) -> MuonDist:
        if world == 1:
            more["placement"] = "owner"
        more = {**asdict(options), "compute_dtype": dtype, "wire_dtype": dtype, **more}
        return MuonDist([{"params": parameters(), "algorithm": "muon"}], lr=1e-3, **more)

    five, adaptive = ours(ns_steps=5), ours(ns_steps="adaptive")
    tensors = [p for _, p in parameters()]
    half = dtype == "bf16"
    peer: TorchMuon | NaiveShardedMuon | DionMuon
    if peer_name == "dion":
        peer = DionMuon(tensors, mesh, half=half)
    else:
        peer = (TorchMuon if peer_name == "torch" else NaiveShardedMuon)(tensors, half=half)
    for _ in range(WARM_UP):
        adaptive.step()
    sides: dict[str, Callable[[], Any]] = {FIVE: five.step, ADAPTIVE: adaptive.step, "peer": peer.step}
    if world == 1:
        sides[ADAMW] = torch.optim.AdamW([p for _, p in parameters()], lr=1e-3, fused=True).step
    seconds = times_in_turns(sides, pairs, device)
    host = [host_seconds(five.step, device) for _ in range(pairs)]
    traced(five.step, folder, rank)
    if rank == 0:
        imbalance = {name: _imbalance(optimizer) for name, optimizer in ((FIVE, five), (ADAPTIVE, adaptive))}
        steps = statistics.mean(len(schedule) for _, schedule in adaptive.schedules.values())
        found = {"seconds": seconds, "host_seconds": host, "parts": parts(folder, rank), "imbalance": imbalance, "steps": steps}
        torch.save({"peer": peer.name, **found}, os.path.join(folder, "record"))


def _imbalance(optimizer: MuonDist) -> float:
    """The largest of the domains': FLOPs of the busiest owner over max(mean, largest matrix)."""
    plans: Sequence[Any] = [domain.plan for domain in optimizer.engine.domains]
    return max(plan.imbalance() / plan.imbalance_lower_bound() for plan in plans)
