"""Products whose result is known to be symmetric: one triangle is computed and mirrored.

XXᵀ is symmetric, and so is every product of polynomials of one Gram matrix, since they commute.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# On a CPU, MKL reaches its full rate from about this many rows a block on (measured; twelve or more blocks gain nothing further)
_ROWS, _MOST_BLOCKS = 128, 8

# Rows of the Triton kernel's tiles: of small matrices, which would leave most of a GPU idle, and of others; fp32 has twice the bytes
_SMALL_TILE, _TILE, _SMALL = 64, 128, 1024


# How products round: a dtype, to which every result is rounded; or "tf32" or "bf16", to which fp32 factors are, and results are fp32
Precision = torch.dtype | str


def fp32_precision(device_type: str) -> str:
    """What torch rounds the factors of fp32 products to on a kind of device: "ieee" (not at all), "tf32" or "bf16".

    It is what `torch.set_float32_matmul_precision`, `allow_tf32` or `torch.backends` ask for; some devices round less.
    """
    if device_type not in ("cpu", "cuda"):
        return "ieee"
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    for setting in (backend.matmul, backend, torch.backends):  # each takes over what the next one says
        asked: str = getattr(setting, "fp32_precision", "none")
        if asked != "none":
            return asked
    return "ieee"


# Settings under which a GPU may add up products in half precision
_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


@contextmanager
def product_settings(device_type: str, wanted: Mapping[str, Any]) -> Iterator[None]:
    """torch's settings of matrix products on a CPU or on CUDA as `wanted`, by attribute, and afterwards as they were."""
    backends: Any = torch.backends
    matmul = (backends.cuda if device_type == "cuda" else backends.mkldnn).matmul
    before = {name: getattr(matmul, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(matmul, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@contextmanager
def own_products(device_type: str, *, fp32: str | None = None) -> Iterator[None]:
    """Products in the dtype of their factors, whatever a model's autocast says, and added up in fp32 where that is half precision:
    segments of Newton–Schulz are chosen for such sums. `fp32`: what fp32 factors are rounded to ("ieee": nothing), whatever torch's
    settings say.
    """
    wanted: dict[str, Any] = {}
    if device_type == "cuda":
        wanted = {name: False for name in _SUMS if getattr(torch.backends.cuda.matmul, name)}
    if fp32 is not None and fp32_precision(device_type) != fp32:
        wanted["fp32_precision"] = fp32
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext(), product_settings(device_type, wanted):
        yield


@dataclass(frozen=True)
class SymmetricProducts:
    """How symmetric products are taken on a kind of device.

    On a CPU: a few rows at a time, each up to the diagonal. Elsewhere torch's product of all of it; or, where `kernels_from` says so, the
    Triton kernel of `kernels`, which computes tiles up to the diagonal.

    Attributes:
        device_type: "cpu", "cuda", …
        kernels_from: rows of a result from which the kernel is used, in bf16, fp16 and fp32; None: never.
        fp32: what factors in fp32 are rounded to: "ieee" (not at all), "tf32" or "bf16"; torch's setting (`fp32_precision`).
    """

    device_type: str
    kernels_from: int | None = None
    fp32: str = "ieee"

    def precision(self, dtype: torch.dtype) -> Precision:
        """What decides how products in `dtype` round."""
        return self.fp32 if dtype == torch.float32 and self.fp32 != "ieee" else dtype

    def uses_kernel(self, size: int, dtype: torch.dtype) -> bool:
        return self.kernels_from is not None and size >= self.kernels_from and dtype != torch.float64

    @functools.cache  # noqa: B019 (there are one or two of these)
    def ranges(self, size: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of rows in which a size × size result is computed, each up to the diagonal; one range: all of it."""
        if self.uses_kernel(size, dtype):
            tile = _tile(size, dtype)
            return tuple((start, min(start + tile, size)) for start in range(0, size, tile))
        count = max(1, min(size // _ROWS, _MOST_BLOCKS)) if self.device_type == "cpu" else 1
        return tuple(itertools.pairwise(round(size * k / count) for k in range(count + 1)))

    @functools.cache  # noqa: B019
    def computed_elements(self, size: int, dtype: torch.dtype) -> int:
        """How many elements of a size × size result are computed, the others being mirrored."""
        return sum((stop - start) * stop for start, stop in self.ranges(size, dtype))

    def multiply(
        self, first: Tensor, second: Tensor, out: Tensor, *, addend: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
    ) -> None:
        """out ← beta·addend + alpha·first·second, or first·second without an addend, (m, m) or (B, m, m), where that is symmetric.

        `beta` and `alpha` go with an addend; `out` shares memory with none of the others.
        """
        size, dtype = out.shape[-1], out.dtype
        if self.uses_kernel(size, dtype):
            from .kernels import symmetric_product

            symmetric_product(first, second, out, addend, beta, alpha, _tile(size, dtype))
            return
        ranges = self.ranges(size, dtype)
        for start, stop in ranges:
            rows, columns, part = first[..., start:stop, :], second[..., :stop], out[..., start:stop, :stop]
            if addend is None:
                (torch.mm if out.ndim == 2 else torch.bmm)(rows, columns, out=part)
            else:
                multiply_add = torch.addmm if out.ndim == 2 else torch.baddbmm
                multiply_add(addend[..., start:stop, :stop], rows, columns, beta=beta, alpha=alpha, out=part)
        for start, stop in ranges[1:]:
            out[..., :start, start:stop].copy_(out[..., start:stop, :start].mT)


def _tile(size: int, dtype: torch.dtype) -> int:
    return _SMALL_TILE if size < _SMALL or dtype == torch.float32 else _TILE


def products_on(device_type: str, kernels_from: int | None = None) -> SymmetricProducts:
    """How symmetric products are taken on a kind of device under torch's settings as they are.

    Raises:
        ValueError: a kernel that can't work there.
    """
    check_kernels(kernels_from, device_type)
    return SymmetricProducts(device_type, kernels_from, fp32_precision(device_type))


def check_kernels(kernels_from: object, device_type: str | None = None) -> None:
    """Raise a ValueError where `symmetric_kernels` can't be what was given, or can't work on this kind of device."""
    if kernels_from is None:
        return
    if isinstance(kernels_from, bool) or not isinstance(kernels_from, int) or kernels_from < 1:
        raise ValueError(
            f"symmetric_kernels={kernels_from!r}: give the rows of a Gram matrix from which the Triton kernel is used, or None for never; "
            "`muon-dist bench ns --symmetric-kernels` measures where it is faster"
        )
    if device_type not in (None, "cuda") and not _interpreted():
        raise ValueError(f"symmetric_kernels needs a CUDA device, and matrices are orthogonalised on {device_type!r} here: leave it out")
    if device_type is not None and importlib.util.find_spec("triton") is None:
        raise ValueError("symmetric_kernels needs Triton, which comes with torch for CUDA: install it, or leave this out")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
