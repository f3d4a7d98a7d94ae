"""A Triton kernel for products that are known to be symmetric: tiles at and below the diagonal are computed, and written twice.

Needs Triton, which comes with torch for CUDA; only `products` imports this, when it is asked for. With TRITON_INTERPRET=1 set before that,
the same code runs on CPU tensors in Triton's interpreter, to be tested. One fixed configuration per dtype and size: nothing is tuned at
run time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _place(number):
    """Row and column of a tile of the lower triangle, counted row by row: (0, 0), (1, 0), (1, 1), (2, 0), …"""
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # may be off by one
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    return i, number - i * (i + 1) // 2


@triton.jit
def _tiles(
    first,
    second,
    addend,
    out,
    size,
    depth,
    first_batch,
    first_row,
    first_column,
    second_batch,
    second_row,
    second_column,
    addend_batch,
    addend_row,
    addend_column,
    out_batch,
    out_row,
    out_column,
    alpha,
    beta,
    HAS_ADDEND: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i, j = _place(tl.program_id(0))
    # Offsets are of 64 bits: one batch may hold more than 2³¹ elements.
    batch = tl.program_id(1).to(tl.int64)
    rows = i.to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = j.to(tl.int64) * TILE + tl.arange(0, TILE)
    left = first + batch * first_batch + rows[:, None] * first_row
    right = second + batch * second_batch + columns[None, :] * second_column

    total = tl.full((TILE, TILE), 0.0, tl.float32)  # tl.zeros is compiled when Triton is imported, and can't be interpreted later
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH).to(tl.int64)
        a = tl.load(left + inner[None, :] * first_column, mask=(rows[:, None] < size) & (inner[None, :] < depth), other=0.0)
        b = tl.load(right + inner[:, None] * second_row, mask=(inner[:, None] < depth) & (columns[None, :] < size), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    total *= alpha

    inside = (rows[:, None] < size) & (columns[None, :] < size)
    if HAS_ADDEND:
        added = tl.load(
            addend + batch * addend_batch + rows[:, None] * addend_row + columns[None, :] * addend_column, mask=inside, other=0.0
        )
        total += beta * added.to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if i == j:  # how a product rounds may depend on the place in its tile
        result = tl.where(rows[:, None] >= columns[None, :], result, tl.trans(result))
    tl.store(out + batch * out_batch + rows[:, None] * out_row + columns[None, :] * out_column, result, mask=inside)
    if i != j:
        mirrored = (columns[:, None] < size) & (rows[None, :] < size)
        tl.store(out + batch * out_batch + columns[:, None] * out_row + rows[None, :] * out_column, tl.trans(result), mask=mirrored)


def symmetric_product(first: Tensor, second: Tensor, out: Tensor, addend: Tensor | None, beta: float, alpha: float, tile: int) -> None:
    """As `products.SymmetricProducts.multiply`, for bf16, fp16 and fp32 (accumulated in fp32), any strides, in tiles of `tile` rows."""
    size, depth = out.shape[-1], first.shape[-1]
    batch = out.shape[0] if out.ndim == 3 else 1
    if not size or not batch:
        return
    strides = [(t.stride() if t.ndim == 3 else (0, *t.stride())) for t in (first, second, out if addend is None else addend, out)]
    count = triton.cdiv(size, tile)
    half = out.dtype in (torch.bfloat16, torch.float16)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _tiles[count * (count + 1) // 2, batch](
            first,
            second,
            out if addend is None else addend,
            out,
            size,
            depth,
            *(s for three in strides for s in three),
            alpha,
            beta,
            HAS_ADDEND=addend is not None,
            TILE=tile,
            DEPTH=64 if half else 32,
            num_warps=8 if tile > 64 else 4,
            num_stages=3 if half else 2,
        )
