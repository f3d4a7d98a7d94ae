"""The order of one step, on every rank:

1.  One small all-reduce tells whether all gradients are finite and which parameters have one anywhere (`agreement`). What follows is
    decided by that tensor on the device; the host never waits for it.
2.  Bucket by bucket: momentum on the fragments this rank stores; their Nesterov form travels to the matrices' owners (one
    all-to-all); owners run Newton–Schulz on whole matrices, equal shapes as one batch; the updates travel back (one
    all-to-all) and are applied to the fragments. The next bucket travels while this one is orthogonalised.
3.  AdamW for the rest runs while the first bucket travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .bound import BoundParameter
from .domain import Domain
from .elementwise import adamw_step, decay, momentum_forms
from .polar.newton_schulz import Slices, moment_count, orthogonalize_batch
from .polar.plausible import are_plausible
from .polar.polynomials import Schedule
from .polar.scaling import update_scale
from .sharding.exchange import Leg, Traffic
from .sharding.layout import local_tensor
from .sharding.slicing import Slicing


@dataclass(kw_only=True)
class Step:
    """What one step works on, looked up once.

    Attributes:
        domains: those of this rank, in the order in which all ranks meet.
        state: the optimizer's, by parameter.
        local: what this rank stores of every parameter.
        grads: its part of every gradient, or None.
        go: a 0-d bool where a parameter is stored: whether its step happens.
    """

    domains: Sequence[Domain]
    state: Mapping[Any, dict[str, Any]]
    local: Mapping[BoundParameter, Tensor]
    grads: Mapping[BoundParameter, Tensor | None]
    go: Mapping[BoundParameter, Tensor]
    _forms: dict[BoundParameter, Tensor] = field(default_factory=dict)  # what owners orthogonalise, while some of it has yet to travel

    def take(self) -> None:
        """Update parameters and state. Collective."""
        jobs = [(domain, bucket) for domain in self.domains for bucket in range(len(domain.plan.buckets))]
        travelling = self._start(*jobs[0]) if jobs else None
        self._adamw()
        returning: tuple[Domain, Traffic] | None = None
        for job, (domain, bucket) in enumerate(jobs):
            arriving, travelling = travelling, self._start(*jobs[job + 1]) if job + 1 < len(jobs) else None
            assert arriving is not None
            batches = domain.exchange.finish_gather(bucket, arriving, domain.reading(self._forms))
            for i in domain.last_bucket[bucket]:
                del self._forms[domain.parameters[i]]
            updates = self._orthogonalize(domain, bucket, batches)
            scattered = domain.exchange.start_scatter(bucket, updates)
            self._apply(domain, domain.exchange.updates_at_home(bucket, updates))
            if returning is not None:
                self._apply(returning[0], returning[1].wait())
            returning = (domain, scattered)
        if returning is not None:
            self._apply(returning[0], returning[1].wait())

    def _start(self, domain: Domain, bucket: int) -> Traffic:
        self._momentum(domain, bucket)
        return domain.exchange.start_gather(bucket, domain.reading(self._forms))

    @record_function("muon_dist::momentum")
    def _momentum(self, domain: Domain, bucket: int) -> None:
        """Decay and momentum of the parameters whose first matrix is in this bucket; puts what travels into `_forms`."""
        by_group: dict[int, list[BoundParameter]] = {}
        for i in domain.first_bucket[bucket]:
            bound = domain.parameters[i]
            self._forms[bound] = self.local[bound]  # where another rank owns it, nothing of it is read here
            by_group.setdefault(id(bound.group), []).append(bound)
        for members in by_group.values():
            group = members[0].group
            decay([self.local[b] for b in members], 1 - float(group["lr"]) * group["weight_decay"], [self.go[b] for b in members])
            owned = [b for b in members if domain.owns(b)]
            if owned:
                buffers = [local_tensor(self.state[b.parameter]["momentum_buffer"]) for b in owned]
                fresh = momentum_forms(group, buffers, [self.grads[b] for b in owned], [self.go[b] for b in owned])
                self._forms.update(zip(owned, fresh, strict=True))

    def _orthogonalize(self, domain: Domain, bucket: int, batches: list[Tensor]) -> list[Tensor]:
        """The updates of this rank's matrices, batch by batch; zeros where a parameter's step doesn't happen."""
        updates = []
        route = domain.exchange.routes[bucket]
        for indices, slicing, batch in zip(route.batches, route.slicings, batches, strict=True):
            keep = torch.stack([self.go[domain.parameters[domain.plan.matrices[i].parameter]] for i in indices]).to(domain.device)
            by_schedule: dict[Schedule, list[int]] = {}  # one, unless a measurement of the noise floor takes more steps
            for k, i in enumerate(indices):
                by_schedule.setdefault(domain.adaptation.schedule_now(i), []).append(k)
            if len(by_schedule) == 1:
                updates.append(_orthogonalize_alike(domain, indices, batch, keep, slicing))
                continue
            update = torch.empty_like(batch)
            for places in by_schedule.values():  # an index would be copied from the host, which waits for that
                some, own = [indices[k] for k in places], torch.stack([batch[k] for k in places])
                result = _orthogonalize_alike(domain, some, own, torch.stack([keep[k] for k in places]), slicing)
                torch._foreach_copy_([update[k] for k in places], list(result.unbind()))
            updates.append(update)
        return updates

    @record_function("muon_dist::apply")
    def _apply(self, domain: Domain, updates: Sequence[tuple[Leg, Tensor]]) -> None:
        """p −= lr · scale · update on the pieces that arrived; matrices of steps that don't happen arrive as zeros."""
        alike: dict[tuple[int, int, int], tuple[float, list[Tensor], list[Tensor]]] = {}
        for leg, update in updates:
            bound, matrix = domain.parameters[leg.parameter], domain.matrices[leg.matrix]
            assert leg.view is not None  # updates are for holders
            key = (id(bound.group), matrix.rows, matrix.cols)
            if key not in alike:
                group = bound.group
                scale = group["extra_scale_factor"] * update_scale(group["adjust_lr_fn"], matrix.rows, matrix.cols)
                alike[key] = (-float(group["lr"]) * scale, [], [])
            _, targets, sources = alike[key]
            targets.append(leg.view.of(self.local[bound]))
            sources.append(update.to(targets[-1].device))
        for factor, targets, sources in alike.values():
            torch._foreach_add_(targets, sources, alpha=factor)

    @record_function("muon_dist::adamw")
    def _adamw(self) -> None:
        for domain in self.domains:
            together: dict[tuple[int, int], list[BoundParameter]] = {}
            for b in domain.parameters:
                if not b.muon:  # empty shards too: their step count is saved by whichever rank writes it
                    together.setdefault((id(b.group), id(self.go[b])), []).append(b)
            for members in together.values():
                states = [self.state[b.parameter] for b in members]
                tensors, grads = [self.local[b] for b in members], [self.grads[b] for b in members]
                adamw_step(members[0].group, tensors, grads, states, self.go[members[0]])


def _orthogonalize_alike(domain: Domain, indices: Sequence[int], batch: Tensor, keep: Tensor, slicing: Slicing | None) -> Tensor:
    """The polar factors of matrices of one shape and schedule, or of slices; records the moments of those that are measured.

    One that can't be a polar factor becomes zero, and is counted in the domain.
    """
    first, adaptation = domain.parameters[domain.plan.matrices[indices[0]].parameter], domain.adaptation
    schedule = adaptation.schedule_now(indices[0])
    measured = [k for k, i in enumerate(indices) if i in adaptation.measuring]
    moments = batch.new_empty(len(indices), moment_count(len(schedule), schedule.deflation), dtype=torch.float64) if measured else None
    compute = first.compute_dtype_for(schedule)
    slices = None
    if slicing is not None:
        start, stop = ((bound - slicing.bounds[0]) * slicing.lines for bound in slicing.bounds[domain.me : domain.me + 2])
        slices = Slices(domain.plan.matrices[indices[0]].shape, slicing.dim, start, stop, domain.exchange.add_up)
    with record_function(f"muon_dist::newton_schulz {'x'.join(map(str, batch.shape))}"):
        result = orthogonalize_batch(
            batch,
            schedule,
            compute_dtype=compute,
            eps=first.group["eps"],
            keep=keep,
            moments=moments,
            slices=slices,
            products=domain.products,
        )
    norms = None
    if slices is not None:
        norms = torch.linalg.vector_norm(result, dim=(-2, -1), dtype=torch.promote_types(compute, torch.float32)).square_()
        slices.add_up(norms)
        norms.sqrt_()
    plausible = are_plausible(result, schedule, min(domain.plan.matrices[indices[0]].shape), norms)
    result.masked_fill_(~plausible.view(-1, 1, 1), 0)
    if slicing is None or domain.me == 0:
        domain.left_out += (~plausible).sum()
    if moments is not None:
        moments.masked_fill_(~plausible.unsqueeze(-1), 0)  # as of a matrix that was zero
    for k in measured if slicing is None or domain.me == 0 else ():  # all ranks have the moments of what is sliced
        assert moments is not None
        adaptation.record(indices[k], moments[k])
    return result
