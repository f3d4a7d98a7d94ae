"""maxtext #4843 (issue #4798): a stack of experts read as one matrix over the expert axis, and a depthwise kernel orthogonalised: what one
expert or channel gets then depends on the gradients of the others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from muon_dist import MuonDist, build_param_groups

from ..reference import JORDAN, orthogonalize


def gradient(shape: tuple[int, ...], factor: float) -> Tensor:
    """Of which all but the first expert's or channel's is so many times as large."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[1:] *= factor
    return g


@pytest.mark.parametrize("kind", ["experts", "depthwise"])
def test_one_experts_update_does_not_depend_on_the_others(kind: str) -> None:
    ours, flattened = [], []
    for factor in (1.0, 100.0):
        if kind == "experts":
            p = nn.Parameter(torch.zeros(4, 6, 5, dtype=torch.float64))
            optimizer = MuonDist([("mlp.experts.w1", p)], lr=1.0, weight_decay=0.0, ns_steps=5)
        else:
            conv = nn.Conv1d(8, 8, 4, groups=8, bias=False, dtype=torch.float64)
            p = conv.weight
            optimizer = MuonDist(build_param_groups(conv), lr=1.0, weight_decay=0.0, ns_steps=5)
        before = p.detach().clone()
        p.grad = gradient(p.shape, factor)
        optimizer.step()
        ours.append((p.detach() - before)[0])
        flattened.append(orthogonalize(p.grad.reshape(p.shape[0], -1), [JORDAN] * 5).reshape(p.shape)[0])
    assert (flattened[0] - flattened[1]).norm() > 0.1 * flattened[0].norm()
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-12, atol=1e-12)
