"""Look at the spectra of sharded matrices without gathering them, with any optimizer: before a switch to Muon, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .polar.matrix_view import Matrix, MatrixView, matrices_of
from .polar.products import own_products
from .rendezvous import gather_objects
from .sharding.exchange import local_view
from .sharding.layout import Fragment, Placement, ShardLayout, box_shape, dtensor_fragments, whole
from .spectrum.bidiagonal import ITERATIONS, QuantileEstimate, RowShard, golub_kahan_quantiles


@torch.no_grad()
def measure_spectra(
    tensors: Mapping[str, Tensor],
    *,
    views: Mapping[str, MatrixView] | None = None,
    layouts: Mapping[str, ShardLayout] | None = None,
    process_group: dist.ProcessGroup | None = None,
    iterations: int = ITERATIONS,
    probes: int | None = None,
    step: int = 0,
) -> dict[str, QuantileEstimate | None]:
    """Quantiles of the singular values of every matrix, relative to its Frobenius norm. Collective over `process_group`.

    With AdamW pass its `exp_avg` by parameter name: momentum, but for its decay. Every iteration does one all-reduce of
    probes·(cols + probes) fp64 numbers per matrix; nothing else travels, but for the few rows that flat shards cut in two.

    Args:
        tensors: name -> plain tensor (whole on every rank), DTensor, or this rank's fragment where `layouts` names it.
        views: name -> how a parameter is several matrices (fused projections, experts); default one matrix, or a stack of them.
        layouts: name -> where a fragment lies; on every rank of the group.
        process_group: the ranks that share the sharded tensors. None: all ranks.
        iterations, probes, step: as in `golub_kahan_quantiles`.

    Returns:
        name, or name[k] for the k-th of several matrices, -> estimate; None for a matrix of zeros.

    Raises:
        ValueError: a tensor that is no matrix, lives on other ranks, or is cut along both dimensions.
    """
    views, layouts = views or {}, layouts or {}
    distributed = dist.is_available() and dist.is_initialized()
    group = process_group if process_group is not None else (dist.group.WORLD if distributed else None)
    ranks = tuple(dist.get_process_group_ranks(group)) if distributed and group is not None else (0,)
    me = ranks.index(dist.get_rank()) if distributed else 0

    def reduce(total: Tensor) -> Tensor:
        if len(ranks) > 1:
            dist.all_reduce(total, group=group)
        return total

    shards, names = [], []
    for name, tensor in sorted(tensors.items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        placement = _placement(name, tensor, layouts.get(name), ranks, group)
        view = views.get(name, MatrixView())
        matrices = matrices_of(placement.shape, view, name)
        for k, matrix in enumerate(matrices):
            names.append(name if len(matrices) == 1 else f"{name}[{k}]")
            shards.append(_shard(names[-1], placement, matrix, local, me, reduce))
    return dict(zip(names, golub_kahan_quantiles(shards, reduce, iterations=iterations, probes=probes, step=step), strict=True))


def _placement(name: str, tensor: Tensor, layout: ShardLayout | None, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> Placement:
    if layout is not None:
        fragments: list[Fragment] = [layout.fragment()] * len(ranks)
        if len(ranks) > 1:
            fragments = gather_objects(layout.fragment(), group, "measure spectra")
        return Placement(name=name, shape=layout.global_shape, fragments=tuple(fragments))
    if isinstance(tensor, DTensor):
        on, held = dtensor_fragments(tensor, name)
        if not set(on) <= set(ranks):
            raise ValueError(f"{name} lives on ranks {list(on)}, beyond process_group's {list(ranks)}: pass a group that covers them")
        where = dict(zip(on, held, strict=True))
        return Placement(name=name, shape=tuple(tensor.shape), fragments=tuple(where.get(r, ()) for r in ranks))
    return Placement(name=name, shape=tuple(tensor.shape), fragments=(((whole(tuple(tensor.shape))),),) * len(ranks))


def _shard(name: str, placement: Placement, matrix: Matrix, local: Tensor, me: int, reduce: Callable[[Tensor], Tensor]) -> RowShard:
    """This rank's rows of a matrix, or of its transpose where it is cut by columns; every row with the first rank that has it."""
    height, width = matrix.shape
    lead = len(matrix.box) - 2
    pieces = placement.pieces(matrix.box)
    offsets = [start for start, _ in matrix.box]

    def spans(box: tuple[tuple[int, int], ...]) -> tuple[int, int, int, int]:
        """A piece's rows and columns in its matrix."""
        (r0, r1), (c0, c1) = ((a - o, b - o) for (a, b), o in zip(box[lead:], offsets[lead:], strict=True))
        return r0, r1, c0, c1

    if len(matrix.box) != lead + 2 or box_shape(matrix.box)[lead:] != (height, width):
        raise ValueError(f"{name}: only matrices and stacks of them are measured, not convolutions")
    by_rows = sum(c1 - c0 == width for _, _, c0, c1 in (spans(box) for box, _ in pieces))
    transposed = not by_rows and all(r1 - r0 == height for r0, r1, _, _ in (spans(box) for box, _ in pieces))
    rows, cols = (width, height) if transposed else (height, width)
    blocks: dict[int, Tensor] = {}  # first row -> rows that are whole here
    cut: dict[int, int] = {}  # rows that are in pieces -> the rank that gets them
    mine: list[tuple[int, int, int, Tensor]] = []
    stored_as_box = len(placement.fragments[me]) == 1 and box_shape(placement.fragments[me][0]) == tuple(local.shape)
    for box, holders in pieces:
        r0, r1, c0, c1 = spans(box)
        part = None
        if holders[0] == me:
            part = local_view(placement.fragments[me], box, stored_as_box).of(local).reshape(r1 - r0, c1 - c0)
            part = part.to(torch.float64 if part.dtype == torch.float64 else torch.float32)
        if transposed:
            r0, r1, c0, c1, part = c0, c1, r0, r1, None if part is None else part.mT
        if c1 - c0 == cols:
            if part is not None:
                blocks[r0] = part
            continue
        for r in range(r0, r1):
            cut.setdefault(r, holders[0])
        if part is not None:
            mine.append((r0, r1, c0, part))
    if len(cut) > 4 * len(placement.fragments):
        raise ValueError(f"{name} is cut along both dimensions, which can't be measured without gathering it: gather it first")
    if cut:
        order = {r: k for k, r in enumerate(sorted(cut))}
        whole_rows = torch.zeros(len(cut), cols, dtype=torch.float64, device=local.device)
        for r0, r1, c0, part in mine:
            whole_rows[[order[r] for r in range(r0, r1)], c0 : c0 + part.shape[1]] = part.double()
        whole_rows = reduce(whole_rows)
        blocks.update({r: whole_rows[k : k + 1] for r, k in order.items() if cut[r] == me})
    held = torch.tensor([r for first in sorted(blocks) for r in range(first, first + len(blocks[first]))], dtype=torch.int64, device="cpu")
    dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
    stack = torch.cat([blocks[first].to(dtype) for first in sorted(blocks)]) if blocks else local.new_zeros(0, cols, dtype=dtype)

    def forward(v: Tensor) -> Tensor:
        with own_products(stack.device.type, fp32="ieee"):
            return (stack @ v.to(dtype)).double()

    def backward(u: Tensor) -> Tensor:
        with own_products(stack.device.type, fp32="ieee"):
            return (stack.mT @ u.to(dtype)).double()

    energy = float(torch.linalg.vector_norm(stack, dtype=torch.float64) ** 2)
    return RowShard(name, rows, cols, held, forward, backward, energy, local.device)
