"""MuonDist as a torch.optim.Optimizer: what a trainer expects of one, what it equals, and what it refuses."""

import copy
import pickle

import pytest
import torch
import torch.optim._muon
from torch import nn

from muon_dist import MuonDist, build_param_groups
from muon_dist.polar.polynomials import schedule_for

from . import models
from .reference import ReferenceMuon, orthogonalize


def one(shape: tuple[int, ...] = (6, 9), dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)))


def muon(*parameters: nn.Parameter, **options: object) -> MuonDist:
    return MuonDist([{"params": list(parameters), "algorithm": "muon"}], **{"ns_steps": 5, **options})


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_it_equals_torch_optim_muon(monkeypatch, adjust: str | None, nesterov: bool) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, c, k, eps: orthogonalize(g, [c] * k))
    options = {"lr": 0.3, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    ours, theirs = [one(), one((11, 4))], [one(), one((11, 4))]
    a, b = muon(*ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def test_it_equals_torch_optim_muon_in_bf16() -> None:
    ours, theirs = one((64, 96), torch.float32), one((64, 96), torch.float32)
    a, b = muon(ours, lr=1.0, compute_dtype="bf16", adjust_lr_fn="original"), torch.optim.Muon([theirs], lr=1.0)
    for _ in range(3):
        before = ours.detach().clone()
        theirs.data.copy_(before)
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        # both iterate in bf16 (8 bits of mantissa); torch normalises by a norm that is itself rounded to bf16
        error = (ours - theirs).norm() / (theirs - before).norm()
        assert error < 0.03


@pytest.mark.parametrize(("scale", "clip"), [(1.0, 1e-3), (1e-6, 1e-9), (1e-12, None)])
def test_clipped_and_tiny_gradients_give_a_full_update(scale: float, clip: float | None) -> None:
    updates = []
    for size, max_norm in ((1.0, None), (scale, clip)):
        p = one(dtype=torch.float32)
        optimizer = muon(p, lr=1.0, weight_decay=0.0)
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * size
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p], max_norm)
            assert p.grad.norm() <= max_norm
        before = p.detach().clone()
        optimizer.step()
        updates.append(p.detach() - before)
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=2e-5)
    # 0.2·√max(6, 9) times a matrix whose singular values are near 1
    assert 0.7 < updates[0].norm() / (0.6 * 6**0.5) < 1.2


def test_zero_gradients_move_nothing_but_decay() -> None:
    p = one()
    start = p.detach().clone()
    optimizer = muon(p, lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.5), rtol=1e-15, atol=0)


def test_gradient_accumulation_advances_momentum_once() -> None:
    model, twin = models.make_bank([(6, 5)], torch.float64), models.make_bank([(6, 5)], torch.float64)
    a, b = MuonDist(model.named_parameters(), lr=0.1, ns_steps=5), MuonDist(twin.named_parameters(), lr=0.1, ns_steps=5)
    for step in range(3):
        model.zero_grad()
        for micro in range(4):
            (model(4 * step + micro) / 4).backward()
        a.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    w = model.layers[0].weight
    assert torch.equal(a.state[w]["momentum_buffer"], b.state[twin.layers[0].weight]["momentum_buffer"])


MATRICES = {
    "qkv": ((30, 8), {"split": {"w": (10, 10, 10)}}, [10, 10, 10]),
    "grouped-query": ((24, 8), {"split": {"w": (16, 4, 4)}}, [16, 4, 4]),
    "gate/up": ((26, 8), {"split": {"w": (13, 13)}}, [13, 13]),
    "heads": ((24, 8), {"split": {"w": 4}}, [4] * 6),
    "experts": ((3, 7, 5), {}, [7]),
    "experts, gate/up": ((3, 8, 5), {"split": {"w": (4, 4)}}, [4, 4]),
    "conv": ((7, 3, 2, 2), {}, [7]),
    "square": ((7, 7), {}, [7]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_what_the_reference_says(name: str) -> None:
    shape, options, sizes = MATRICES[name]
    model = nn.Module()
    model.w = one(shape)
    optimizer = MuonDist(build_param_groups(model, muon=["w"], **options), lr=1.0, weight_decay=0.1, ns_steps=5)
    reference = ReferenceMuon({"w": model.w.detach()}, {"w": sizes}, lr=1.0, weight_decay=0.1)
    for _ in range(3):
        model.w.grad = torch.randn_like(model.w)
        reference.step({"w": model.w.grad})
        optimizer.step()
    torch.testing.assert_close(model.w.detach(), reference.parameters["w"], rtol=1e-11, atol=1e-11)


def test_the_extra_scale_factor_multiplies_updates_and_not_decay() -> None:
    changes = []
    for factor, decay in ((1.0, 0.0), (3.0, 0.0), (3.0, 0.1)):
        p = one()
        before = p.detach().clone()
        optimizer = muon(p, lr=0.5, weight_decay=decay, extra_scale_factor=factor)
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        changes.append(p.detach() - before)
    torch.testing.assert_close(changes[1], 3 * changes[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(changes[2], changes[1] - 0.5 * 0.1 * before, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="extra_scale_factor must be a number in"):
        muon(one(), extra_scale_factor=-1.0)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original", "spectral", "none"])
def test_a_transposed_weight_gets_the_transposed_update(adjust: str) -> None:
    stored, turned = one((6, 20)), nn.Parameter(one((6, 20)).detach().T.contiguous())
    a = MuonDist([{"params": [stored], "algorithm": "muon", "transpose": True, "split": (15, 5)}], lr=1.0, adjust_lr_fn=adjust, ns_steps=5)
    b = MuonDist([{"params": [turned], "algorithm": "muon", "split": (15, 5)}], lr=1.0, adjust_lr_fn=adjust, ns_steps=5)
    stored.grad = torch.randn_like(stored)
    turned.grad = stored.grad.T.contiguous()
    a.step()
    b.step()
    torch.testing.assert_close(stored.detach().T, turned.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_any_layout_in_memory_are_updated_in_place(dtype: torch.dtype) -> None:
    base = torch.randn(9, 6, dtype=dtype)
    turned, straight = nn.Parameter(base.T), nn.Parameter(base.T.contiguous())
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
    plain = nn.Parameter(kernel.detach().contiguous())
    optimizer = muon(turned, straight, kernel, plain, lr=1.0, weight_decay=0.01)
    for a, b in ((turned, straight), (kernel, plain)):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.contiguous()
    decayed = straight.detach() * (1 - 0.01)
    optimizer.step()
    assert torch.equal(turned, straight) and torch.equal(kernel, plain)
    assert not torch.equal(straight, decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_does_to_an_element_the_same_wherever_it_lies(dtype: torch.dtype) -> None:
    """Replicas that are cut differently would drift: torch's fused kernel rounds the last elements of a CPU tensor by themselves."""

    def steps(cuts: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        whole = torch.randn(1003, generator=generator, dtype=dtype)
        pieces = [nn.Parameter(piece.clone()) for piece in whole.tensor_split(cuts)]
        optimizer = MuonDist([{"params": pieces, "algorithm": "adamw"}], lr=0.01, ns_steps=5)
        for _ in range(5):
            gradient = torch.randn(1003, generator=generator, dtype=dtype)
            for p, g in zip(pieces, gradient.tensor_split(cuts), strict=True):
                p.grad = g.clone()
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in pieces] == [5] * len(pieces)
        kept = [[torch.cat([optimizer.state[p][key] for p in pieces]) for key in ("exp_avg", "exp_avg_sq")]]
        return torch.stack([torch.cat([p.detach() for p in pieces]), *kept[0]])

    expected = steps([])
    for cuts in ([1, 2, 9, 16, 500], [7, 600, 601], list(range(5, 1000, 5))):
        assert torch.equal(steps(cuts), expected), cuts


def test_adamw_takes_any_layout_in_memory_too() -> None:
    """torch's fused AdamW walks memory on a CPU: gradients and loaded state in another layout must be brought into the parameter's."""
    ends = []
    for turned in (True, False):
        base = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        p = nn.Parameter(base.T if turned else base.T.contiguous())
        saved = None
        for part in range(2):
            optimizer = MuonDist([{"params": [p], "algorithm": "adamw"}], lr=0.1, ns_steps=5)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for seed in (2, 3):
                p.grad = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 5 * part))
                optimizer.step()
            saved = optimizer.state_dict()
            for entry in saved["state"].values():
                entry.update({k: v.contiguous() for k, v in entry.items()})
        ends.append(p.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "polynomial", ["polar_express", "cans", "deepseek_v4", (2, -1.5, 0.5), [(3.4445, -4.7750, 2.0315), (2, -1.5, 0.5)]]
)
def test_every_polynomial_is_the_one_that_runs(polynomial: object) -> None:
    p = one()
    reference = ReferenceMuon({"w": p.detach()}, {"w": [6]}, lr=1.0, schedule=list(schedule_for(polynomial, 5).steps))
    optimizer = muon(p, lr=1.0, polynomial=polynomial)
    p.grad = torch.randn_like(p)
    reference.step({"w": p.grad})
    optimizer.step()
    torch.testing.assert_close(p.detach(), reference.parameters["w"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("eps", "share"), [(1e-20, 1.0), (1e3, None), (0.0, 1.0)])
def test_eps_guards_only_against_zero(eps: float, share: float | None) -> None:
    p, exact = one(), one()
    for tensor, value in ((p, eps), (exact, 1e-20)):
        tensor.grad = torch.ones_like(tensor) + torch.arange(9)
        muon(tensor, lr=1.0, weight_decay=0.0, eps=value).step()
    assert torch.equal(p, exact) == (share == 1.0)
    still = one(dtype=torch.float32)
    still.grad = torch.zeros_like(still)
    before = still.detach().clone()
    muon(still, lr=1.0, weight_decay=0.0, eps=eps).step()
    assert torch.equal(still, before)


def test_parameters_that_thaw_go_where_they_would_have_gone() -> None:
    embedding, matrix = nn.Parameter(torch.ones(8, 4), requires_grad=False), nn.Parameter(torch.ones(4, 4), requires_grad=False)
    kernel = nn.Parameter(torch.ones(4, 3, 2, 2), requires_grad=False)
    named = [("wte.weight", embedding), ("block.weight", matrix), ("conv.weight", kernel), ("bias", nn.Parameter(torch.ones(3)))]
    optimizer = MuonDist(named, ns_steps=5)
    assert [r.algorithm for r in optimizer.routes if r.name != "bias"] == ["frozen"] * 3
    for _, p in named:
        p.requires_grad_(True)
    found = {r.name: (r.algorithm, r.view and r.view.kind) for r in optimizer.routes}
    assert (
        found["wte.weight"] == ("adamw", None) and found["block.weight"] == ("muon", "matrix") and found["conv.weight"] == ("muon", "conv")
    )


def test_state_dict_hooks_see_what_is_saved_and_loaded() -> None:
    p = one()
    optimizer = muon(p)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0]["momentum_buffer"].shape))
    saved = optimizer.state_dict()
    assert seen == [p.shape]
    saved["param_groups"][0]["maximize"] = True  # refused, unless a hook takes it out
    with pytest.raises(ValueError, match="maximize"):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["param_groups"][0].pop("maximize", None) and None)
    optimizer.load_state_dict(saved)


def test_replacing_a_group_takes_effect() -> None:
    p = one()
    optimizer = muon(p, lr=1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_a_tensor_learning_rate_belongs_to_one_group() -> None:
    optimizer = MuonDist(models.make_bank([(6, 5)], torch.float64).named_parameters(), lr=torch.tensor(0.1), ns_steps=5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25])
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.05, 0.025])


def test_decay_of_half_precision_parameters_is_not_rounded_away() -> None:
    p = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    muon(p, lr=0.05, weight_decay=0.1).step()
    assert torch.equal(p, torch.full((4, 4), 1 - 0.005, dtype=torch.bfloat16)) and (p != 1).all()


def test_closures_schedulers_hooks_pickles_and_copies() -> None:
    model = models.make_bank([(6, 5), (5, 6)], torch.float64)
    optimizer = MuonDist(model.named_parameters(), lr=0.1, adam_lr=0.01, ns_steps=5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(0)
        loss.backward()
        return loss

    expected = model(0).item()
    assert optimizer.step(closure).item() == expected and calls == ["before", "after"]
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        for p, q in zip(
            (p for g in optimizer.param_groups for p in g["params"]), (p for g in twin.param_groups for p in g["params"]), strict=True
        ):
            assert torch.equal(p, q)
            q.grad = torch.ones_like(q)
        twin.step()
        assert [g["lr"] for g in twin.param_groups] == [0.05, 0.005]


@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_one_cycle_moves_both_learning_rates(cycle_momentum: bool) -> None:
    optimizer = MuonDist(models.make_bank([(6, 5)], torch.float64).named_parameters(), lr=0.1, ns_steps=5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.5, 0.05], total_steps=10, cycle_momentum=cycle_momentum)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"])
    assert (optimizer.param_groups[0]["momentum"] != 0.95) == cycle_momentum
    fresh = MuonDist(models.make_bank([(6, 5)], torch.float64).named_parameters(), lr=0.1, ns_steps=5)
    fresh.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_frozen_parameters_have_no_state_until_they_are_trainable() -> None:
    model = models.make_bank([(6, 5), (5, 6)], torch.float64)
    model.layers[1].weight.requires_grad_(False)
    optimizer = MuonDist(model.named_parameters(), ns_steps=5)
    model(0).backward()
    optimizer.step()
    frozen = model.layers[1].weight
    assert frozen not in optimizer.state and len(optimizer.state) == 3
    assert [r.algorithm for r in optimizer.routes if r.name == "layers.1.weight"] == ["frozen"]
    frozen.requires_grad_(True)
    before = frozen.detach().clone()
    model(1).backward()
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[frozen] and not torch.equal(frozen, before)


def test_changing_ns_steps_in_a_group_takes_effect() -> None:
    a, b = one(), one()
    first, second = muon(a, lr=1.0), muon(b, lr=1.0, ns_steps=3)
    for p in (a, b):
        p.grad = torch.ones_like(p) + torch.arange(9)
    first.step()
    first.param_groups[0]["ns_steps"] = 3
    second.param_groups[0]["ns_steps"] = 5
    second.step()
    second.param_groups[0]["ns_steps"] = 3
    first.step()
    second.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    first.param_groups[0]["ns_steps"] = 0
    with pytest.raises(ValueError, match="steps must be"):
        first.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1}, "lr must be"),
        ({"lr": "fast"}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"nesterov": "yes"}, "nesterov must be"),
        ({"ns_steps": "adaptive", "polynomial": "cans"}, "generates its polynomials"),
        ({"ns_steps": 0}, "steps must be"),
        ({"polynomial": "best"}, "unknown polynomial"),
        ({"adjust_lr_fn": "rms"}, "unknown adjust_lr_fn"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"adam_betas": 0.9}, "adam_betas"),
        ({"compute_dtype": "int8"}, "compute_dtype"),
        ({"wire_dtype": "fp16"}, "wire_dtype can't be fp16"),
        ({"process_group": "world"}, "process_group must be"),
        ({"layouts": {"w": (4, 4)}}, "must be a ShardLayout"),
        ({"bucket_mb": 0}, "bucket_mb must be"),
        ({"placement": "shard"}, "choose one of owner, gram, auto"),
        ({"eps": -1}, "eps must be"),
        ({"nonfinite": "ignore"}, "choose 'skip' or 'raise'"),
    ],
)
def test_invalid_hyperparameters_raise(options: dict, words: str) -> None:
    model = models.make_bank([(4, 4)], torch.float32)
    with pytest.raises(ValueError, match=words):
        MuonDist(model.named_parameters(), **{"ns_steps": 5, **options})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([], "no parameters"),
        ({nn.Parameter(torch.zeros(3))}, "set"),
        ([{"params": {nn.Parameter(torch.zeros(3))}}], "set"),
        ([{"params": []}], "empty"),
        (torch.zeros(3), "single tensor"),
        ([{"algorithm": "muon"}], "'params'"),
        ([{"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "muon", "betas": (0.9, 0.99)}], "does not take 'betas'"),
        ([{"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "muon", "lrr": 1}], "does not take 'lrr': did you mean 'lr'"),
        ([{"params": [("w", nn.Parameter(torch.zeros(2, 2)))], "betas": (0.9, 0.99)}], "does not take 'betas'"),
        ([("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))], "complex"),
        (["w"], "tensor or a"),
    ],
)
def test_invalid_parameters_raise(params: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MuonDist(params, ns_steps=5)


def test_sparse_gradients_raise() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = MuonDist(build_param_groups(embedding), ns_steps=5)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_named_parameters_make_one_group_per_algorithm() -> None:
    model = models.make_bank([(6, 5)], torch.float32)
    optimizer = MuonDist(model.named_parameters(), lr=0.1, muon_lr=0.2, adam_weight_decay=0.0, adam_eps=1e-9, ns_steps=5)
    muon_group, adamw_group = optimizer.param_groups
    assert (muon_group["algorithm"], muon_group["lr"], muon_group["weight_decay"], muon_group["eps"]) == ("muon", 0.2, 0.1, 1e-20)
    assert (adamw_group["algorithm"], adamw_group["lr"], adamw_group["weight_decay"], adamw_group["eps"]) == ("adamw", 0.1, 0.0, 1e-9)
    assert "momentum" not in adamw_group and "betas" not in muon_group
    assert len(MuonDist([{"params": [("w", one())], "algorithm": "muon"}], ns_steps=5).param_groups) == 1
