"""A step of MuonDist as a timeline: how long it takes from a plan's work and a machine's rates. It knows no rank but by its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..sharding.plan import BucketLoads

# Bytes that pass through memory per element a rank stores. Momentum: gradient (2), buffer read and written (8), the form written (2).
# Applying: parameter read and written (8) by decay and again with the update, which is read (2). AdamW: gradient (2), parameter and two
# averages read and written.
MOMENTUM_BYTES, APPLY_BYTES, ADAMW_BYTES = 12, 18, 26


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank does in a second.

    Attributes:
        products: operations of Newton–Schulz, as the plan counts them.
        memory: bytes of elementwise work.
        link: bytes that it sends, and receives at the same time.
        start: seconds from the start of an all-to-all to its first byte.
        host: seconds that Python takes per piece of a matrix, counted where it is read and where it is written.
        overlaps: whether what travels takes nothing from the products; on CPU ranks that share their cores it does.
    """

    products: float
    memory: float
    link: float
    start: float
    host: float
    overlaps: bool = True

    def shared_by(self, ranks: int) -> Rates:
        """The rates of one of several ranks that share this machine's processors and memory."""
        return replace(self, products=self.products / ranks, memory=self.memory / ranks, link=self.link / ranks)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A domain's part in the step of all ranks.

    Attributes:
        loads: of its buckets, by position in the domain.
        position: (ranks,): where in the domain each rank stands; domains that are alike (expert-parallel groups) are one.
        held: (ranks,): elements of its matrices that each rank stores.
    """

    loads: BucketLoads
    position: np.ndarray
    held: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Seconds of a step, and of its parts on the rank that has most of each; travelling is of all buckets, waiting what nothing hid."""

    step: float
    newton_schulz: float
    elementwise: float
    host: float
    travelling: float
    waiting: float


def simulate(domains: Sequence[Work], adamw_elements: np.ndarray, rates: Rates) -> Timeline:
    """Follow the order of `MuonDist.step`. `adamw_elements`: (ranks,) elements that each rank stores of what AdamW takes."""
    now = np.zeros(len(adamw_elements))
    waited, products, host, elementwise = (np.zeros_like(now) for _ in range(4))
    link_free, travelled = 0.0, 0.0
    jobs = [(domain, b) for domain in domains for b in range(len(domain.loads.flops))]

    def spend(seconds: np.ndarray, account: np.ndarray) -> None:
        nonlocal now
        now = now + seconds
        account += seconds

    def wait(until: float) -> None:
        nonlocal now
        late = np.maximum(until - now, 0.0)
        now = now + late
        waited[:] += late

    def all_to_all(size: np.ndarray) -> float:
        """Launch one now; when it is done everywhere."""
        nonlocal link_free, travelled
        if not size.any():
            return 0.0
        takes = rates.start + float(size.max()) / rates.link
        travelled += takes
        if not rates.overlaps:
            wait(float(now.max()) + takes)
            return float(now.max())
        link_free = max(link_free, float(now.max())) + takes
        return link_free

    def per_element(domain: Work, b: int, size: int) -> np.ndarray:
        owned = domain.loads.owned
        return domain.held * (size / rates.memory * owned[b].sum() / max(owned.sum(), 1))

    def start(job: int) -> float:
        domain, b = jobs[job]
        spend(per_element(domain, b, MOMENTUM_BYTES), elementwise)
        spend(domain.loads.pieces[b][domain.position] * (rates.host / 2), host)
        return all_to_all(domain.loads.gather[b].max(axis=0))

    arrives = start(0) if jobs else 0.0
    spend(adamw_elements * (ADAMW_BYTES / rates.memory), elementwise)
    returns: tuple[float, int] | None = None

    def apply(job: int) -> None:
        domain, b = jobs[job]
        spend(per_element(domain, b, APPLY_BYTES), elementwise)
        spend(domain.loads.pieces[b][domain.position] * (rates.host / 2), host)

    for job, (domain, b) in enumerate(jobs):
        here, arrives = arrives, start(job + 1) if job + 1 < len(jobs) else 0.0
        wait(here)
        spend(domain.loads.flops[b][domain.position] / rates.products, products)
        if added_up := float(domain.loads.added_up[b]):  # an all-reduce of sliced matrices' Gram matrices; the ranks wait for it
            takes = rates.start + 2 * added_up / rates.link
            travelled += takes
            wait(float(now.max()) + takes)
        back = all_to_all(domain.loads.scatter[b].max(axis=0))
        if returns is not None:
            wait(returns[0])
            apply(returns[1])
        returns = (back, job)
    if returns is not None:
        wait(returns[0])
        apply(returns[1])
    last = int(np.argmax(now))
    return Timeline(
        step=float(now.max(initial=0.0)),
        newton_schulz=float(products.max(initial=0.0)),
        elementwise=float(elementwise.max(initial=0.0)),
        host=float(host.max(initial=0.0)),
        travelling=travelled,
        waiting=float(waited[last]) if len(waited) else 0.0,
    )
