"""`muon-dist bench adaptive` and `bench spectrum`: what adaptive schedules save on real momentum, and how well spectra are read.

Exact singular value decompositions decide what came of a schedule; schedules are chosen from moments alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..example.small_gpt import GPT, read_text, windows
from ..optimizer import MuonDist
from ..polar.cost import flops
from ..polar.newton_schulz import orthogonalize
from ..polar.polynomials import TOLERANCE, Schedule, widest_schedule
from ..polar.products import products_on
from ..routing import build_param_groups
from ..show.table import table, write_json
from ..spectrum.bidiagonal import RowShard, golub_kahan_quantiles
from ..spectrum.moments import NOISE_FLOOR, QUANTILES, spectrum_from_moments
from ..spectrum.policy import FIVE, Policy, Work

# Models whose momentum is taken where no file is given: name -> (options, batch, steps)
MODELS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "GPT of width 256": ({"layers": 4, "width": 256, "heads": 4}, 16, (5, 20, 60, 200)),
    "GPT of width 192, gated MLP": ({"layers": 4, "width": 192, "heads": 4, "gated": True}, 16, (200,)),
    "GPT of width 320, small batch": ({"layers": 3, "width": 320, "heads": 4}, 4, (120,)),
}
CONTEXT = 128
FIVE_STEPS = "five Jordan steps"


def run(
    data: list[str] | None, *, accuracy: Sequence[str], coverage: Sequence[float], dtype: str, threads: int, json_path: str | None
) -> int:
    """What adaptive schedules cost and how far they leave real momentum from its polar factor, beside five Jordan steps."""
    torch.set_num_threads(threads)
    content = []
    policies = {
        **{label: policy for target in accuracy for label, policy in _parts(f"accuracy {target}", accuracy=target).items()},
        **{label: policy for share in coverage for label, policy in _parts(f"coverage {share:g}", coverage=share).items()},
    }
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name, matrices in _sources(data):
        base = sum(flops(m.shape[0], m.shape[1], 5) for m in matrices.values())
        decomposed = {key: torch.linalg.svd(m.double(), full_matrices=False) for key, m in matrices.items()}
        fives = {key: _judged(decomposed[key], orthogonalize(m, compute_dtype=dtype)) for key, m in matrices.items()}
        print(f"\n{name}: {len(matrices)} matrices, {dtype}; directions above {NOISE_FLOOR:g}·‖M‖_F")
        rows = []
        for label, policy in {FIVE_STEPS: None, **policies}.items():
            chosen, judged, standard, formed = [], [], 0, 0
            for key, m in matrices.items():
                work = Work(m.shape[0], m.shape[1], compute, products_on("cpu"))
                schedule = FIVE if policy is None else _choose(m, policy, work)
                chosen.append(schedule)
                judged.append(
                    fives[key] if policy is None else _judged(decomposed[key], orthogonalize(m, schedule=schedule, compute_dtype=dtype))
                )
                standard += flops(m.shape[0], m.shape[1], len(schedule), deflation=schedule.deflation)
                formed += work.flops(schedule)
            record = {
                "variant": label,
                "flops": standard / base,
                "flops_of_the_form": formed / base,
                "steps": float(np.mean([len(s) for s in chosen])),
                "deflation": float(np.mean([s.deflation for s in chosen])),
                "error": math.sqrt(float(np.mean([error**2 for error, _ in judged]))),
                "largest_over_five": max(error / five for (error, _), (five, _) in zip(judged, fives.values(), strict=True)),
                "coverage": float(np.mean([covered for _, covered in judged])),
                "lowest": min(covered for _, covered in judged),
            }
            content.append({"source": name, **record, "schedules": [[len(s), s.deflation] for s in chosen]})
            rows.append(
                (
                    label,
                    f"{record['flops']:.2f}×",
                    f"{record['flops_of_the_form']:.2f}×",
                    f"{record['steps']:.2f}",
                    f"{record['deflation']:.0f}",
                    f"{record['error']:.3f}",
                    f"{record['largest_over_five']:.2f}",
                    f"{record['coverage']:.2f}",
                    f"{record['lowest']:.2f}",
                )
            )
        header = ("variant", "FLOPs", "in their form", "steps", "deflated", "error", "most over five", "coverage", "lowest")
        print(table(header, rows, right=tuple(range(1, 9))), flush=True)
    print(
        "\nFLOPs over those of five Jordan steps one by one, deflation's own included; in their form: with shared Gram matrices and half\n"
        "of symmetric products, as on this CPU. Error: root mean square of (gain − 1). Most over five: the largest error of a matrix over\n"
        "that of five Jordan steps on it. Chosen from the moments of one orthogonalisation, judged by exact decompositions."
    )
    write_json(json_path, content)
    return 0


def _parts(label: str, **target: Any) -> dict[str, Policy]:
    return {label: Policy(**target), f"{label}, without deflation": Policy(**target, deflation=0)}


def _choose(m: Tensor, policy: Policy, work: Work) -> Schedule:
    """From the moments of the schedule that the scaling laws propose, as in training, and of what that decides."""
    choice = policy.prior("", 0, 1, 0.5, work)
    for _ in range(2):
        schedule = policy.schedule(policy.to_measure(choice, work, floor=policy.reference is None))
        _, moments = orthogonalize(m, schedule=schedule, return_moments=True)
        spectrum = spectrum_from_moments(moments.numpy(), schedule, work.rank)
        assert spectrum is not None  # momentum is not zero
        choice = policy.best([spectrum], work)
    return policy.schedule(choice)


def _judged(decomposed: tuple[Tensor, Tensor, Tensor], result: Tensor) -> tuple[float, float]:
    """The error of a result and its coverage, by the exact singular vectors."""
    u, s, vh = decomposed
    gains = (u.mT @ result.double() @ vh.mT).diagonal()[s > NOISE_FLOOR * s.norm()]
    return float((gains - 1).square().mean().sqrt()), float(((gains - 1).abs() <= TOLERANCE).double().mean())


def estimates(data: list[str] | None, *, threads: int, json_path: str | None) -> int:
    """Estimated quantiles over exact ones: from moments in fp32 and bf16, and by Golub–Kahan."""
    torch.set_num_threads(threads)
    content = []
    generated = {f"generated, {k} steps": widest_schedule(k, 0.28) for k in (3, 4, 6)}
    deflated = {f"{k} steps, deflation of 16": replace(widest_schedule(k, 0.28), deflation=16) for k in (2, 3)}
    schedules = {FIVE_STEPS: FIVE, **generated, **deflated}
    for name, matrices in _sources(data):
        exact = {}
        for key, m in matrices.items():
            s = torch.linalg.svdvals(m.double())
            exact[key] = {q: float(s[math.ceil(q * len(s)) - 1] / s.norm()) for q in QUANTILES}
        found: dict[str, dict[float, list[float]]] = {}
        for label, schedule in schedules.items():
            for dtype in ("fp32", "bf16"):
                ratios: dict[float, list[float]] = {q: [] for q in QUANTILES}
                for key, m in matrices.items():
                    _, moments = orthogonalize(m, schedule=schedule, compute_dtype=dtype, return_moments=True)
                    spectrum = spectrum_from_moments(moments.numpy(), schedule, min(m.shape))
                    for q in QUANTILES:
                        if spectrum is not None and (value := spectrum.quantile(q)) is not None:
                            ratios[q].append(value / exact[key][q])
                found[f"{label}, {dtype}"] = ratios
        for iterations in (12, 24):
            estimates = golub_kahan_quantiles([_shard(key, m) for key, m in matrices.items()], iterations=iterations)
            pairs = [(exact[key], e) for key, e in zip(matrices, estimates, strict=True) if e is not None]
            found[f"Golub–Kahan, {iterations} iterations"] = {q: [e.quantiles[q] / true[q] for true, e in pairs] for q in QUANTILES}
        rows = []
        for label, ratios in found.items():
            cells = [f"{min(r):.2f} … {max(r):.2f} ({len(r)})" if r else "below resolution" for r in ratios.values()]
            rows.append((label, *cells))
            content.append({"source": name, "method": label, "ratios": {str(q): r for q, r in ratios.items()}})
        print(f"\n{name}: estimated over exact σ_q, least … most (of how many of the {len(matrices)} matrices)")
        print(table(("method", *[f"q = {q:g}" for q in QUANTILES]), rows), flush=True)
    write_json(json_path, content)
    return 0


def _shard(name: str, m: Tensor) -> RowShard:
    energy = float(torch.linalg.vector_norm(m, dtype=torch.float64) ** 2)
    m = m.double()
    return RowShard(name, m.shape[0], m.shape[1], torch.arange(m.shape[0]), lambda v: m @ v, lambda u: m.mT @ u, energy, m.device)


def _sources(data: list[str] | None) -> list[tuple[str, dict[str, Tensor]]]:
    if data:
        return [(path, read_matrices(path)) for path in data]
    return [
        (f"{name}, {step} steps", matrices)
        for name, recipe in MODELS.items()
        for step, matrices in zip(recipe[2], train_momentum(*recipe), strict=True)
    ]


def read_matrices(path: str) -> dict[str, Tensor]:
    """The matrices of a safetensors file, in fp32.

    Raises:
        ValueError: an unreadable file, one without matrices, or the package safetensors is missing.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("--data reads safetensors files: pip install safetensors") from error
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    matrices = {name: t.float() for name, t in sorted(tensors.items()) if t.ndim == 2 and t.is_floating_point() and min(t.shape) > 1}
    if not matrices:
        raise ValueError(f"{path} holds no matrices")
    return matrices


def train_momentum(model: dict[str, Any], batch: int, steps: Sequence[int]) -> list[dict[str, Tensor]]:
    """The momentum matrices of a small GPT after each of these numbers of steps of plain Muon."""
    print(f"training for momentum: {model}, {max(steps)} steps of {batch * CONTEXT} bytes", flush=True)
    torch.manual_seed(0)
    gpt, text = GPT(context=CONTEXT, **model), read_text(None)
    width = model["width"]
    optimizer = MuonDist(build_param_groups(gpt, split={"attn.qkv.weight": [width] * 3}), lr=4e-3, ns_steps=5)
    found: list[dict[str, Tensor]] = []
    for step in range(max(steps)):
        tokens, targets = windows(text, batch, CONTEXT, step)
        gpt(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in steps:
            found.append({})
            for name, p in gpt.named_parameters():
                if "momentum_buffer" in optimizer.state[p]:
                    momentum = optimizer.state[p]["momentum_buffer"]
                    parts = momentum.split(width) if "qkv" in name else [momentum]
                    found[-1].update({f"{name}[{k}]" if len(parts) > 1 else name: part.clone() for k, part in enumerate(parts)})
    return found
