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


def workspace_bytes(rows: int, cols: int, *, itemsize: int, in_place: bool) -> int:
    """Bytes that `orthogonalize_batch` needs for a rows × cols matrix beside its input: a second copy to work in turns, the
    Gram matrix and its polynomial; and where the input is in another dtype than `itemsize` says, a normalised copy of it.
    """
    small = min(rows, cols)
    return itemsize * (rows * cols * (1 if in_place else 2) + 2 * small * small)


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
    batch = x.detach().clone(memory_format=torch.contiguous_format).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return orthogonalize_batch(batch, chosen, compute_dtype=compute).to(x.dtype).reshape(x.shape)


def orthogonalize_batch(
    batch: Tensor,
    schedule: Sequence[Coefficients],
    *,
    compute_dtype: torch.dtype,
    eps: float = 1e-20,
    keep: Tensor | None = None,
) -> Tensor:
    """Newton–Schulz on (B, m, n): returns (B, m, n) in `compute_dtype`. The input is workspace: its values are lost.

    Each matrix is divided by max(‖·‖_F, eps) first. Where the bools `keep`, (B,), are False the
    result is exactly zero: a finite matrix divided by infinity.
    """
    if batch.numel() == 0:
        return batch.to(compute_dtype, copy=True)
    norm = frobenius_norms(batch).clamp_(min=eps)
    if keep is not None:
        norm.masked_fill_(~keep.view(-1, 1, 1), float("inf"))
    if batch.dtype != torch.float64:
        norm = norm.to(torch.float32)
    norm.masked_fill_(norm == 0, float("inf"))  # an eps of 0, or one that fp32 doesn't hold
    x = batch.div_(norm) if batch.dtype == compute_dtype else (batch / norm).to(compute_dtype)  # (B, m, n)
    y = torch.empty_like(x)
    # One matrix after the other where a batched product gains nothing: on a CPU the working set then fits its caches
    one_by_one = x.shape[0] == 1 or (x.device.type == "cpu" and min(x.shape[1:]) >= 192)
    for source, target in zip(x, y, strict=True) if one_by_one else [(x, y)]:
        _iterate(source, target, schedule)
    return y if len(schedule) % 2 else x


def _iterate(x: Tensor, y: Tensor, schedule: Sequence[Coefficients]) -> None:
    """X ← aX + (bA + cA²)X for every step, A = XXᵀ (XᵀX and from the right where X is tall): one matrix or a batch.

    Works in x and y in turns, so the result of an odd number of steps is in y, of an even one in x.
    """
    product, multiply_add = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    tall, small = x.shape[-2] > x.shape[-1], min(x.shape[-2:])
    gram = x.new_empty(*x.shape[:-2], small, small)
    polynomial = torch.empty_like(gram)
    for a, b, c in schedule:
        product(x.mT, x, out=gram) if tall else product(x, x.mT, out=gram)
        multiply_add(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        left, right = (x, polynomial) if tall else (polynomial, x)
        multiply_add(x, left, right, beta=a, out=y)
        x, y = y, x


def frobenius_norms(batch: Tensor) -> Tensor:
    """‖·‖_F of each matrix of (B, m, n), as (B, 1, 1) in fp64.

    Accumulated in fp64: in fp32 the squares of entries below 1e-19 vanish, and momentum may be that small after clipping. On
    a CPU, where that costs ten times as much, only the row norms are summed in fp64, unless the result tells that fp32 may
    not have held them. (A plain fp32 norm of 3072 × 768 normal numbers was seen 4e-5 off, more than a step's own rounding.)
    """
    if batch.device.type == "cpu" and batch.dtype != torch.float64:
        rows = torch.linalg.vector_norm(batch, dim=-1, dtype=torch.float32).double()
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).unsqueeze(-1)
        if bool(((norm > 1e-12) & (norm < 1e18)).all()):
            return norm
    return torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float64)
