"""`muon-dist bench adaptive` and `bench spectrum`: what adaptive step counts save on real momentum, and how well spectra are read.

Exact singular value decompositions decide what was covered; the schedules are chosen from moments alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cli.table import table, write_json
from ..optimizer import MuonDist
from ..polar.cost import flops
from ..polar.newton_schulz import orthogonalize
from ..polar.polynomials import Schedule, schedule_for
from ..routing import build_param_groups
from ..spectrum.bidiagonal import RowShard, golub_kahan_quantiles
from ..spectrum.controller import Policy
from ..spectrum.moments import NOISE_FLOOR, QUANTILES, spectrum_from_moments
from .small_gpt import GPT, read_text, windows

# Models whose momentum is taken where no file is given: name -> (options, batch, steps)
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "GPT of width 192": ({"layers": 4, "width": 192, "heads": 4}, 16, 200),
    "GPT of width 192, gated MLP": ({"layers": 4, "width": 192, "heads": 4, "gated": True}, 16, 200),
    "GPT of width 320, small batch": ({"layers": 3, "width": 320, "heads": 4}, 4, 120),
}
CONTEXT = 128


def run(data: list[str] | None, *, coverages: list[float], threads: int, json_path: str | None) -> int:
    """Newton–Schulz FLOPs against five Jordan steps, at equal coverage, with what each part contributes."""
    torch.set_num_threads(threads)
    content = []
    for name, matrices in _sources(data):
        base = sum(flops(m.shape[0], m.shape[1], 5) for m in matrices.values())
        print(f"\n{name}: {len(matrices)} matrices; FLOPs over five Jordan steps', coverage above {NOISE_FLOOR:g}·‖M‖_F")
        rows = []
        variants: list[tuple[str, Callable[[Tensor], Schedule]]] = [("five Jordan steps", lambda _: schedule_for("jordan", 5))]
        for coverage in coverages:
            for label, options in _parts(coverage).items():
                variants.append((f"{coverage:g}: {label}", _chooser(Policy(min_ns_steps=1, coverage=coverage, **options))))
        decomposed = {key: torch.linalg.svd(m.double(), full_matrices=False) for key, m in matrices.items()}
        for label, choose in variants:
            cost, at_30, at_35, counts = 0, [], [], []
            for key, m in matrices.items():
                schedule = choose(m)
                covered = _covered(decomposed[key], orthogonalize(m, schedule=schedule))
                at_30.append(covered[0])
                at_35.append(covered[1])
                counts.append(len(schedule))
                cost += flops(m.shape[0], m.shape[1], len(schedule), deflation=schedule.deflation)
            record = {
                "variant": label,
                "flops": cost / base,
                "coverage": float(np.mean(at_30)),
                "lowest": min(at_30),
                "coverage_35": float(np.mean(at_35)),
            }
            content.append({"source": name, **record, "steps": counts})
            rows.append(
                (
                    label,
                    f"{cost / base:.2f}×",
                    f"{np.mean(counts):.2f}",
                    f"{np.mean(at_30):.3f}",
                    f"{min(at_30):.3f}",
                    f"{np.mean(at_35):.3f}",
                )
            )
        header = ("variant", "FLOPs", "steps", "coverage at .30", "lowest matrix", "coverage at .35")
        print(table(header, rows, right=(1, 2, 3, 4, 5)), flush=True)
    print("\nFLOPs include deflation's own products. Chosen from moments of one orthogonalisation, judged by exact decompositions.")
    write_json(json_path, content)
    return 0


def _parts(coverage: float) -> dict[str, dict[str, Any]]:
    return {
        "adaptive Jordan, tol .35": {"polynomial": "jordan", "tol": 0.35},
        "generated": {"normalisation": "frobenius"},
        "generated, Schatten-4": {"normalisation": "schatten4"},
        "generated, Schatten-8": {},
        "… and deflation of 1": {"deflation": 1},
        "… and deflation of 4": {"deflation": 4},
        "… and deflation of 16": {"deflation": 16},
    }


def _chooser(policy: Policy) -> Callable[[Tensor], Schedule]:
    def choose(m: Tensor) -> Schedule:
        probe = policy.schedule(policy.probe)
        _, moments = orthogonalize(m, schedule=probe, return_moments=True)
        spectrum = spectrum_from_moments(moments.numpy(), probe, min(m.shape))
        assert spectrum is not None  # momentum is not zero
        return policy.schedule(policy.fewest_steps(spectrum)[0])

    return choose


def _covered(decomposed: tuple[Tensor, Tensor, Tensor], result: Tensor) -> tuple[float, float]:
    u, s, vh = decomposed
    gains = (u.mT @ result.double() @ vh.mT).diagonal()[s > NOISE_FLOOR * s.norm()]
    return tuple(float(((gains - 1).abs() <= tol).double().mean()) for tol in (0.3, 0.35))  # type: ignore[return-value]


def accuracy(data: list[str] | None, *, threads: int, json_path: str | None) -> int:
    """Estimated quantiles over exact ones: from moments in fp32 and bf16, and by Golub–Kahan."""
    torch.set_num_threads(threads)
    content = []
    policy = Policy()
    schedules = {"five Jordan steps": schedule_for("jordan", 5), **{f"generated, {k} steps": policy.schedule(k) for k in (3, 4, 6)}}
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
    return [(name, train_momentum(*recipe)) for name, recipe in MODELS.items()]


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


def train_momentum(model: dict[str, Any], batch: int, steps: int) -> dict[str, Tensor]:
    """The momentum matrices of a small GPT after some steps of plain Muon."""
    print(f"training for momentum: {model}, {steps} steps of {batch * CONTEXT} bytes", flush=True)
    torch.manual_seed(0)
    gpt, text = GPT(context=CONTEXT, **model), read_text(None)
    width = model["width"]
    optimizer = MuonDist(build_param_groups(gpt, split={"attn.qkv.weight": [width] * 3}), lr=4e-3, ns_steps=5)
    for step in range(steps):
        tokens, targets = windows(text, batch, CONTEXT, step)
        gpt(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = {}
    for name, p in gpt.named_parameters():
        if "momentum_buffer" in optimizer.state[p]:
            parts = optimizer.state[p]["momentum_buffer"].split(width) if "qkv" in name else [optimizer.state[p]["momentum_buffer"]]
            result.update({f"{name}[{k}]" if len(parts) > 1 else name: part.clone() for k, part in enumerate(parts)})
    return result
