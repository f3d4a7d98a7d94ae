"""The reference itself: against singular value decompositions, torch.optim.Muon and torch.optim.AdamW."""

import pytest
import torch
import torch.optim._muon

from .reference import JORDAN, ReferenceMuon, orthogonalize


def test_a_converging_polynomial_gives_the_polar_factor() -> None:
    for shape in [(6, 9), (9, 6), (5, 5)]:
        x = torch.randn(shape, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        torch.testing.assert_close(orthogonalize(x, [(1.875, -1.25, 0.375)] * 40), u @ vh, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_it_is_torch_optim_muon_with_an_fp64_iteration(monkeypatch, adjust: str, nesterov: bool) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, c, k, eps: orthogonalize(g, [c] * k))
    w = torch.nn.Parameter(torch.randn(7, 12, dtype=torch.float64))
    reference = ReferenceMuon({"w": w.detach()}, {"w": [7]}, lr=0.3, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    optimizer = torch.optim.Muon(
        [w], lr=0.3, weight_decay=0.2, momentum=0.9, nesterov=nesterov, ns_coefficients=JORDAN, adjust_lr_fn=adjust
    )
    for _ in range(4):
        w.grad = torch.randn(7, 12, dtype=torch.float64)
        reference.step({"w": w.grad})
        optimizer.step()
    torch.testing.assert_close(w.detach(), reference.parameters["w"], rtol=1e-12, atol=1e-12)


def test_its_other_half_is_torch_optim_adamw() -> None:
    b = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    reference = ReferenceMuon({"b": b.detach()}, {}, lr=0.1, weight_decay=0.2)
    optimizer = torch.optim.AdamW([b], lr=0.1, weight_decay=0.2, betas=(0.9, 0.95))
    for _ in range(4):
        b.grad = torch.randn(9, dtype=torch.float64)
        reference.step({"b": b.grad})
        optimizer.step()
    torch.testing.assert_close(b.detach(), reference.parameters["b"], rtol=1e-12, atol=1e-12)
