"""`muon-dist bench megatron`: the optimizer step of MuonDist beside that of Megatron's own Muon in its three modes, on CPU ranks.

The same GPT, data and seeds under each; in every round each of them steps once, on gradients of its own backward pass. Newton–Schulz runs
in fp32 with the same five polynomials on both sides: Megatron's default precision is bf16 inside, which a CPU computes tens of times
slower. The first update is also compared with what the same optimizer does without tensor parallelism.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from ..example import megatron_host as host
from ..example.small_gpt import read_text, windows
from ..run.bootstrap import end_process_group
from ..show.table import si, table, write_json
from .traffic import Received

FIVE, ADAPTIVE = "MuonDist, 5 steps", "MuonDist, adaptive"
THEIRS = {f"Megatron's, {mode}": mode for mode in ("blockwise", "duplicated", "distributed")}
REFERENCE = "Megatron's, duplicated"
LR = 1e-3


def run(*, ranks: list[int], tp: int, hidden: int, layers: int, rounds: int, warmup: int, json_path: str | None) -> int:
    if min(hidden, layers, rounds, warmup, tp) < 1 or hidden % (64 * tp) or any(n < tp or n % tp for n in ranks):
        raise ValueError(
            f"--ranks are multiples of --tp, --hidden is one of 64 × --tp (heads of 64) and all others are at least 1, got {ranks}, {tp}, "
            f"{hidden}, {layers}, {rounds}, {warmup}"
        )
    try:
        import megatron.core
        from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS
    except ImportError as error:
        raise ValueError(f"this bench needs megatron-core 0.19, which needs Python 3.12: {error}") from error
    if not HAVE_EMERGING_OPTIMIZERS:
        raise ValueError("this bench needs emerging-optimizers 0.3, without which Megatron has no Muon: pip install emerging-optimizers")
    cores = os.cpu_count() or 1
    print(f"GPT of hidden size {hidden}, {layers} layers, 8 × 64 tokens per data-parallel rank; {rounds} rounds")
    print(
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {platform.machine()}, {cores} cores; fp32 on both sides",
        flush=True,
    )
    rows, records = [], []
    for n in ranks:
        record = _spawned(n, tp, hidden, layers, rounds, warmup, max(1, cores // n))
        updates, alone = record.pop("updates"), _spawned(n // tp, 1, hidden, layers, 0, warmup, max(1, cores // n))["updates"]
        record.update(ranks=n, tp=tp, differs={name: _difference(updates[name], alone[name]) for name in updates})
        records.append(record)
        rows += _rows(record)
        print(f"  {n} ranks done", flush=True)
    print()
    heads = ("ranks", "optimizer", "step", "over duplicated", "least … most", "FLOPs", "received", "state", "TP changes the update by")
    print(table(heads, rows, right=tuple(range(2, 9))))
    print(
        "\nstep: of the optimizer, clipping included; median. over duplicated: the ratio of step times, median of the rounds; below 1 it "
        "is faster.\nFLOPs: of matrix products, all ranks together. received: what collectives bring a rank. state: what the optimizer "
        "holds per\nrank. The last column: the largest relative difference between the first update of a matrix at this size and at TP 1."
    )
    machine = {"torch": torch.__version__, "megatron-core": megatron.core.__version__, "machine": platform.machine(), "cores": cores}
    write_json(json_path, {**machine, "hidden": hidden, "layers": layers, "rounds": rounds, "runs": records})
    return 0


def _rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, times in record["seconds"].items():
        ratios = [a / b for a, b in zip(times, record["seconds"][REFERENCE], strict=True)]
        rows.append(
            (
                f"{record['ranks']}, TP {record['tp']}",
                name,
                f"{statistics.median(times) * 1e3:.0f} ms",
                f"{statistics.median(ratios):.2f}×",
                f"{min(ratios):.2f} … {max(ratios):.2f}",
                si(record["flops"][name]),
                f"{record['received'][name] / 2**20:.1f} MiB",
                f"{record['state'][name] / 2**20:.1f} MiB",
                f"{record['differs'][name]:.1e}",
            )
        )
    return rows


def _difference(update: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    return max(float((update[name] - alone[name]).norm() / alone[name].norm()) for name in alone)


def _spawned(n: int, tp: int, hidden: int, layers: int, rounds: int, warmup: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, args=(n, folder, tp, hidden, layers, rounds, warmup, threads), nprocs=n)
        record: dict[str, Any] = torch.load(os.path.join(folder, "record"))
    return record


def _measure(rank: int, world: int, folder: str, tp: int, hidden: int, layers: int, rounds: int, warmup: int, threads: int) -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    setup = host.Setup(
        tp=tp,
        hidden=hidden,
        heads=hidden // 64,
        groups=hidden // 64,
        ffn=4 * hidden,
        layers=layers,
        gated=False,  # Megatron's Muon takes gate and up as one matrix
        batch=8,
        context=64,
        vocabulary=256,
    )
    host.initialize(setup)
    text = read_text(None)

    def read(seed: int) -> Tensor:
        inputs, targets = windows(text, setup.batch, setup.context, seed)
        return torch.cat([inputs, targets[:, -1:]], dim=1)

    models = {name: _build(setup, name) for name in (*THEIRS, FIVE, ADAPTIVE)}
    steps = {name: _Timed(optimizer) for name, (_, optimizer) in models.items()}

    def step(name: str, k: int) -> None:
        chunks, optimizer = models[name]
        host.set_rates(optimizer, LR)
        host.train_step(setup, chunks, optimizer, k, read)

    updates = {}
    for name, (chunks, _) in models.items():
        before = host.whole_matrices(chunks)
        step(name, 0)
        updates[name] = {key: value - before[key] for key, value in host.whole_matrices(chunks).items()}
        for k in range(1, warmup if name != ADAPTIVE else max(warmup, 24)):  # adaptive schedules are measured by then
            if rounds:
                step(name, k)
    record: dict[str, Any] = {"updates": updates, "seconds": {name: [] for name in models}, "flops": {}, "received": {}, "state": {}}
    for k in range(rounds):
        for name in models:
            step(name, 100 + k)
            record["seconds"][name].append(steps[name].seconds)
    for name, (_, optimizer) in models.items():
        with steps[name] as counted:
            step(name, 1000)
        held = [t for state in _inner_states(optimizer) for t in state.values() if isinstance(t, Tensor)]
        figures = torch.tensor(
            [counted.flops, counted.received / world, sum(t.numel() * t.element_size() for t in held) / world], dtype=torch.float64
        )
        dist.all_reduce(figures)
        record["flops"][name], record["received"][name], record["state"][name] = figures.tolist()
    if rank == 0:
        torch.save(record, os.path.join(folder, "record"))
    end_process_group()


class _Timed:
    """Times an optimizer's step, with all ranks at its beginning and at its end; counts instead where it is entered as a context."""

    def __init__(self, optimizer: Any) -> None:
        self.seconds = self.flops = self.received = 0.0
        self._counts = False
        original: Callable[[], Any] = optimizer.step

        def step() -> Any:
            dist.barrier()
            started = time.perf_counter()
            if self._counts:
                with FlopCounterMode(display=False) as flops, Received() as received:
                    result = original()
                self.flops, self.received = float(flops.get_total_flops()), received.bytes
            else:
                result = original()
                dist.barrier()
            self.seconds = time.perf_counter() - started
            return result

        optimizer.step = step

    def __enter__(self) -> _Timed:
        self._counts = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._counts = False


def _build(setup: host.Setup, name: str) -> tuple[list[Any], Any]:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from muon_dist.integrations.megatron import MuonDistConfig, get_muon_dist_optimizer

    chunks = host.make_model(setup)
    same = {"muon_momentum": 0.95, "muon_nesterov": True, "muon_fp32_matmul_prec": "highest", "lr": LR}
    if name in THEIRS:
        config = host.optimizer_config(
            setup, OptimizerConfig, optimizer="muon", muon_tp_mode=THEIRS[name], muon_coefficient_type="simple", **same
        )
        return chunks, get_megatron_optimizer(config, chunks)
    own: dict[str, Any] = {"muon_num_ns_steps": 5, "muon_coefficient_type": "simple"}
    if name == ADAPTIVE:
        own = {"muon_burn_in": 4, "muon_measure_every": 20}
    return chunks, get_muon_dist_optimizer(host.optimizer_config(setup, MuonDistConfig, **same, **own), chunks)


def _inner_states(optimizer: Any) -> list[dict[str, Any]]:
    return [state for wrapper in optimizer.chained_optimizers for state in wrapper.optimizer.state.values()]
