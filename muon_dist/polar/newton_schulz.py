"""Newton–Schulz orthogonalisation of a batch of matrices. Knows tensors only: no ranks, no parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from .coefficients import Coefficients
from .cost import segments_of
from .flattening import Part, flatten_dominant
from .polynomials import Polynomial, Schedule, explicit_schedule, schedule_for
from .products import SymmetricProducts, fp32_precision, own_products, products_on
from .recorder import Recorder

# The largest gain (the product of all a) that is left to bf16. A direction at 1e-4·‖X‖_F comes out of bf16 with .91 of its gain and
# noise of .39 beside it, out of fp16 with 1.00 and .06 (measured at n = 512); lifting it to 1 takes a gain of 1e4.
BF16_RESOLVES = 2e3

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


def default_compute_dtype(device: torch.device, dtype: torch.dtype, schedule: Schedule | None = None) -> torch.dtype:
    """fp32 on a CPU (whose half precision may be tens of times slower), fp64 for fp64 input; on an accelerator bf16, or fp16 for a
    schedule that reaches further down than bf16 resolves.
    """
    if dtype == torch.float64:
        return torch.float64
    if device.type == "cpu":
        return torch.float32
    if schedule is None:
        return torch.bfloat16
    # what one step lifts a tiny singular value by is its a: together they say how far down the steps reach
    return torch.bfloat16 if math.prod(a for a, _, _ in schedule.steps) <= BF16_RESOLVES else torch.float16


@overload
def orthogonalize(
    x: Tensor,
    *,
    steps: int = ...,
    polynomial: Polynomial = ...,
    schedule: Schedule | Sequence[Coefficients] | None = ...,
    compute_dtype: torch.dtype | str | None = ...,
    return_moments: Literal[False] = ...,
) -> Tensor: ...


@overload
def orthogonalize(
    x: Tensor,
    *,
    steps: int = ...,
    polynomial: Polynomial = ...,
    schedule: Schedule | Sequence[Coefficients] | None = ...,
    compute_dtype: torch.dtype | str | None = ...,
    return_moments: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    steps: int = 5,
    polynomial: Polynomial = "jordan",
    schedule: Schedule | Sequence[Coefficients] | None = None,
    compute_dtype: torch.dtype | str | None = None,
    return_moments: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The approximate polar factor UVᵀ of each matrix USVᵀ in `x`, by Newton–Schulz.

    Args:
        x: (..., m, n), floating point, any device; every trailing matrix is orthogonalised by itself. Tall, wide and
            empty matrices are welcome. A zero matrix gives zero.
        steps: Newton–Schulz steps.
        polynomial: "jordan", "quintic", "aol", "polar_express", "cans", "deepseek_v4", "minimax", one (a, b, c) repeated, or one per step.
        schedule: instead of `steps` and `polynomial`: a `Schedule`, such as `choose_schedule` gives, with its normalisation and
            deflation; or a list of (a, b, c), one per step, on x/‖x‖_F.
        compute_dtype: what the products run in (a dtype or a name such as "bf16"). None: fp32 on a CPU, fp64 for fp64 input;
            on an accelerator bf16, or fp16 where the schedule reaches directions that bf16 doesn't resolve.
        return_moments: also return the moments of the iterates.

    Returns:
        A new tensor of the shape and dtype of `x`. With `return_moments`, also the moments, (..., 3 + 4·steps) in fp64 on x's
        device, as `spectrum.moments` reads them; eight more where the schedule deflates.

    Raises:
        ValueError: fewer than two dimensions, a non-floating dtype, or a malformed polynomial or schedule.

    Source: Jordan et al., "Muon" (2024); Bernstein & Newhouse, arXiv 2409.20325.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs matrices, (..., m, n); got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"orthogonalize needs a real floating-point tensor, got {x.dtype}")
    chosen = schedule_for(polynomial, steps) if schedule is None else explicit_schedule(schedule)
    compute = dtype_named(compute_dtype, "compute_dtype") or default_compute_dtype(x.device, x.dtype, chosen)
    batch = x.detach().clone(memory_format=torch.contiguous_format).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    result, moments = orthogonalize_batch(batch, chosen, compute_dtype=compute, measure=return_moments)
    result = result.to(x.dtype).reshape(x.shape)
    return result if moments is None else (result, moments.reshape(*x.shape[:-2], -1))


@dataclass(frozen=True)
class Slices:
    """What a process must know of matrices of which it holds a slice, along their longer side, while others hold the rest.

    Attributes:
        shape: (m, n) of the whole matrices.
        dim: which dimension is cut, 0 or 1: the longer one, either where they are square.
        start, stop: this process's rows or columns of it.
        add_up: adds a tensor up over all that hold slices, in place; they call it equally often, also with an empty slice.
    """

    shape: tuple[int, int]
    dim: int
    start: int
    stop: int
    add_up: Callable[[Tensor], None]

    @property
    def part(self) -> Part:
        """For deflation, which works alike wherever a square matrix is cut."""
        return Part((self.start, self.stop) if self.shape[0] == self.shape[1] and self.dim == 0 else None, self.add_up)


def orthogonalize_batch(
    batch: Tensor,
    schedule: Schedule,
    *,
    compute_dtype: torch.dtype,
    eps: float = 1e-20,
    keep: Tensor | None = None,
    measure: bool = False,
    slices: Slices | None = None,
    products: SymmetricProducts | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Newton–Schulz on (B, m, n). The input is workspace: its values are lost.

    Each matrix is divided by max(‖·‖_F, eps) first, and by what the schedule's normalisation adds once the first Gram matrix is
    known. Where the bools `keep`, (B,), are False the result is exactly zero: a finite matrix divided by infinity.

    With `slices` the batch is this process's part of larger matrices, and so is the result. Gram matrices are added up over all parts
    (every segment's, in fp32 at least), and so are the squares of norms and what deflation needs; steps on a Gram matrix are taken by
    all, alike. The moments are those of the whole matrices.

    `products`: how symmetric products are taken; None: as usual on this kind of device.

    Returns:
        (B, m, n) in `compute_dtype`; and with `measure` the moments, (B, `moment_count`), as `Recorder` has them, else None.
    """
    recorder = Recorder.of(batch, schedule) if measure else None
    if batch.numel() == 0 and slices is None:
        return batch.to(compute_dtype, copy=True), None if recorder is None else recorder.moments
    x = _normalised(batch, schedule, compute_dtype, eps, keep, slices, recorder)
    y = torch.empty_like(x)
    shape = tuple(x.shape[1:]) if slices is None else slices.shape
    products = products or products_on(x.device.type)
    segments = segments_of(schedule.steps, *shape, x.dtype, products)
    # One matrix after the other where a batched product gains nothing: on a CPU the working set then fits its caches. Otherwise batched, a
    # batch of one as well: a matrix comes out the same to the last bit whichever others share its owner. (In half precision not on a CPU.)
    one_by_one = x.device.type == "cpu" and (min(shape) >= 192 or x.dtype in (torch.bfloat16, torch.float16))
    with own_products(x.device.type):
        for k in range(x.shape[0]) if one_by_one else [slice(None)]:
            _iterate(x[k], y[k], schedule, segments, products, None if recorder is None else recorder[k], slices)
    return y if len(segments) % 2 else x, None if recorder is None else recorder.moments


def _normalised(
    batch: Tensor,
    schedule: Schedule,
    compute_dtype: torch.dtype,
    eps: float,
    keep: Tensor | None,
    slices: Slices | None,
    recorder: Recorder | None,
) -> Tensor:
    """(B, m, n) in `compute_dtype`, divided by Frobenius norms and deflated as the schedule says."""
    norm = frobenius_norms(batch)
    if slices is not None:
        slices.add_up(norm.square_())
        norm.sqrt_()
    norm.clamp_(min=eps)
    if keep is not None:
        norm.masked_fill_(~keep.view(-1, 1, 1), float("inf"))
    if batch.dtype != torch.float64:
        norm = norm.to(torch.float32)
    norm.masked_fill_(norm == 0, float("inf"))  # an eps of 0, or one that fp32 doesn't hold
    deflated = min(schedule.deflation, *(tuple(batch.shape[1:]) if slices is None else slices.shape))
    if not deflated:
        return batch.div_(norm) if batch.dtype == compute_dtype else (batch / norm).to(compute_dtype)
    # in fp32 at least, and only what is left is rounded, at its own scale
    batch = batch.to(torch.promote_types(batch.dtype, torch.float32)).div_(norm)
    with own_products(batch.device.type, fp32=_fp32_of_deflation(batch.device.type, compute_dtype)):
        tau = flatten_dominant(
            batch,
            deflated,
            tall=batch.shape[-2] > batch.shape[-1] if slices is None else slices.shape[0] > slices.shape[1],
            part=None if slices is None else slices.part,
            dominant=None if recorder is None else recorder.dominant,
        )
    if recorder is not None:
        recorder.flattened(tau)
    return batch.to(compute_dtype)


def _fp32_of_deflation(device_type: str, compute_dtype: torch.dtype) -> str:
    """What fp32 factors of deflation's products are rounded to: TF32 where what follows is less exact anyway, and nothing elsewhere.

    (On momentum of three models, factors rounded to TF32 left errors the same to 1e-4; it is seven times as fast on an H100.)
    """
    return "tf32" if device_type == "cuda" and (compute_dtype.itemsize < 4 or fp32_precision(device_type) != "ieee") else "ieee"


def _iterate(
    x: Tensor,
    y: Tensor,
    schedule: Schedule,
    segments: Sequence[int],
    products: SymmetricProducts,
    recorder: Recorder | None,
    slices: Slices | None,
) -> None:
    """Newton–Schulz in segments, one matrix or a batch: of each, A = XXᵀ, then steps, and X ← RX (XᵀX and XR where X is tall).

    Works in x and y in turns: the result is in y after an odd number of segments.
    """
    tall = x.shape[-2] > x.shape[-1] if slices is None else slices.dim == 0
    small = x.shape[-1 if tall else -2]
    gram, polynomial = (x.new_empty(*x.shape[:-2], small, small) for _ in range(2))
    spares = tuple(torch.empty_like(gram) for _ in range(2)) if max(segments) > 1 else (gram, gram)
    iteration = _Iteration(gram, polynomial, products, recorder, tall)
    k = 0
    for length in segments:
        products.multiply(*((x.mT, x) if tall else (x, x.mT)), gram)
        if slices is not None:
            slices.add_up(gram)
        if k == 0 and schedule.normalisation != "frobenius":
            iteration.squared = schedule.normalisation == "schatten8"
            scale = _divide_by_schatten(x, gram, polynomial if iteration.squared else None, products)
            if recorder is not None:
                recorder.divided_by(scale[..., 0, 0])
        if length == 1:
            iteration.direct_step(x, y, schedule.steps[k], k)
        else:
            iteration.gram_segment(x, y, spares, schedule.steps[k : k + length], k)
        k += length
        x, y = y, x
    if recorder is not None:
        recorder.after_all(x, None if slices is None else slices.add_up)


@dataclass
class _Iteration:
    """What direct steps and Gram segments share.

    Attributes:
        gram, polynomial: A = XXᵀ of the iterate, and room for P = bA + cA².
        squared: whether `polynomial` holds A² already.
    """

    gram: Tensor
    polynomial: Tensor
    products: SymmetricProducts
    recorder: Recorder | None
    tall: bool
    squared: bool = False

    def direct_step(self, x: Tensor, y: Tensor, step: Coefficients, k: int) -> None:
        """Step k on X itself: Y = aX + PX (or XP)."""
        self._take_polynomial(step, k)
        multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
        multiply_add(x, *((x, self.polynomial) if self.tall else (self.polynomial, x)), beta=step[0], out=y)

    def gram_segment(self, x: Tensor, y: Tensor, spares: tuple[Tensor, ...], steps: Sequence[Coefficients], k: int) -> None:
        """Steps k and following on the Gram matrix alone: R ← aR + PR (at first a + P) and A ← QAQ, Q = a + P; then Y = RX (or XR)."""
        product = torch.mm if x.ndim == 2 else torch.bmm
        gram, polynomial, (root, spare) = self.gram, self.polynomial, spares
        for i, step in enumerate(steps):
            self._take_polynomial(step, k + i)
            if i > 0:
                self.products.multiply(polynomial, root, spare, addend=root, beta=step[0])
                root, spare = spare, root
            if i < len(steps) - 1:
                polynomial.diagonal(dim1=-2, dim2=-1).add_(step[0])
                if i == 0:
                    root.copy_(polynomial)
                product(gram, polynomial, out=spare)  # whole: see restarts on the order of factors
                self.products.multiply(polynomial, spare, gram)
        product(*((x, root.mT) if self.tall else (root, x)), out=y)  # root is symmetric but for rounding

    def _take_polynomial(self, step: Coefficients, k: int) -> None:
        """P of step k, and its moments."""
        _, b, c = step
        if self.squared:
            self.polynomial.mul_(c).add_(self.gram, alpha=b)
            self.squared = False
        else:
            self.products.multiply(self.gram, self.gram, self.polynomial, addend=self.gram, beta=b, alpha=c)
        if self.recorder is not None:
            self.recorder.before_step(k, self.gram, self.polynomial)


def _divide_by_schatten(x: Tensor, gram: Tensor, squared: Tensor | None, products: SymmetricProducts) -> Tensor:
    """Divide X, and its Gram matrix A with it, by (tr A²)^¼ or, where there is room for A² in `squared`, by (tr A⁴)^⅛.

    `squared` then holds A² of the divided X. The norms are taken in fp32 or more, of A divided by its own norm first, so that
    nothing underflows in fp16. Returns what X was divided by, (..., 1, 1); a zero matrix is divided by 1.
    """
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32

    def norm(matrix: Tensor) -> Tensor:
        value = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=precise)
        return value.masked_fill_(value == 0, 1.0)

    outer = norm(gram)  # (Σσ⁴)^½
    gram.div_(outer)
    scale = outer.sqrt()
    if squared is not None:
        products.multiply(gram, gram, squared)
        inner = norm(squared)  # (Σσ⁸)^½ of X/scale
        squared.div_(inner)
        root = inner.sqrt_()
        gram.div_(root)
        scale = scale * root.sqrt()
    x.div_(scale)
    return scale


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
