"""What users and hosts do to an optimizer's groups and state between steps: move, replace, reset, edit, load in another order."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_dist import MuonDist
from muon_dist.spectrum.record import MEASUREMENTS, TAKEN

ADAPTIVE = {"lr": 0.02, "burn_in": 2, "measure_every": 2}


def made(**options: Any) -> tuple[nn.Module, MuonDist]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    return model, MuonDist(
        model.named_parameters(), **({"lr": 0.02, **options} if options.get("ns_steps") == 5 else {**ADAPTIVE, **options})
    )


def gradients(model: nn.Module, k: int) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * k + i), dtype=p.dtype)


def train(model: nn.Module, optimizer: MuonDist, steps: range, between: Callable[[MuonDist], None] = lambda _: None) -> list[Tensor]:
    for k in steps:
        gradients(model, k)
        optimizer.step()
        between(optimizer)
    return [p.detach().clone() for p in model.parameters()]


def replaced_by(change: Callable[[Tensor], Tensor]) -> Callable[[MuonDist], None]:
    def between(optimizer: MuonDist) -> None:
        for entry in optimizer.state.values():
            for key, value in entry.items():
                entry[key] = change(value)

    return between


# ------------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("change", [torch.clone, lambda t: t.to(torch.float64).to(t.dtype), lambda t: torch.empty_like(t).copy_(t)])
def test_state_that_a_host_replaces_after_every_step_is_what_is_saved(change: Callable[[Tensor], Tensor]) -> None:
    """verl's offload, Lightning's move to a device: the run, what it saves, and a run resumed from that are those without it."""
    between = replaced_by(change)
    model, optimizer = made()
    train(model, optimizer, range(9), between)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rows = [entry["spectrum"] for entry in saved[1]["state"].values() if "spectrum" in entry]
    assert [int(row[0, TAKEN]) for row in rows] == [9, 9] and all(int(row[0, MEASUREMENTS]) > 0 for row in rows)
    end = train(model, optimizer, range(9, 18), between)
    resumed, theirs = made()
    resumed.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    assert all(map(torch.equal, end, train(resumed, theirs, range(9, 18))))
    untouched, plain = made()
    assert all(map(torch.equal, end, train(untouched, plain, range(18))))


@pytest.mark.parametrize("options", [{"ns_steps": 5}, {}, {"rule": "normuon"}], ids=["five", "adaptive", "normuon"])
def test_weights_that_a_host_moves_to_other_memory_are_those_that_are_updated(options: dict[str, Any]) -> None:
    """As `model.to(device)` and back, or a host's offload does: parameters stay, what they hold lies elsewhere."""

    def between(_: MuonDist) -> None:
        for p in model.parameters():
            p.data = p.data.clone()

    model, optimizer = made(**options)
    end = train(model, optimizer, range(9), between)
    untouched, plain = made(**options)
    assert all(map(torch.equal, end, train(untouched, plain, range(9))))


def test_spectra_that_a_host_has_moved_or_cast_come_back() -> None:
    model, optimizer = made()
    train(model, optimizer, range(6))
    entry = optimizer.state[model[0].weight]
    entry["spectrum"] = entry["spectrum"].to(torch.float32)
    train(model, optimizer, range(6, 8))
    assert entry["spectrum"].dtype == torch.float64 and int(entry["spectrum"][0, TAKEN]) == 8


@pytest.mark.parametrize("options", [{"ns_steps": 5}, {}], ids=["five", "adaptive"])
@pytest.mark.parametrize("how", ["clear", "weight", "bias", "new dictionary", "one key"])
def test_state_that_was_reset_begins_anew(how: str, options: dict[str, Any]) -> None:
    """As AdamW's does: the step after it is the first step of a new optimizer."""
    model, optimizer = made(**options)
    train(model, optimizer, range(3))
    if how == "clear":
        optimizer.state.clear()
    elif how == "new dictionary":
        optimizer.state = defaultdict(dict)
    elif how == "one key":
        del optimizer.state[model[1].weight]["momentum_buffer"]
    else:
        del optimizer.state[model[0].bias if how == "bias" else model[0].weight]
    fresh_model, fresh = made(**options)
    fresh_model.load_state_dict(model.state_dict())
    end, expected = (train(m, o, range(3, 4)) for m, o in ((model, optimizer), (fresh_model, fresh)))
    reset = {"weight": [0], "bias": [1], "one key": [2]}.get(how, [0, 1, 2, 3])
    for k in reset if options or how != "one key" else []:  # what was measured stays with "one key", and its steps
        assert torch.equal(end[k], expected[k])
    optimizer.state_dict()


def test_parameters_that_a_host_replaces_before_the_first_step() -> None:
    """accelerate under FSDP2: the groups get other parameters, and a state dict is asked for before any step."""
    _, optimizer = made(ns_steps=5)
    other, plain = made(ns_steps=5)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
    assert [r.name for r in optimizer.routes] == [r.name for r in plain.routes]
    train(other, plain, range(3))
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    replaced = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p for group in plain.param_groups for p in group["params"]]
    for a, b in zip(replaced, kept, strict=True):
        a.data.copy_(b)
        a.grad = b.grad = torch.ones_like(b)
    optimizer.step()
    plain.step()
    assert all(map(torch.equal, replaced, kept))


# ------------------------------------------------------------------------------------------------------------------ groups


def test_parameters_are_taken_out_of_a_group_and_added_to_it() -> None:
    model, optimizer = made(ns_steps=5)
    train(model, optimizer, range(1))
    muon = next(group for group in optimizer.param_groups if group["algorithm"] == "muon")
    first, second = muon["params"]
    muon["params"] = [second]
    before = [p.detach().clone() for p in (first, second)]
    train(model, optimizer, range(1, 2))
    assert torch.equal(first, before[0]) and not torch.equal(second, before[1]) and first not in optimizer.state
    third = nn.Parameter(torch.zeros(3, 5))
    third.grad = torch.ones(3, 5)
    muon["params"] += [third, first]
    gradients(model, 2)
    optimizer.step()
    routes = {r.name: r.reason for r in optimizer.routes}
    assert third.abs().sum() > 0 and not torch.equal(first, before[0])
    assert routes["1.weight"] == routes["0.weight"] == "weight matrix" and routes[""] == "added to its group"
    assert muon["param_names"] == ["1.weight", "", "0.weight"]


def test_a_group_can_be_removed() -> None:
    model, optimizer = made(ns_steps=5)
    train(model, optimizer, range(1))
    optimizer.param_groups = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    biases = [model[k].bias.detach().clone() for k in (0, 1)]
    train(model, optimizer, range(1, 2))
    assert all(torch.equal(model[k].bias, biases[k]) for k in (0, 1)) and len(optimizer.state_dict()["state"]) == 2


def test_keys_of_ones_own_are_kept_and_saved() -> None:
    def build(scale: float) -> MuonDist:
        model = nn.Linear(4, 6)
        return MuonDist([{"params": list(model.named_parameters()), "lr_scale": scale, "group_name": "body"}], ns_steps=5)

    optimizer = build(0.5)
    assert [(g["lr_scale"], g["group_name"]) for g in optimizer.param_groups] == [(0.5, "body")] * 2
    saved = optimizer.state_dict()
    other = build(1.0)
    other.load_state_dict(saved)
    assert [g["lr_scale"] for g in other.param_groups] == [0.5, 0.5]
    optimizer.add_param_group({"params": [("w", nn.Parameter(torch.zeros(3, 3)))], "stage": 2})
    assert optimizer.param_groups[-1]["stage"] == 2


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
        ("momentun", "momentum"),
        ("ns_step", "ns_steps"),
        ("adam_lr", None),
        ("bucket_mb", None),
    ],
)
def test_keys_that_mean_something_else_are_refused(key: str, hint: str | None) -> None:
    words = f"does not take '{key}': did you mean '{hint}'" if hint else f"does not take '{key}': it takes"
    with pytest.raises(ValueError, match=words):
        MuonDist([{"params": [("w", nn.Parameter(torch.zeros(3, 3)))], key: 1}], ns_steps=5)


def test_two_parameters_of_one_name_are_refused() -> None:
    a, b = (nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    with pytest.raises(ValueError, match="several parameters are called 'w'"):
        MuonDist([("w", a), ("w", b)], ns_steps=5)
    optimizer = MuonDist([("w", a)], ns_steps=5)
    optimizer.add_param_group({"params": [("w", b)]})
    with pytest.raises(ValueError, match="several parameters are called 'w'"):
        optimizer.bind()


def test_groups_that_became_more_are_spoken_of_before_a_scheduler_counts_them() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": list(nn.Linear(4, 6).named_parameters(f"layers.{k}"))} for k in range(2)]

    with pytest.warns(
        UserWarning, match="2 parameter groups became 4: Muon's part and AdamW's part .* such as LambdaLR, needs one for each"
    ):
        optimizer = MuonDist(groups(), ns_steps=5)
    with pytest.raises(ValueError, match="Expected 4 lr_lambdas, but got 2"):  # torch's own
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonDist([{**group, "params": group["params"][:1], "algorithm": "muon"} for group in groups()], ns_steps=5)
        MuonDist(nn.Linear(4, 6).named_parameters(), ns_steps=5)


# ----------------------------------------------------------------------------------------------------------------- loading


def test_state_goes_to_the_parameter_of_its_name() -> None:
    """Not by order, which two lists of the same parameters need not share; also behind wrappers, and across groups in another order."""
    layers = {name: nn.Parameter(torch.randn(6, 6)) for name in ("a", "b")}
    optimizer = MuonDist(list(layers.items()), ns_steps=5)
    for k, p in enumerate(layers.values()):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(k))
    optimizer.step()
    other = MuonDist([(f"module._orig_mod.{name}", p) for name, p in reversed(layers.items())], ns_steps=5)
    other.load_state_dict(optimizer.state_dict())
    for p in layers.values():
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    groups = [{"params": [(name, p)], "lr": rate} for (name, p), rate in zip(layers.items(), (0.1, 0.2), strict=True)]
    first, swapped = MuonDist(copy.copy(groups), ns_steps=5), MuonDist(groups[::-1], ns_steps=5)
    first.step()
    swapped.load_state_dict(first.state_dict())
    for p in layers.values():
        assert torch.equal(swapped.state[p]["momentum_buffer"], first.state[p]["momentum_buffer"])
    assert [g["lr"] for g in swapped.param_groups] == [0.2, 0.1]
    unnamed = first.state_dict()
    for group in unnamed["param_groups"]:
        del group["param_names"]
    swapped.load_state_dict(unnamed)  # by order, for want of names
    assert torch.equal(swapped.state[layers["b"]]["momentum_buffer"], first.state[layers["a"]]["momentum_buffer"])
    with pytest.raises(ValueError, match=r"does not have [ac] and 1 other parameters of the other"):
        MuonDist([("c", layers["a"]), ("b", layers["b"])], ns_steps=5).load_state_dict(optimizer.state_dict())


def test_state_of_the_other_algorithm_is_refused() -> None:
    p = nn.Parameter(torch.randn(6, 6))
    p.grad = torch.randn(6, 6)
    adamw, muon = torch.optim.AdamW([p]), torch.optim.Muon([p])
    for optimizer in (adamw, muon):
        optimizer.step()
    ours = {name: MuonDist([{"params": [("w", p)], "algorithm": name}], ns_steps=5) for name in ("muon", "adamw")}
    with pytest.raises(ValueError, match="saved for 'adamw', but this optimizer gives it to 'muon'"):
        ours["muon"].load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="saved for 'muon', but this optimizer gives it to 'adamw'"):
        ours["adamw"].load_state_dict(muon.state_dict())
    ours["muon"].load_state_dict(muon.state_dict())
    ours["adamw"].load_state_dict(adamw.state_dict())


# --------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(6, 4), (6,)], ids=["muon", "adamw"])
@pytest.mark.parametrize(
    ("weight", "gradient", "value"),
    [(torch.float16, torch.float32, 1e6), (torch.float32, torch.float64, 1e39), (torch.bfloat16, torch.float32, 3.4e38)],
    ids=["fp32 to fp16", "fp64 to fp32", "fp32 to bf16"],
)
def test_a_gradient_that_is_infinite_in_the_dtype_it_is_used_in_skips_the_step(
    weight: torch.dtype, gradient: torch.dtype, value: float, shape: tuple[int, ...]
) -> None:
    p = nn.Parameter(torch.ones(shape, dtype=weight))
    p.grad_dtype = gradient
    optimizer = MuonDist([("layers.0.weight" if len(shape) > 1 else "bias", p)], lr=0.5, ns_steps=5)
    p.grad = torch.full(shape, value, dtype=gradient)
    assert p.grad.isfinite().all() and not p.grad.to(weight).isfinite().all()  # what made the momentum infinite
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p)) and optimizer.skipped_steps == 1
    p.grad = torch.full(shape, 1.0, dtype=gradient)
    optimizer.step()
    assert not torch.equal(p, torch.ones_like(p)) and p.isfinite().all() and optimizer.skipped_steps == 1


# --------------------------------------------------------------------------------------------------------------- telemetry


def test_telemetry_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    folder = tmp_path / "spectra"
    model, optimizer = made(telemetry_dir=folder)
    train(model, optimizer, range(7))
    assert list(folder.glob("*.jsonl"))
    for path in folder.glob("*"):
        path.unlink()
    folder.rmdir()
    folder.write_text("a file where the folder was")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, optimizer, range(7, 25))
    assert [str(w.message).split(",")[0] for w in told] == ["telemetry could not be written"]
