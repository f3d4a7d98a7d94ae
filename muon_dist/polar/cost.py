"""What an orthogonalisation costs, and the cheaper of its forms: direct, or steps in Gram space.

The choice is a pure function of shape, schedule, dtype and how products are taken on a kind of device. It depends neither on timings, so
that every rank and every resumed run chooses alike, nor on the batch, so that a matrix's update doesn't depend on which others share its
owner.
"""

from __future__ import annotations

import functools

import torch

from .coefficients import Coefficients
from .flattening import PASSES, flattening_flops
from .forms import cheapest_segments
from .polynomials import Schedule
from .products import SymmetricProducts
from .restarts import single_steps

# Operations in the time that a product takes to bring one element of its result to memory: from the rate of products over the bandwidth of
# fp32 on a CPU core (measured: 90 GFLOP/s, 10 GB/s), of bf16 on an H100 (data sheet: 990 TFLOP/s, 3.35 TB/s).
OPERATIONS_PER_ELEMENT = {"cpu": 64, "cuda": 1024}

# (kind of device, bytes of the compute dtype) -> how many of its operations take as long as one of deflation, with the matrix and in fp64:
# on CUDA half precision, TF32 and fp64 by an H100's data sheet (990, 495 and 67 TFLOP/s), on a CPU by the width of its vectors
AS_LONG_AS = {("cpu", 4): (1, 2), ("cpu", 8): (1, 1), ("cuda", 2): (2, 15), ("cuda", 4): (1, 1), ("cuda", 8): (1, 1)}


def flops(rows: int, cols: int, steps: int, *, deflation: int = 0) -> int:
    """Floating-point operations of `steps` quintic steps on a rows × cols matrix in the direct form: k(4m²n + 2m³), m = min(rows, cols).

    With those of deflation; passes over single matrices are left out.
    """
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m**3) + sum(flattening_flops(m, n, deflation))


def flops_of(rows: int, cols: int, schedule: Schedule, compute_dtype: torch.dtype, products: SymmetricProducts) -> int:
    """What `orthogonalize_batch` takes for one matrix: of the form that is chosen, with half-computed symmetric products."""
    m, n = min(rows, cols), max(rows, cols)
    segments = segments_of(schedule.steps, rows, cols, compute_dtype, products)
    steps = sum(segment_flops(m, n, length, compute_dtype, products) for length in segments)
    return steps + deflation_flops(m, n, schedule.deflation, compute_dtype, products)


def deflation_flops(m: int, n: int, deflation: int, compute_dtype: torch.dtype, products: SymmetricProducts) -> int:
    """Of `flatten_dominant`, in operations of the compute dtype that take as long."""
    with_matrix, precise = flattening_flops(m, n, deflation)
    of_matrix, of_precise = AS_LONG_AS.get((products.device_type, compute_dtype.itemsize), (1, 1))
    return of_matrix * with_matrix + of_precise * precise


def segment_flops(m: int, n: int, length: int, compute_dtype: torch.dtype, products: SymmetricProducts) -> int:
    """Of XXᵀ, `length` steps on it, and the product with X; m <= n.

    A step takes A²; each but the first R ← QR, each but the last A ← Q(AQ). All but AQ are computed as symmetric.
    """
    symmetric = length + 2 * (length - 1)
    return 2 * products.computed_elements(m, compute_dtype) * (n + symmetric * m) + 2 * (length - 1) * m**3 + 2 * m * m * n


def sliced_flops_of(
    rows: int, cols: int, schedule: Schedule, compute_dtype: torch.dtype, products: SymmetricProducts
) -> tuple[int, int, int]:
    """What every process takes where each holds a slice of a matrix along its longer side (`newton_schulz.Slices`).

    Returns:
        Operations on Gram matrices; those per row or column of its slice; and the bytes that are added up, of Gram matrices above all.
    """
    m, d = min(rows, cols), min(schedule.deflation, rows, cols)
    segments = segments_of(schedule.steps, rows, cols, compute_dtype, products)
    alone = sum(segment_flops(m, 0, length, compute_dtype, products) for length in segments)
    each = sum(segment_flops(m, 1, length, compute_dtype, products) for length in segments) - alone
    shared = deflation_flops(m, 0, d, compute_dtype, products)
    each += deflation_flops(m, 1, d, compute_dtype, products) - shared
    added_up = PASSES * (m * d * max(compute_dtype.itemsize, 4) + 8 * d * d) + 8 * d * d
    return alone + shared, each, len(segments) * m * m * max(compute_dtype.itemsize, 4) + added_up


@functools.lru_cache(maxsize=4096)
def segments_of(
    steps: tuple[Coefficients, ...], rows: int, cols: int, compute_dtype: torch.dtype, products: SymmetricProducts
) -> tuple[int, ...]:
    """How many steps are taken on each Gram matrix: (1, 1, …) is the direct form, (1, 2, 2) starts from X three times. See `restarts`."""
    m, n = min(rows, cols), max(rows, cols)
    if m == 0:
        return single_steps(len(steps))
    per_element = OPERATIONS_PER_ELEMENT.get(products.device_type, OPERATIONS_PER_ELEMENT["cuda"])

    def cost(length: int) -> float:
        squares = 1 + length + 3 * (length - 1)
        return segment_flops(m, n, length, compute_dtype, products) + per_element * (squares * m * m + m * n)

    return cheapest_segments(steps, products.precision(compute_dtype), cost)


def form_name(segments: tuple[int, ...]) -> str:
    """ "direct", or such as "Gram 1+2+2", for people."""
    return "direct" if segments == single_steps(len(segments)) else "Gram " + "+".join(map(str, segments))


def workspace_bytes(rows: int, cols: int, *, itemsize: int, in_place: bool, deflation: int = 0) -> int:
    """Bytes that `orthogonalize_batch` needs for a rows × cols matrix beside its input: a second copy to work in turns, the
    Gram matrix and its polynomial, two more of that size in Gram space; and where the input is in another dtype than `itemsize` says,
    a normalised copy of it. Deflation adds a copy in fp32 if the products run in less, and vectors in fp64: of an eighth of the directions
    they are as large as a copy.
    """
    small = min(rows, cols)
    deflated = rows * cols * (itemsize + (4 if itemsize < 4 else 0)) if deflation else 0
    return itemsize * (rows * cols * (1 if in_place else 2) + 4 * small * small) + deflated
