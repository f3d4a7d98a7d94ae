"""`muon-dist bench scale`: what a step of MuonDist takes at 64 to 16,384 ranks, by simulation.

The simulation is first held against this machine: its rates are measured with one and two ranks, it predicts the step at one, two and
four, and the error is printed. Then it predicts large jobs from rates that are inputs, since nobody measured them here.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from ..groups import PlanOptions
from ..optimizer import MuonDist
from ..planner.models import ModelParameter, active_share, model_parameters
from ..planner.plan import placements, plan_of
from ..polar.newton_schulz import orthogonalize_batch
from ..polar.polynomials import schedule_for
from ..sharding.layout import fragment_numel
from ..sharding.plan import Plan
from ..show.picture import pyplot
from ..show.table import si, table, write_json
from .simulation import APPLY_BYTES, MOMENTUM_BYTES, Rates, Timeline, Work, simulate
from .step import GPT2_SMALL_LAYER, on_rank
from .timing import times_in_turns

CONFIGS = Path(__file__).parents[2] / "configs" / "models"  # of the repository
# A model of 8 B and one of 70 B parameters, and a mixture of experts of 10¹², each with the parallelism of its jobs
PARALLEL = {"llama-8b": {"tp": 8}, "llama-70b": {"tp": 8}, "moe-1t": {"tp": 1, "experts_over": 64}}
SHAPES = list(GPT2_SMALL_LAYER.values()) * 2  # what is measured here: the matrices of two GPT-2 small layers
SMALL, COUNT = (8, 8), 200  # matrices whose step is all host work


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and how it is spread, under ZeRO stage 1: tensor parallelism, and the ranks over which experts are spread (1: none)."""

    name: str
    parameters: list[ModelParameter]
    tp: int
    experts_over: int = 1
    active: float = 1.0  # share of the parameters that a token passes through


def run(
    *,
    models: list[str],
    ranks: list[int],
    check_ranks: list[int],
    steps: int,
    rounds: int,
    products: float,
    memory: float,
    link: float,
    start: float,
    model_flops: float,
    tokens_per_rank: int,
    options: PlanOptions,
    picture: str | None,
    json_path: str | None,
) -> int:
    if min(*ranks, steps, rounds, tokens_per_rank, *check_ranks) < 1 or min(products, memory, link, model_flops) <= 0 or start < 0:
        raise ValueError("--ranks, --check-ranks, --steps, --rounds and --tokens-per-rank must be at least 1, and all rates above 0")
    if picture is not None:
        pyplot()
    host, checks = calibrate(check_ranks, steps, rounds)
    rates = Rates(products=products * 1e12, memory=memory * 1e12, link=link * 1e9, start=start * 1e-6, host=host)
    print(
        f"\nLarge jobs. Inputs, not measured: {products:g} TFLOP/s of Newton–Schulz, {memory:g} TB/s of memory, {link:g} GB/s each way and"
    )
    print(
        f"{start:g} µs to start an all-to-all, per rank; the model itself at {model_flops:g} TFLOP/s, {tokens_per_rank:,} tokens per rank."
    )
    print(f"Measured, on this machine's CPU: {host * 1e6:.1f} µs of Python per piece of a matrix. {steps} Jordan steps, wire in bf16.\n")
    rows, records = [], []
    for job in (_job(model, **PARALLEL[model]) for model in models):
        for n in ranks:
            if n % (job.tp * job.experts_over):
                print(f"{job.name} needs a multiple of {job.tp * job.experts_over} ranks: {n} left out")
                continue
            timeline, sent, imbalance = predict(job, n, steps, rates, options)
            numel = sum(math.prod(p.shape) for p in job.parameters)
            training = 6 * numel * job.active * tokens_per_rank / (model_flops * 1e12)
            records.append(
                {"model": job.name, "ranks": n, **asdict(timeline), "bytes_sent": sent, "imbalance": imbalance, "training": training}
            )
            parts = (timeline.step, timeline.newton_schulz, timeline.travelling, timeline.waiting, timeline.host)
            rows.append(
                (
                    job.name,
                    f"{n:,}",
                    *(f"{seconds * 1e3:.1f}" for seconds in parts),
                    si(sent, "B"),
                    f"{imbalance:.2f}",
                    f"{timeline.step / (timeline.step + training):.1%}",
                )
            )
    heads = ("model", "ranks", "step ms", "Newton–Schulz", "travelling", "waiting", "Python", "sent", "imbalance", "of training")
    print(table(heads, rows, right=tuple(range(1, 10))))
    print(
        "\nNewton–Schulz, Python: of the rank that has most. travelling: of all buckets. waiting: of the rank that ends last, for what "
        "travels\nand for other owners. sent: by the rank that sends most. imbalance: the busiest owner's FLOPs over max(mean, largest "
        "matrix).\nof training: the optimizer's share of a whole step.\n"
        "Assumed: every rank reaches the same rates at all sizes; an all-to-all is as slow as its rank with most bytes, and nothing else "
        "is on\nthe network; Python runs beside nothing. ZeRO-1; 8B and 70B with tp 8, the mixture with its experts over 64 ranks."
    )
    if picture is not None:
        draw(records, picture)
        print(f"picture: {picture}")
    write_json(
        json_path,
        {
            "rates": asdict(rates),
            "steps": steps,
            **asdict(options),
            "tokens_per_rank": tokens_per_rank,
            "checks": checks,
            "jobs": records,
        },
    )
    return 0


def _job(model: str, *, tp: int, experts_over: int = 1) -> Job:
    path = str(CONFIGS / f"{model}.json")
    parameters = model_parameters(path)
    return Job(name=model, parameters=parameters, tp=tp, experts_over=experts_over, active=active_share(path, parameters))


def predict(job: Job, ranks: int, steps: int, rates: Rates, options: PlanOptions) -> tuple[Timeline, int, float]:
    """The timeline of a step, the bytes that a rank sends at most, and the worst domain's imbalance over what is possible."""
    everyone = np.arange(ranks)
    experts = [p for p in job.parameters if ".experts." in p.name]
    apart = [replace(p, shape=(p.shape[0] // job.experts_over, *p.shape[1:])) for p in experts]
    domains, adamw, sent, imbalance = [], np.zeros(ranks), np.zeros(ranks, np.int64), 1.0
    for parameters, position, n, tp in (
        ([p for p in job.parameters if ".experts." not in p.name], everyone, ranks, job.tp),
        (apart, everyone // job.experts_over, ranks // job.experts_over, 1),
    ):
        if not parameters:
            continue
        plan, held, rest = _plan(parameters, n, tp, steps, options)
        loads = plan.bucket_loads()
        domains.append(Work(loads=loads, position=position, held=held[position]))
        adamw += rest[position]
        sent += loads.sent_and_received()[0][position]
        imbalance = max(imbalance, plan.imbalance() / plan.imbalance_lower_bound())
    return simulate(domains, adamw, rates), int(sent.max()), imbalance


def _plan(parameters: list[ModelParameter], ranks: int, tp: int, steps: int, options: PlanOptions) -> tuple[Plan, np.ndarray, np.ndarray]:
    """A domain's plan, and the elements of matrices and of everything else that each of its ranks stores."""
    places = placements(parameters, ranks // tp, tp, zero=1)
    held, rest = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for p, place in zip(parameters, places, strict=True):
        to = rest if p.route.view is None else held
        to += [fragment_numel(f) if f else 0 for f in place.fragments]
    return plan_of(parameters, places, options, ns_steps=steps), held, rest


# ---------------------------------------------------------------------------------------------------------------- this machine


def calibrate(check_ranks: list[int], steps: int, rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """Measure this machine with one and two ranks, and hold predictions at `check_ranks` against steps.

    Returns:
        Seconds of Python per piece, and for every number of ranks what was predicted and measured.
    """
    cores = os.cpu_count() or 1
    print(f"This machine: {platform.machine()}, {cores} cores, torch {torch.__version__}; matrices of two GPT-2 small layers, fp32")
    figures: dict[int, dict[str, Any]] = {}
    for n in sorted({1, 2, *check_ranks}):
        with tempfile.TemporaryDirectory() as folder:
            spawn(on_rank, args=(n, folder, max(1, cores // n), "cpu", _measure, steps, rounds), nprocs=n)
            figures[n] = torch.load(os.path.join(folder, "figures"), weights_only=False)
    one, two = figures[1], figures[2]
    numel = sum(m * n for m, n in SHAPES)
    elementwise = max(one["step"] - one["newton_schulz"] - float(one["loads"].pieces.sum()) * one["host"], 1e-9)
    whole = {  # of the machine, which its ranks share; products on many threads of one rank run at another rate than on one each
        n: Rates(
            products=float(figures[n]["loads"].flops.sum()) / figures[n]["newton_schulz"],
            memory=numel * (MOMENTUM_BYTES + APPLY_BYTES) / elementwise,
            link=2 * two["link"],
            start=two["start"],
            host=one["host"],
            overlaps=False,
        )
        for n in (1, 2)
    }
    products = " and ".join(f"{whole[n].products / 1e9:.0f}" for n in (1, 2))
    print(f"measured with one and with two ranks: {products} GFLOP/s of Newton–Schulz; all shared by the ranks:")
    print(f"{whole[1].memory / 1e9:.1f} GB/s elementwise, {whole[2].link / 1e9:.2f} GB/s travelling; for each rank:")
    print(f"{whole[2].start * 1e6:.0f} µs to start an all-to-all, {whole[1].host * 1e6:.1f} µs of Python per piece\n")
    checks, rows = [], []
    for n in check_ranks:
        held = np.array([-(-numel // n)] * n)
        work = Work(loads=figures[n]["loads"], position=np.arange(n), held=held)
        predicted, measured = simulate([work], np.zeros(n), whole[min(n, 2)].shared_by(n)).step, figures[n]["step"]
        checks.append({"ranks": n, "predicted": predicted, "measured": measured, "error": predicted / measured - 1})
        seen = "measured there" if n <= 2 else "of one and two ranks"
        rows.append((n, f"{predicted * 1e3:.0f} ms", f"{measured * 1e3:.0f} ms", f"{predicted / measured - 1:+.0%}", seen))
    print(table(("ranks", "predicted", "measured", "error", "rates"), rows, right=(0, 1, 2, 3)))
    return whole[1].host, checks


def _measure(rank: int, world: int, folder: str, device: torch.device, steps: int, rounds: int) -> None:
    mesh = init_device_mesh(device.type, (world,))
    torch.manual_seed(0)

    def optimizer(shapes: list[tuple[int, int]]) -> MuonDist:
        parameters = []
        for shape in shapes:
            value, gradient = torch.randn(shape), torch.randn(shape)
            if world > 1:
                value, gradient = (distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (value, gradient))
            parameters.append(nn.Parameter(value))
            parameters[-1].grad = gradient
        return MuonDist([{"params": parameters, "algorithm": "muon"}], lr=1e-3, ns_steps=steps)

    def median(work: Any) -> float:
        return statistics.median(times_in_turns({"work": work}, rounds, device)["work"])

    own = optimizer(SHAPES)
    figures: dict[str, Any] = {"step": median(own.step), "loads": own.engine.domains[0].plan.bucket_loads()}
    if world <= 2:
        schedule = schedule_for("jordan", steps)
        batches = [torch.randn(shape) for bucket in own.engine.programs[0].buckets for shape in bucket.route.batch_shapes]
        figures["newton_schulz"] = median(lambda: [orthogonalize_batch(b.clone(), schedule, compute_dtype=torch.float32) for b in batches])
    if world == 1:
        small = optimizer([SMALL] * COUNT)
        small.step()
        figures["host"] = median(small.step) / float(small.engine.domains[0].plan.bucket_loads().pieces.sum())
    if world == 2:
        few, many = (torch.zeros(size) for size in (2, 2**23))
        seconds = [median(lambda t=t: dist.all_to_all_single(torch.empty_like(t), t)) for t in (few, many)]
        figures["start"], figures["link"] = seconds[0], many.numel() * 4 / 2 / max(seconds[1] - seconds[0], 1e-9)
    if rank == 0:
        torch.save(figures, os.path.join(folder, "figures"))


def draw(records: list[dict[str, Any]], picture: str) -> None:
    """The step's time over the number of ranks, and what it is made of, a panel per model."""
    plt = pyplot()
    models = list(dict.fromkeys(r["model"] for r in records))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [r for r in records if r["model"] == model]
        for key, label in (("step", "step"), ("newton_schulz", "Newton–Schulz"), ("waiting", "waiting"), ("host", "Python")):
            axis.plot([r["ranks"] for r in own], [max(r[key], 1e-6) * 1e3 for r in own], marker="o", label=label)
        axis.set(title=model, xlabel="ranks", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a step, simulated")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
