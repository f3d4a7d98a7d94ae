"""What the ranks of a domain must share, compared at binding: what they train, replicas' values, and optimizer state.

A difference raises on every rank and names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .bound import BoundParameter
from .domain import Domain, Ranks
from .groups import POLICY_KEYS
from .rendezvous import BIND, gather_objects, wait_in_time
from .sharding.layout import Fragment, local_tensor
from .sharding.state import is_elsewhere, is_unset, unset

# Hyperparameters that the ranks of a domain must share: owners use theirs, holders their own.
COMPARED = ("lr", "weight_decay", "momentum", "nesterov", "adjust_lr_fn", "extra_scale_factor", "betas", "eps")

_UNSET, _ELSEWHERE, _HERE = range(3)


def compare(domain: Domain) -> None:
    """Compare what is trained and how, optimizer state, the plan that follows from both, and what replicas hold.

    Raises:
        ValueError: the ranks differ.
    """
    if domain.process_group is None:
        return
    _compare_parameters(domain)
    compare_state(domain)
    if not all_have(bytes.fromhex(domain.plan.digest()), domain):
        raise ValueError(
            f"the ranks {list(domain.ranks)} don't agree on what they train: their layouts, polynomials, dtypes or bucket sizes differ"
        )
    sums = all_gather_rows(torch.stack([checksum(b.member.local) for b in domain.parameters]).cpu(), domain)
    for position, b in enumerate(domain.parameters):
        differing = _differing_replicas(b, sums[:, position])
        if differing is not None:
            rank, twin = (domain.ranks[k] for k in differing)
            raise ValueError(
                f"replicas differ: {b.name or f'parameter {position}'} has other values on rank {rank} than on rank "
                f"{twin}, though both hold the same piece. Broadcast the model from one rank before the first step"
            )


def _compare_parameters(domain: Domain) -> None:
    """Names, routes, shapes, and the hyperparameters that owners use."""
    lines = [
        f"{b.name or b.position}: {b.member.route.algorithm} {b.placement.shape} {b.member.tensor.dtype} "
        f"{[b.group.get(k) for k in (*COMPARED, *sorted(POLICY_KEYS), 'rule', *b.rule.hyperparameters)]}"
        for b in domain.parameters
    ]
    lines.append(f"fp32 products in {domain.products.fp32} (torch.set_float32_matmul_precision)")
    if not all_have(hashlib.sha256("\n".join(lines).encode()).digest(), domain):
        everyone = gather_objects(lines, domain.process_group)
        raise ValueError(f"the ranks {list(domain.ranks)} don't agree on what they train: {_first_difference(domain, everyone)}")


def compare_state(domain: Domain) -> None:
    """Compare optimizer state: that all ranks have it or none, the steps taken, measured spectra, and replicas' values.

    Raises:
        ValueError: the ranks differ, as after a checkpoint that only some of them have loaded.
    """
    told = all_gather_rows(torch.stack([_described(b) for b in domain.parameters]).flatten(), domain)
    told = told.view(len(domain.ranks), len(domain.parameters), -1)
    for position, b in enumerate(domain.parameters):
        rows, name = told[:, position], b.name or f"parameter {position}"
        holders = [rank for rank, fragment in enumerate(b.placement.fragments) if fragment and rows[rank, 0] != _ELSEWHERE]
        for what, ranks, column in (
            ("optimizer state", holders, 0),
            ("a step count", [rank for rank in range(len(rows)) if rows[rank, 0] == _HERE], 1),
            ("a measured spectrum", range(len(rows)), 2),
            ("state of its matrices", range(len(rows)), 4),
        ):
            unlike = next((rank for rank in ranks if rows[rank, column] != rows[ranks[0], column]), None)
            if unlike is not None:
                raise ValueError(_unlike_state(domain, name, what, ranks[0], unlike, rows[:, column]))
        differing = _differing_replicas(b, rows[:, 3], [rank for rank in holders if rows[rank, 0] == _HERE])
        if differing is not None:
            raise ValueError(_unlike_state(domain, name, "values of optimizer state", differing[1], differing[0], rows[:, 3]))


def _described(b: BoundParameter) -> Tensor:
    """(5,), int64: whether there is state, its step count, and checksums of the spectrum, of values, and of what is kept of matrices."""
    entry = b.state
    values = [entry.get(key, unset()) for key in b.rule.values]
    code = _ELSEWHERE if any(map(is_elsewhere, values)) else _UNSET if any(map(is_unset, values)) else _HERE
    counted = b.rule.counts_steps and code == _HERE and not is_unset(entry.get("step", unset()))
    step = int(entry["step"]) if counted else 0
    spectrum = checksum(entry["spectrum"]) if isinstance(entry.get("spectrum"), Tensor) else 0
    total = sum(((k + 1) * checksum(local_tensor(value)).cpu() for k, value in enumerate(values)), start=torch.zeros((), dtype=torch.int64))
    known = [entry[value.name] for value in b.rule.of_matrices if value.name in entry]
    numbers = (code, step, spectrum, total if code == _HERE else 0, sum((checksum(v).cpu() for v in known), start=torch.tensor(0)))
    return torch.stack([torch.as_tensor(number, dtype=torch.int64, device="cpu") for number in numbers])


def _unlike_state(domain: Domain, name: str, what: str, first: int, second: int, values: Tensor) -> str:
    there, here = domain.ranks[first], domain.ranks[second]
    if what == "optimizer state":
        with_state, without = (there, here) if values[first] == _HERE else (here, there)
        difference = f"rank {with_state} has some for {name}, rank {without} has none"
    elif what == "a step count":
        difference = f"{name} is at step {int(values[first])} on rank {there} and at step {int(values[second])} on rank {here}"
    else:
        difference = f"{name} has other {what.removeprefix('a ')} on rank {here} than on rank {there}"
    return f"optimizer state differs between the ranks: {difference}. Load the same checkpoint on all of them, or on none"


def _differing_replicas(b: BoundParameter, checksums: Tensor, among: Sequence[int] | None = None) -> tuple[int, int] | None:
    """The first (position of a rank, of an earlier one) that hold the same piece of a parameter with other checksums."""
    first: dict[Fragment, int] = {}
    for rank, fragment in enumerate(b.placement.fragments):
        if not fragment or (among is not None and rank not in among):
            continue
        twin = first.setdefault(fragment, rank)
        if checksums[rank] != checksums[twin]:
            return rank, twin
    return None


def _first_difference(domain: Domain, everyone: Sequence[Sequence[str]]) -> str:
    for rank, lines in zip(domain.ranks, everyone, strict=True):
        if len(lines) != len(everyone[0]):
            return f"rank {domain.ranks[0]} has {len(everyone[0]) - 1} parameters, rank {rank} has {len(lines) - 1}" + _only_one_has(
                everyone[0], lines, domain.ranks[0], rank
            )
        for ours, theirs in zip(everyone[0], lines, strict=True):
            if ours != theirs:
                return f"rank {domain.ranks[0]} has {ours!r} where rank {rank} has {theirs!r}"
    raise AssertionError("digests differ and lines don't")


def _only_one_has(ours: Sequence[str], theirs: Sequence[str], here: int, there: int) -> str:
    first, second = ({line.split(":")[0] for line in lines} for lines in (ours, theirs))
    for only, rank in ((first - second, here), (second - first, there)):
        if only:
            return f"; only rank {rank} trains {min(only)}. Freeze it on all ranks, or on none"
    return ""


def all_have(digest: bytes, shared: Ranks) -> bool:
    """Whether all ranks have the same digest. Collective."""
    digests = all_gather_rows(torch.tensor(list(digest), dtype=torch.int64, device="cpu"), shared)
    return bool((digests == digests[0]).all())


def all_gather_rows(row: Tensor, shared: Ranks, what: str = BIND) -> Tensor:
    """Every rank's row, (ranks, len(row)), on the CPU; raises where a rank doesn't answer in time."""
    if shared.process_group is None:
        return row.unsqueeze(0).cpu()
    row = row.to(shared.device)
    rows = [torch.empty_like(row) for _ in shared.ranks]
    wait_in_time(dist.all_gather(rows, row, group=shared.process_group, async_op=True), shared.ranks, what)
    return torch.stack(rows).cpu()


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that differs, all but surely, where two tensors differ in any bit or in the order of their elements."""
    bits = tensor.detach().reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    chunk = 1 << 22
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].to(torch.int64)
        weights = torch.arange(start, start + part.numel(), device=tensor.device).mul_(2 * 2_654_435_761).add_(1)  # odd
        total += (part * weights).sum()
    return total
