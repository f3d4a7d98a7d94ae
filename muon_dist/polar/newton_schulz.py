"""Newton–Schulz orthogonalisation of a batch of matrices. Knows tensors only: no ranks, no parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .polynomials import Coefficients, Polynomial, explicit_schedule, schedule_for

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
}


def dtype_named(value: torch.dtype | str | None, what: str) -> torch.dtype | None:
    """A floating dtype from itself, from a name such as "bf16" (JSON has only names), or None."""
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"{what}={value!r} is not a dtype: choose one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if value is not None and value not in DTYPES.values():
        raise ValueError(f"{what} must be bf16, fp16, fp32 or fp64, got {value!r}")
    return value


def default_compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bf16 on an accelerator, fp32 on a CPU (whose half precision is tens of times slower), fp64 for fp64 input."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def flops(rows: int, cols: int, steps: int) -> int:
    """Floating-point operations of `steps` quintic steps on a rows × cols matrix: k(4m²n + 2m³), m = min(rows, cols)."""
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m**3)


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    steps: int = 5,
    polynomial: Polynomial = "jordan",
    schedule: Sequence[Coefficients] | None = None,
    compute_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """The approximate polar factor UVᵀ of each matrix USVᵀ in `x`, by Newton–Schulz on x/‖x‖_F.

    Args:
        x: (..., m, n), floating point, any device; every trailing matrix is orthogonalised by itself. Tall, wide and
            empty matrices are welcome. A zero matrix gives zero.
        steps: Newton–Schulz steps.
        polynomial: "jordan", "polar_express", "cans", "deepseek_v4", one (a, b, c) repeated, or one (a, b, c) per step.
        schedule: an explicit list of (a, b, c), one per step, instead of `steps` and `polynomial`.
        compute_dtype: what the products run in (a dtype or a name such as "bf16"). None: bf16 on an accelerator, fp32
            on a CPU, fp64 for fp64 input.

    Returns:
        A new tensor of the shape and dtype of `x`.

    Raises:
        ValueError: fewer than two dimensions, a non-floating dtype, or a malformed polynomial or schedule.

    Source: Jordan et al., "Muon" (2024); Bernstein & Newhouse, arXiv 2409.20325.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs matrices, (..., m, n); got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"orthogonalize needs a real floating-point tensor, got {x.dtype}")
    chosen = schedule_for(polynomial, steps) if schedule is None else explicit_schedule(schedule)
    compute = dtype_named(compute_dtype, "compute_dtype") or default_compute_dtype(x.device, x.dtype)
    batch = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return orthogonalize_batch(batch, chosen, compute_dtype=compute).to(x.dtype).reshape(x.shape)


def orthogonalize_batch(
    batch: Tensor,
    schedule: Sequence[Coefficients],
    *,
    compute_dtype: torch.dtype,
    eps: float = 1e-20,
    keep: Tensor | None = None,
) -> Tensor:
    """Newton–Schulz on (B, m, n): returns (B, m, n) in `compute_dtype`; the input is left as it is.

    Each matrix is divided by max(‖·‖_F, eps) first. The norm is accumulated in fp64, because the squares of entries
    below 1e-19 vanish in fp32 and momentum may be that small after clipping. Where the bools `keep`, (B,), are False the
    result is exactly zero: a finite matrix divided by infinity.
    """
    count, m, n = batch.shape
    if batch.numel() == 0:
        return batch.to(compute_dtype, copy=True)
    norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp_(min=eps)
    if keep is not None:
        norm.masked_fill_(~keep.view(-1, 1, 1), float("inf"))
    if batch.dtype != torch.float64:
        norm = norm.to(torch.float32)
    x = (batch / norm).to(compute_dtype)  # (B, m, n)
    if count == 1:
        x = x.squeeze(0)  # plain matrix products are faster than batches of one
    tall = m > n
    if tall:
        x = x.mT  # (B, n, m): the Gram matrix is the smaller of the two
    for a, b, c in schedule:
        x = _step(x, a, b, c)
    if tall:
        x = x.mT
    return x.unsqueeze(0) if count == 1 else x


def _step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """aX + (bA + cA²)X with the Gram matrix A = XXᵀ, for one matrix or a batch."""
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = x @ x.mT  # (B, m, m)
    quadratic = multiply_add(gram, gram, gram, beta=b, alpha=c) if c else gram * b
    return multiply_add(x, quadratic, x, beta=a)
