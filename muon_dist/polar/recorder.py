"""What Newton–Schulz shows of a spectrum on its way: moments of the iterates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .flattening import DOMINANT
from .polynomials import Schedule


def moment_count(steps: int, deflation: int) -> int:
    """How many moments an orthogonalisation of so many steps yields for each matrix."""
    return 3 + 4 * steps + (DOMINANT if deflation else 0)


class Recorder:
    """The moments of matrices as they are iterated: what the steps show of the spectrum, for a pass over each Gram matrix and one over the
    result, and no product.

    `moments`, (…, `moment_count`) fp64, has for each matrix, with uᵢ the squares of the singular values of the iterate before step i, which
    maps u to u·(a + P(u))², P(u) = b·u + c·u²:

    - where the dominant singular values were put by deflation, relative to ‖X‖_F (0: none were), and the norm that the matrix was then
      divided by (1: none);
    - for every step Σuᵢ, Σuᵢ², Σuᵢ·P(uᵢ), ΣP(uᵢ)²;
    - Σuₖ of the result;
    - and with deflation some of the dominant singular values (`flattening.dominant_ranks`).
    """

    def __init__(self, moments: Tensor, steps: int) -> None:
        self.moments, self._steps = moments, steps

    @classmethod
    def of(cls, batch: Tensor, schedule: Schedule) -> Recorder:
        """For (B, m, n)."""
        count = moment_count(len(schedule), schedule.deflation)
        moments = batch.new_zeros(len(batch), count, dtype=torch.float64)
        moments[:, 1] = 1.0
        return cls(moments, len(schedule))

    def __getitem__(self, matrices: int | slice) -> Recorder:
        """That of some of the matrices, or of one."""
        return Recorder(self.moments[matrices], self._steps)

    @property
    def dominant(self) -> Tensor:
        """(B, DOMINANT), to be filled where there is deflation."""
        return self.moments[:, -DOMINANT:]

    def flattened(self, tau: Tensor) -> None:
        self.moments[..., 0] = tau

    def divided_by(self, norm: Tensor) -> None:
        self.moments[..., 1] = norm

    def before_step(self, k: int, gram: Tensor, polynomial: Tensor) -> None:
        """A = XXᵀ and P = bA + cA² of step k."""
        row = self.moments[..., 2 + 4 * k : 6 + 4 * k]
        row[..., 0] = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        row[..., 1] = _inner(gram, gram)
        row[..., 2] = _inner(gram, polynomial)
        row[..., 3] = _inner(polynomial, polynomial)

    def after_all(self, x: Tensor, add_up: Callable[[Tensor], None] | None) -> None:
        """The result, or this process's slice of it, whose sums `add_up` completes."""
        left = _inner(x, x)
        if add_up is not None:
            add_up(left)
        self.moments[..., 2 + 4 * self._steps] = left


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """⟨first, second⟩ of each matrix, in fp32 at least."""
    precise = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.linalg.vecdot(first.to(precise), second.to(precise)).sum(-1, dtype=torch.float64)  # by rows, and over rows in fp64
