"""What a step does, as a list of events: collectives by kind with their bytes, waits, and orthogonalisations."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import muon_dist.step
from muon_dist.sharding import exchange


class Collectives(TorchDispatchMode):
    """Every c10d operation that is dispatched while the mode is on, by name: also those that DTensor hides."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class _Work:
    def __init__(self, work: Any, log: list[tuple[str, Any]], number: int) -> None:
        self._work, self._log, self._number = work, log, number

    def wait(self) -> None:
        self._log.append(("wait", self._number))
        self._work.wait()


class Recorder:
    """Patches the exchange and Newton–Schulz of this process; `events` holds (what, detail) in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.bytes_sent = self.bytes_received = 0
        self.matrices: list[tuple[int, ...]] = []

    def __enter__(self) -> Recorder:
        self._all_to_all, self._orthogonalize = dist.all_to_all_single, muon_dist.step.orthogonalize_batch

        def all_to_all_single(out: Any, into: Any, in_splits: Any, out_splits: Any, **options: Any) -> _Work:
            me = dist.get_rank(options["group"])
            assert in_splits[me] == out_splits[me] == 0  # what stays at home doesn't travel
            self.bytes_sent += sum(out_splits) * into.element_size()
            self.bytes_received += sum(in_splits) * out.element_size()
            number = sum(kind == "launch" for kind, _ in self.events)
            self.events.append(("launch", number))
            return _Work(self._all_to_all(out, into, in_splits, out_splits, **options), self.events, number)

        def orthogonalize_batch(batch: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.events.append(("ns", tuple(batch.shape)))
            self.matrices.extend([tuple(batch.shape[1:])] * batch.shape[0])
            result = self._orthogonalize(batch, *args, **options)
            self.events.append(("ns end", tuple(batch.shape)))
            return result

        exchange.dist.all_to_all_single = all_to_all_single  # type: ignore[assignment]
        muon_dist.step.orthogonalize_batch = orthogonalize_batch
        return self

    def __exit__(self, *exc: object) -> None:
        dist.all_to_all_single = self._all_to_all
        muon_dist.step.orthogonalize_batch = self._orthogonalize
