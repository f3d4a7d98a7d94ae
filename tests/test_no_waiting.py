"""The host never waits for the device in a step: the whole of it runs on tensors that have shapes but no values."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dist import MuonDist
from muon_dist.agreement import agree_on_gradients
from muon_dist.polar.polynomials import widest_schedule
from muon_dist.polar.products import SymmetricProducts
from muon_dist.polar.recorder import moment_count
from muon_dist.program import Program
from muon_dist.step import take_step

DEVICE = torch.device("meta")
SHAPES = [(16, 16), (16, 16), (48, 16), (16, 48), (16,), (16,)]


class FromHost(TorchDispatchMode):
    """Everything that copies from the host or asks for a value; on a GPU each of them waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        self.operations += 1
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero", "index", "index_put_"):  # an index is a list
            self.waits[name] += 1
        if name in ("_to_copy", "copy_"):
            there, source = (kwargs.get("device"), args[0]) if name == "_to_copy" else (args[0].device, args[1])
            self.waits[name] += there is not None and torch.device(there).type != source.device.type
        return func(*args, **kwargs)


class Lists(TorchFunctionMode):
    """Tensors made of lists, which the device's dispatch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in (torch.tensor, torch.as_tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"ns_steps": 5}, {"ns_steps": "adaptive", "burn_in": 1, "measure_every": 4}], ids=["five", "adaptive"])
def test_a_step_on_a_device_neither_asks_for_values_nor_copies_from_the_host(options: dict[str, Any]) -> None:
    named = [(f"layers.0.{k}.weight", nn.Parameter(torch.randn(shape))) for k, shape in enumerate(SHAPES)]
    optimizer = MuonDist(named, lr=1e-3, **options)
    for _, p in named:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    (program,) = optimizer.engine.programs
    adaptation = program.adaptation
    if options["ns_steps"] == "adaptive":  # one of two matrices of a batch is measured, and takes more steps for it
        measured = dataclasses.replace(widest_schedule(3), deflation=2)
        adaptation.measuring, adaptation._line_of = {0: measured}, {0: 0}
        adaptation._buffer = torch.zeros(1, moment_count(3, 2), dtype=torch.float64, device=DEVICE)
        assert adaptation.schedule_now(0) != adaptation.schedule_now(1)
    for b in program.domain.parameters:
        b.device, b.member.tensor = DEVICE, nn.Parameter(b.member.tensor.to(DEVICE))
        b.member.state = {key: value.to(DEVICE) for key, value in b.state.items() if key != "spectrum"}
    domain = dataclasses.replace(program.domain, device=DEVICE, products=SymmetricProducts(DEVICE.type))
    there = Program(domain, adaptation, everywhere=False)
    there.compile()
    grads = [torch.empty_like(b.member.local) for b in sorted(domain.parameters, key=lambda b: b.index)]
    for _ in range(2):  # the first is not steady yet
        with FromHost() as seen, Lists() as lists:
            agreed = agree_on_gradients([there.consensus], grads, None, "a step")
            take_step([there], grads, agreed.mask, optimizer.param_groups)
            assert there.is_current
    assert seen.operations > 50
    assert +seen.waits == {} and lists.made == 0
