"""The order of one step, on every rank:

1.  One small all-reduce tells whether all gradients are finite and which parameters have one anywhere (`agreement`). What follows is
    decided by that tensor on the device; the host never waits for it.
2.  Bucket by bucket: a rule prepares the fragments that this rank stores (Muon: momentum); what it makes of them travels to the
    matrices' owners (one all-to-all); owners compute updates of whole matrices (Newton–Schulz, equal shapes as one batch); these travel
    back (one all-to-all) and change the weights. The next bucket travels while this one is computed.
3.  Elementwise rules (AdamW) update the rest while the first bucket travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .agreement import StepMask
from .polar.newton_schulz import orthogonalize_batch
from .polar.plausible import are_plausible
from .polar.polynomials import Schedule
from .program import Batch, Bucket, FragmentRun, PieceRun, Program
from .rules import MatrixRule
from .rules.rule import Fragments, MatrixBatch
from .sharding.exchange import Traffic

Groups = Sequence[Mapping[str, Any]]  # hyperparameters, by the numbers of groups


def take_step(programs: Sequence[Program], grads: Sequence[Tensor | None], mask: StepMask, groups: Groups) -> None:
    """Update weights and state. Collective.

    Args:
        programs: of this rank's domains, in the order in which all ranks meet.
        grads: this rank's part of every member's gradient, or None.
        mask: which members' steps happen.
    """
    jobs = [_Job(program, bucket, grads, mask, groups) for program in programs for bucket in program.buckets]
    prepared: dict[Program, list[Any]] = {program: [None] * len(program.domain.parameters) for program in programs}
    travelling = jobs[0].start(prepared) if jobs else None
    _elementwise(programs, grads, mask, groups)
    returning: tuple[_Job, Traffic] | None = None
    for k, job in enumerate(jobs):
        arriving, travelling = travelling, jobs[k + 1].start(prepared) if k + 1 < len(jobs) else None
        program, bucket = job.program, job.bucket
        batches = program.exchange.finish_gather(bucket.route, arriving, prepared[program])
        for position in bucket.done:
            prepared[program][position] = None
        updates = [job.compute(batch, values) for batch, values in zip(bucket.batches, batches, strict=True)]
        scattered = program.exchange.start_scatter(bucket.route, updates)
        job.finalize(bucket.home, program.exchange.updates_at_home(bucket.route, updates))
        if returning is not None:
            returning[0].finalize(returning[0].bucket.arriving, returning[1].wait())
        returning = None if scattered is None else (job, scattered)
    if returning is not None:
        returning[0].finalize(returning[0].bucket.arriving, returning[1].wait())


class _Job:
    """A bucket at this step."""

    def __init__(self, program: Program, bucket: Bucket, grads: Sequence[Tensor | None], mask: StepMask, groups: Groups) -> None:
        self.program, self.bucket = program, bucket
        self._grads, self._mask, self._groups = grads, mask, groups

    def start(self, prepared: Mapping[Program, list[Any]]) -> Traffic | None:
        """Prepare what this bucket needs first, and send it."""
        forms = prepared[self.program]
        with record_function("muon_dist::momentum"):
            for run in self.bucket.prepared:
                for happens, places in self._mask.split(run.members):
                    made = run.rule.prepare(_fragments(run, places, self._grads), self._groups[run.group], happens)
                    for position, form in zip(_some(run.positions, places), made, strict=True):
                        forms[position] = form
        return self.program.exchange.start_gather(self.bucket.route, forms)

    def compute(self, batch: Batch, values: Tensor) -> Tensor:
        """The updates of a batch of this rank's matrices, (B, m, n); zeros where a parameter's step doesn't happen."""
        keep = self._mask.stacked(batch.members, self.program.domain.device)
        first, rule = batch.first, batch.first.rule
        assert isinstance(rule, MatrixRule)  # others have no matrices

        matrices = MatrixBatch(
            values=values,
            happens=keep,
            transpose=batch.shape.transpose,
            outputs=batch.shape.rows,
            inputs=batch.shape.cols,
            state=batch.state,
            orthogonalize=lambda x: _orthogonalize(self.program, batch, x, keep),
            slices=batch.slices,
        )
        return rule.compute(matrices, self._groups[first.member.group])

    @record_function("muon_dist::apply")
    def finalize(self, runs: Sequence[PieceRun], updates: list[Tensor]) -> None:
        """Change the pieces of weights that `updates` are for, in the order of their route."""
        for run in runs:
            own = updates if len(run.places) == len(updates) else [updates[place] for place in run.places]
            if own[0].device != run.targets[0].device:
                own = [update.to(run.targets[0].device) for update in own]
            for happens, places in self._mask.split(run.members):
                targets = _some(run.targets, places)
                run.rule.finalize(targets, _some(own, places), run.rows, run.cols, self._groups[run.group], happens)
            if self.program.metrics is not None and self.program.metrics.active and run.counted:
                counted, rate = run.counted, run.rule.rate(run.rows, run.cols, self._groups[run.group])
                self.program.metrics.add(run.matrices, [run.targets[k] for k in counted], [own[k] for k in counted], rate)


@record_function("muon_dist::adamw")
def _elementwise(programs: Sequence[Program], grads: Sequence[Tensor | None], mask: StepMask, groups: Groups) -> None:
    for program in programs:
        for run in program.elementwise:
            for happens, places in mask.split(run.members):
                run.rule.update(_fragments(run, places, grads), groups[run.group], happens)


def _fragments(run: FragmentRun, places: list[int] | None, grads: Sequence[Tensor | None]) -> Fragments:
    return Fragments(
        weights=_some(run.weights, places),
        grads=[grads[member] for member in _some(run.members, places)],
        state=run.state if places is None else {name: _some(values, places) for name, values in run.state.items()},
    )


def _some(values: list[Any], places: list[int] | None) -> list[Any]:
    return values if places is None else [values[place] for place in places]


def _orthogonalize(program: Program, batch: Batch, values: Tensor, keep: Tensor) -> Tensor:
    """The polar factors of a batch, (B, m, n); its matrices have one schedule, but for those that are measured now."""
    together: dict[Schedule, list[int]] = {}
    if not program.adaptation.measuring.keys().isdisjoint(batch.matrices):
        for place, matrix in enumerate(batch.matrices):
            together.setdefault(program.adaptation.schedule_now(matrix), []).append(place)
    if len(together) <= 1:
        return _orthogonalize_alike(program, batch, range(len(batch.matrices)), values, keep)
    result = torch.empty_like(values)
    for places in together.values():  # an index would be copied from the host, which waits for that
        own = torch.stack([values[place] for place in places])
        part = _orthogonalize_alike(program, batch, places, own, torch.stack([keep[place] for place in places]))
        torch._foreach_copy_([result[place] for place in places], list(part.unbind()))
    return result


def _orthogonalize_alike(program: Program, batch: Batch, places: Sequence[int], values: Tensor, keep: Tensor) -> Tensor:
    """The polar factors of matrices of one schedule, or of slices; records the moments of those that are measured.

    One that can't be a polar factor becomes zero, and is counted.
    """
    adaptation, slices = program.adaptation, batch.slices
    schedule = adaptation.schedule_now(batch.matrices[places[0]])
    measured = [k for k, place in enumerate(places) if batch.matrices[place] in adaptation.measuring] if adaptation.measuring else []
    compute = batch.first.compute_dtype_for(schedule)
    with record_function(f"muon_dist::newton_schulz {'x'.join(map(str, values.shape))}"):
        result, moments = orthogonalize_batch(
            values,
            schedule,
            compute_dtype=compute,
            eps=batch.first.group["eps"],
            keep=keep,
            measure=bool(measured),
            slices=slices,
            products=program.domain.products,
        )
    norms = None
    if slices is not None:
        norms = torch.linalg.vector_norm(result, dim=(-2, -1), dtype=torch.promote_types(compute, torch.float32)).square_()
        slices.add_up(norms)
        norms.sqrt_()
    plausible = are_plausible(result, schedule, batch.rank, norms)
    result.masked_fill_(~plausible.view(-1, 1, 1), 0)
    if batch.counts:
        program.consensus.left_out += (~plausible).sum()
    if moments is not None:
        moments.masked_fill_(~plausible.unsqueeze(-1), 0)  # as of a matrix that was zero
    for k in measured if batch.counts else ():
        assert moments is not None
        adaptation.record(batch.matrices[places[k]], moments[k])
    return result
