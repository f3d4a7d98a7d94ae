"""`muon-dist bench deepspeed`: what MuonDist adds to a training step in DeepSpeed, beside what DeepSpeed's own Muon adds.

The same model, data and seeds under AdamW, DeepSpeed's Muon, MuonDist with five steps and MuonDist with adaptive ones; in every round
each engine trains one step, and its time less AdamW's is its overhead. DeepSpeed's Muon works partly inside the backward pass, so
only whole steps can be compared. Newton–Schulz runs in fp32 on both sides: DeepSpeed's takes half precision also on a CPU, where
that is tens of times slower, so here it is given fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from ..example.small_gpt import GPT, read_text, windows
from ..polar.newton_schulz import orthogonalize_batch
from ..run.bootstrap import end_process_group
from ..show.table import table, write_json
from .traffic import Received, tensors_in

ADAMW, THEIRS, FIVE, ADAPTIVE = "AdamW", "DeepSpeed's Muon", "MuonDist, 5 steps", "MuonDist, adaptive"
CONTEXT = 64


class Model(GPT):
    """The small GPT with embeddings named so that DeepSpeed's Muon leaves them to AdamW, as MuonDist does."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(layers=layers, width=width, heads=width // 64 or 1, context=CONTEXT)
        self.token_embed, self.position_embed = self.wte, self.wpe
        del self.wte, self.wpe

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embed(tokens) + self.position_embed(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def run(
    *, ranks: list[int], stages: list[int], width: int, layers: int, rounds: int, warmup: int, offload: bool, json_path: str | None
) -> int:
    if min(*ranks, width // 64, layers, rounds, warmup) < 1 or not set(stages) <= {1, 2, 3}:
        raise ValueError(f"--ranks, --layers, --rounds and --warmup are at least 1, --width 64 and --stages 1 to 3, got {ranks}, {stages}")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"this bench needs DeepSpeed: {error}") from error
    cores = os.cpu_count() or 1
    size = sum(p.numel() for p in Model(layers, width).parameters()) / 1e6
    print(f"GPT of width {width}, {layers} layers, {size:.1f} M parameters, 4 × {CONTEXT} tokens per rank; {rounds} rounds")
    print(
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, {platform.machine()}, {cores} cores; fp32 on both sides", flush=True
    )
    rows, records = [], []
    for n in ranks:
        for stage in stages:
            with tempfile.TemporaryDirectory() as folder:
                spawn(_measure, args=(n, folder, stage, width, layers, rounds, warmup, offload, max(1, cores // n)), nprocs=n)
                record: dict[str, Any] = torch.load(os.path.join(folder, "record"))
            record.update(ranks=n, stage=stage, offload=offload)
            records.append(record)
            rows += _rows(record)
            print(f"  stage {stage}, {n} ranks done", flush=True)
    print()
    heads = ("ranks", "stage", "optimizer", "step", "overhead", "over DeepSpeed's", "least … most", "state", "received", "NS")
    print(table(heads, rows, right=(0, 1, 3, 4, 5, 6, 7, 8, 9)))
    print(
        "\nstep, overhead: of a whole training step, and what of it AdamW doesn't take; medians. over DeepSpeed's: the ratio of "
        "overheads,\nmedian of the rounds; below 1 MuonDist is cheaper. state: what the optimizer holds per rank. received: what its "
        "collectives\nbring a rank per step beyond AdamW's. NS: matrices orthogonalised, all ranks together, and the mean of their steps."
    )
    machine = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "machine": platform.machine(), "cores": cores}
    write_json(json_path, {**machine, "width": width, "layers": layers, "rounds": rounds, "runs": records})
    return 0


def _rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    base = record["seconds"][ADAMW]
    overhead = {name: [t - b for t, b in zip(times, base, strict=True)] for name, times in record["seconds"].items()}
    record["ratio"] = {}
    rows = []
    for name in (ADAMW, THEIRS, FIVE, ADAPTIVE):
        ratios = [a / b for a, b in zip(overhead[name], overhead[THEIRS], strict=True)]
        record["ratio"][name] = statistics.median(ratios)
        ours = name in (FIVE, ADAPTIVE)
        rows.append(
            (
                record["ranks"],
                f"{record['stage']}{' offload' if record['offload'] else ''}",
                name,
                f"{statistics.median(record['seconds'][name]) * 1e3:.0f} ms",
                "" if name == ADAMW else f"{statistics.median(overhead[name]) * 1e3:.0f} ms",
                f"{record['ratio'][name]:.2f}×" if ours else "",
                f"{min(ratios):.2f} … {max(ratios):.2f}" if ours else "",
                f"{record['state'][name] / 2**20:.0f} MiB",
                "" if name == ADAMW else f"{(record['received'][name] - record['received'][ADAMW]) / 2**20:.2f} MiB",
                "" if name == ADAMW else f"{record['calls'][name]} × {record['steps'][name]:.1f}",
            )
        )
    return rows


def _config(name: str, stage: int, offload: bool) -> dict[str, Any]:
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    optimizer: dict[str, Any] = {"type": "AdamW", "params": adam}
    zero: dict[str, Any] = {"stage": stage}
    if name == THEIRS:
        optimizer = {"type": "Muon", "params": {**adam, "lr": 0.02, "adam_lr": 1e-3, "momentum": 0.95}}
        if stage == 3:
            zero["reduce_scatter"] = False  # it asks for that
    elif name in (FIVE, ADAPTIVE):
        steps = {"ns_steps": 5} if name == FIVE else {"burn_in": 4, "measure_every": 20}
        optimizer = {"type": "MuonDist", "params": {**adam, "lr": 4e-3, "adam_lr": 1e-3, **steps}}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": optimizer,
    }


@contextlib.contextmanager
def _counted(calls: list[int]) -> Iterator[None]:
    """Count the matrices that either side orthogonalises on this rank."""
    from deepspeed.runtime.zero.muon import original_muon as theirs

    from .. import step as ours

    orthogonalize, update = orthogonalize_batch, theirs.muon_update

    def counted_ours(batch: Tensor, *args: Any, **options: Any) -> Any:
        calls[0] += batch.shape[0]
        return orthogonalize(batch, *args, **options)

    def counted_theirs(*args: Any, **options: Any) -> Tensor:
        calls[0] += 1
        return update(*args, **options)

    with mock.patch.object(ours, "orthogonalize_batch", counted_ours), mock.patch.object(theirs, "muon_update", counted_theirs):
        yield


def _held(engine: Any) -> int:
    """Bytes of optimizer state on this rank, with what DeepSpeed's Muon stages beside it."""
    held = [t for entry in engine.basic_optimizer.state.values() for t in tensors_in(list(entry.values()))]
    for name in ("_muon_pending_momentum", "_muon_allgather_buffers"):
        held += tensors_in([list(v) if isinstance(v, tuple) else v for v in getattr(engine.optimizer, name, {}).values()])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def _measure(
    rank: int, world: int, folder: str, stage: int, width: int, layers: int, rounds: int, warmup: int, offload: bool, threads: int
) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # DeepSpeed asks for both; the store below is used
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    import deepspeed
    from deepspeed.runtime.zero.muon import original_muon

    import muon_dist.integrations.deepspeed  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    original_muon.ns_compute_dtype = lambda ns_method: torch.float32
    engines: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name in (ADAMW, THEIRS, FIVE, ADAPTIVE):
            torch.manual_seed(0)
            model: nn.Module = Model(layers, width)
            parameters = list(model.parameters())
            engines[name] = deepspeed.initialize(model=model, model_parameters=parameters, config=_config(name, stage, offload))[0]
    text = read_text(None)

    def step(engine: Any, k: int) -> None:
        engine.backward(engine(*windows(text, 4, CONTEXT, k * world + rank)))
        engine.step()

    for name, engine in engines.items():
        for k in range(warmup if name != ADAPTIVE else max(warmup, 8)):  # adaptive schedules are measured by then
            step(engine, k)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for k in range(rounds):
        for name, engine in engines.items():
            dist.barrier()
            started = time.perf_counter()
            step(engine, 100 + k)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    received, calls, state, steps = {}, {}, {}, {}
    for name, engine in engines.items():
        count, traffic = [0], Received()
        with _counted(count), traffic:
            step(engine, 1000)
        figures = torch.tensor([traffic.bytes / world, float(count[0]), _held(engine) / world], dtype=torch.float64)
        dist.all_reduce(figures)
        received[name], calls[name], state[name] = figures[0].item(), int(figures[1]), figures[2].item()
        schedules = getattr(engine.basic_optimizer, "schedules", {}).values()
        steps[name] = statistics.mean(len(schedule) for _, schedule in schedules) if schedules else 5.0
    if rank == 0:
        record = {"seconds": seconds, "received": received, "calls": calls, "state": state, "steps": steps}
        torch.save(record, os.path.join(folder, "record"))
    end_process_group()
