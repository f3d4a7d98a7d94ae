"""MuonDist in real DeepSpeed engines on gloo ranks: the update is the reference's, whatever the wrapper, the stage and the setting."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from muon_dist.sharding.tasks import SLICED

from . import deepspeed_hosts as hosts
from .ranks import run_ranks
from .recording import Collectives, Recorder

FP32 = 2e-5  # fp32 Newton–Schulz against the reference fed the same reduced gradients


def worst(n: int, function: Any, *args: Any) -> float:
    errors = run_ranks(n, function, *args)
    assert all(e == errors[0] for e in errors)
    return max(errors[0].values())


def update(
    stage: int, dtype: str, zero: dict[str, Any] | None = None, more: dict[str, Any] | None = None, steps: int = 2
) -> dict[str, float]:
    ds_config = hosts.config(stage, dtype=dtype, zero=zero, **(more or {}))
    return hosts.update_errors(hosts.start(ds_config), ds_config["optimizer"]["params"], steps)


ALL = ("fp32", "bf16", "bf16_fp32", "fp16")
DTYPES = {0: ("fp32", "bf16", "fp16"), 1: ALL, 2: ALL, 3: ALL}
HOW = [(1, 0.0), (4, 0.05), (1, 0.05), (4, 0.0)]  # micro-batches, clipping


def where_and_how() -> list[Any]:
    """Every stage with every dtype, cut or not, each in one way of accumulating and clipping, so that all pairs are met; --all: in all."""
    cases = []
    for stage, dtypes in DTYPES.items():
        for k, dtype in enumerate(dtypes):
            for tp in (1, 2):
                for j, how in enumerate(HOW):
                    marks = () if (stage + k + 2 * tp) % len(HOW) == j else pytest.mark.more("product")
                    cases.append(pytest.param(stage, dtype, tp, *how, marks=marks))
    return cases


@pytest.mark.parametrize(("stage", "dtype", "tp", "accumulation", "clipping"), where_and_how())
def test_updates_equal_the_references(stage: int, dtype: str, tp: int, accumulation: int, clipping: float) -> None:
    parallel = {"tensor_parallel": hosts.tensor_parallel(tp)} if tp > 1 else {}
    more = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clipping, **parallel}
    assert worst(2, update, stage, dtype, None, more) < FP32


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_at_other_world_sizes(n: int, stage: int) -> None:
    assert worst(n, update, stage, "fp32") < FP32


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16_fp32"), (2, "bf16"), (3, "fp32")])
def test_tensor_parallel_by_data_parallel(stage: int, dtype: str) -> None:
    more = {"tensor_parallel": hosts.tensor_parallel(2), "gradient_accumulation_steps": 4, "gradient_clipping": 0.05}
    assert worst(4, update, stage, dtype, None, more) < FP32


CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SETTINGS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "round robin 1": (1, "fp32", {"round_robin_gradients": True}),
    "round robin 2": (2, "bf16", {"round_robin_gradients": True}),
    "parameter alignment": (2, "bf16", {"parameter_alignment": True}),
    "round robin, aligned": (2, "bf16", {"parameter_alignment": True, "round_robin_gradients": True}),
    "all-reduce 1": (1, "fp32", {"reduce_scatter": False}),
    "all-reduce 2": (2, "fp32", {"reduce_scatter": False}),
    "all-reduce 3": (3, "fp32", {"reduce_scatter": False}),
    "overlap 1": (1, "fp32", {"overlap_comm": True}),
    "overlap 2": (2, "bf16", {"overlap_comm": True}),
    "no overlap 3": (3, "fp32", {"overlap_comm": False}),
    "small buckets": (2, "fp32", {"reduce_bucket_size": 500, "allgather_bucket_size": 500}),
    "offload 1": (1, "fp32", CPU),
    "offload 2": (2, "bf16", CPU),
    "offload 3": (3, "bf16", CPU),
    "parameters and optimizer offloaded": (3, "bf16", {**CPU, "offload_param": {"device": "cpu", "pin_memory": False}}),
    "sub-groups": (3, "fp32", {"sub_group_size": 300}),
    "sub-groups, offloaded": (3, "bf16", {"sub_group_size": 300, **CPU}),
    "persistent parameters": (3, "bf16", {"stage3_param_persistence_threshold": 10**6}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_with_the_settings_of_zero(setting: str) -> None:
    stage, dtype, zero = SETTINGS[setting]
    more = {"gradient_accumulation_steps": 4, "gradient_clipping": 0.05}
    assert worst(2, update, stage, dtype, zero, more) < FP32


@pytest.mark.parametrize(("stage", "n"), [(1, 2), (2, 3), (3, 2)])
def test_where_all_ranks_work_on_slices(stage: int, n: int) -> None:
    assert worst(n, sliced_update, stage) < FP32


def sliced_update(stage: int) -> dict[str, float]:
    ds_config = hosts.config(stage, params={"placement": "gram"})
    engine = hosts.start(ds_config)
    errors = hosts.update_errors(engine, ds_config["optimizer"]["params"], 2)
    owners = {owner for each in engine.basic_optimizer.engines for d in each.domains for owner in d.plan.owners}
    assert owners == {SLICED}
    return errors


def independent_gradients(stage: int, clipping: float) -> list[float]:
    """The gradients that reach the optimizer, against those of one process on all ranks' batches, clipped by their norm."""
    accumulation = 2
    ds_config = hosts.config(stage, gradient_accumulation_steps=accumulation, gradient_clipping=clipping)
    engine, model = hosts.start(ds_config), hosts.make_net()
    captured = hosts.Captured(engine)
    hosts.train_step(engine, 0)
    for rank in range(dist.get_world_size()):
        for micro in range(accumulation):
            (model(hosts.batch(0, rank, micro)) / accumulation / dist.get_world_size()).backward()
    if clipping:
        nn.utils.clip_grad_norm_(model.parameters(), clipping)
    given = captured.take()
    return [float((given[name] - p.grad).norm() / p.grad.norm()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("clipping", [0.0, 0.05])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradients_are_those_of_one_process(stage: int, clipping: float) -> None:
    for errors in run_ranks(2, independent_gradients, stage, clipping):
        assert len(errors) == 12 and max(errors) < 2e-5


def zero_init(dtype: str) -> dict[str, float]:
    import deepspeed

    ds_config = hosts.config(3, dtype=dtype)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = hosts.make_net()
    assert all(p.numel() == 0 for p in model.parameters())  # partitioned from the start
    return hosts.update_errors(hosts.start(ds_config, model), ds_config["optimizer"]["params"], 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zero_init(dtype: str) -> None:
    assert worst(2, zero_init, dtype) < FP32


def client(stage: int, how: str) -> dict[str, float]:
    from muon_dist.integrations.deepspeed import MuonDist

    from muon_dist import build_param_groups

    ds_config = hosts.config(stage, dtype="bf16")
    params, model = ds_config.pop("optimizer")["params"], hosts.make_net()
    optimizer = {
        "named parameters": lambda: MuonDist(model.named_parameters(), **params),
        "groups": lambda: MuonDist(build_param_groups(model), **params),
        "callable": lambda: lambda given: MuonDist(given, **params),
    }[how]()
    return hosts.update_errors(hosts.start(ds_config, model, optimizer=optimizer), params, 2)


@pytest.mark.parametrize("how", ["named parameters", "groups", "callable"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_client_optimizers(stage: int, how: str) -> None:
    assert worst(2, client, stage, how) < FP32


def offloaded_client() -> dict[str, float]:
    from muon_dist.integrations.deepspeed import MuonDist

    ds_config = hosts.config(2, dtype="bf16", zero=CPU)
    params, model = ds_config.pop("optimizer")["params"], hosts.make_net()
    return hosts.update_errors(hosts.start(ds_config, model, optimizer=MuonDist(model.named_parameters(), **params)), params, 2)


def test_an_offloaded_client_optimizer_needs_no_setting() -> None:
    assert worst(2, offloaded_client) < FP32


class Fused(nn.Module):
    """A gate and an up projection in one weight, which AutoTP cuts each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(hosts.VOCABULARY, 12)
        self.gate_up_proj = nn.Linear(12, 2 * 14, bias=False)
        self.down_proj = nn.Linear(14, 12, bias=False)
        self.lm_head = nn.Linear(12, hosts.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(self.embed(tokens)).chunk(2, dim=-1)
        return F.cross_entropy(self.lm_head(self.down_proj(F.silu(gate) * up)).flatten(0, 1), (tokens * 7 + 3).flatten() % hosts.VOCABULARY)


def fused(tp: int, split: bool) -> dict[str, Tensor]:
    """What one step makes of the weights when every rank sees the same data."""
    specs = [
        {"patterns": [r".*gate_up_proj\.weight$"], "partition_type": "column", "shape": [[14, 14], -1], "partition_dim": 0},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ]
    params = {"split": {"gate_up_proj": [14, 14]}} if split else {}
    ds_config = hosts.config(1, params=params)
    if tp > 1:
        ds_config["tensor_parallel"] = {"autotp_size": tp, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    engine = hosts.start(ds_config, hosts.make_net(Fused))
    if tp > 1:
        assert tuple(engine.module.gate_up_proj.weight.shape) == (14, 12)
    loss = engine(hosts.batch(0, 0))
    engine.backward(loss)
    engine.step()
    return hosts.values_of(engine)


@pytest.mark.parametrize("split", [False, True])
def test_a_fused_projection_is_put_together_from_its_sub_parameters(split: bool) -> None:
    [alone] = run_ranks(1, fused, 1, split)
    cut = run_ranks(2, fused, 2, split)[0]
    before = {name: p.detach() for name, p in hosts.make_net(Fused).named_parameters()}
    for name, p in before.items():
        assert ((cut[name] - alone[name]).norm() / (alone[name] - p).norm()) < FP32


class Experts(nn.Module):
    """DeepSpeed's own MoE layer between dense ones."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embed = nn.Embedding(hosts.VOCABULARY, 17)
        self.fc = nn.Linear(17, 17)
        expert = nn.Sequential(nn.Linear(17, 31), nn.Tanh(), nn.Linear(31, 17))
        self.moe = MoE(17, expert, num_experts=4, ep_size=2, k=1, min_capacity=16, use_rts=False)
        self.lm_head = nn.Linear(17, hosts.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, auxiliary, _ = self.moe(torch.tanh(self.fc(self.embed(tokens))))
        return F.cross_entropy(self.lm_head(x).float().flatten(0, 1), (tokens * 7 + 3).flatten() % hosts.VOCABULARY) + 0.01 * auxiliary


def experts(stage: int, dtype: str) -> dict[str, float]:
    torch.manual_seed(dist.get_rank() % 2)  # experts differ between expert-parallel ranks; the engine makes dense weights equal
    ds_config = hosts.config(stage, dtype=dtype, params={"adamw": ["gate.wg"]})
    engine = hosts.start(ds_config, Experts())
    names = {p: hosts.label(p, name) for name, p in engine.module.named_parameters()}
    mine = [names[p] for p in names if p.ndim == 2 and not any(part in names[p] for part in ("embed", "lm_head", "wg"))]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    matrices = {name for each in everyone for name in each}
    assert len(matrices) == 1 + 4 * 2
    return hosts.update_errors(engine, ds_config["optimizer"]["params"], 2, matrices)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_experts_have_owners_among_their_own_ranks(stage: int, dtype: str) -> None:
    assert worst(4, experts, stage, dtype) < FP32


def pipeline(stage: int, dtype: str) -> dict[str, float]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, though a process group exists
    deepspeed.init_distributed("gloo", verbose=False)
    sizes = [(17, 33), (33, 5), (5, 64), (64, 17)]
    layers = [layer for sizes in sizes for layer in (LayerSpec(nn.Linear, *sizes), nn.Tanh())]
    model = PipelineModule(
        layers, num_stages=2, loss_fn=lambda out, wanted: (out.float() - wanted.float()).square().mean(), partition_method="uniform"
    )
    ds_config = hosts.config(stage, dtype=dtype, gradient_accumulation_steps=4)
    engine = hosts.start(ds_config, model)

    def batches() -> Any:
        generator = torch.Generator().manual_seed(dist.get_rank(engine.mpu.get_data_parallel_group()))
        while True:
            x, y = torch.randn(3, 17, generator=generator), torch.randn(3, 17, generator=generator)
            yield (x.bfloat16() if dtype == "bf16" else x), y

    engine.batches = batches()
    return hosts.update_errors(engine, ds_config["optimizer"]["params"], 2, {f"{i}.weight" for i in (0, 2, 4, 6)})


@pytest.mark.parametrize(("n", "stage", "dtype"), [(2, 0, "fp32"), (4, 0, "bf16"), (4, 1, "fp32"), (4, 1, "bf16")])
def test_pipelines(n: int, stage: int, dtype: str) -> None:
    assert worst(n, pipeline, stage, dtype) < FP32


def traffic(stage: int, dtype: str) -> tuple[list[str], int, int, list[tuple[int, ...]]]:
    """What one step of the optimizer sends: collectives by name, bytes over all ranks, the elements of cut matrices, NS by shape."""
    engine = hosts.start(hosts.config(stage, dtype=dtype))
    hosts.train_step(engine, 0)
    inner, seen = engine.basic_optimizer.step, Collectives()

    def step() -> None:
        with seen:
            inner()

    engine.basic_optimizer.step = step
    with Recorder() as recorder:
        hosts.train_step(engine, 1)
    cut = sum(
        piece.stop - piece.start
        for store in engine.basic_optimizer.stores
        for piece in store.pieces
        if engine.basic_optimizer.param_groups[store.group]["algorithm"] == "muon"
        and piece.stop - piece.start > 0
        and piece.stop - piece.start < getattr(piece.parameter, "ds_numel", piece.parameter.numel())
    )
    return seen.names, recorder.bytes_sent, cut, recorder.matrices


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (1, "bf16_fp32"), (3, "fp32")])
@pytest.mark.parametrize("n", [2, 4])
def test_a_step_sends_cut_matrices_and_nothing_else(n: int, stage: int, dtype: str) -> None:
    ranks = run_ranks(n, traffic, stage, dtype)
    shapes = sorted(shape for _, _, _, matrices in ranks for shape in matrices)
    assert shapes == sorted([(33, 17), (5, 33), (64, 5), (17, 64)])  # each once, on one rank
    for names, *_ in ranks:
        # there and back, and the count of updates that were left out; no flags, nothing gathered
        assert sorted(names) == ["allreduce_", "alltoall_base_", "alltoall_base_"]
    sent, cut, elements = sum(r[1] for r in ranks), sum(r[2] for r in ranks), 33 * 17 + 5 * 33 + 64 * 5 + 17 * 64
    assert 0 < sent <= 2 * 4 * cut  # what is whole on a rank stays there
    assert sent <= 2 * 4 * elements * (n - 1) / n * 1.05  # an owner keeps its own part
    if stage < 3 and n == 2:
        assert sent == 2 * 4 * 22  # the one matrix that is cut goes to the rank that has most of it


def nonfinite(stage: int, dtype: str, bf16: dict[str, Any]) -> list[bool]:
    """A rank's gradient turns NaN at one step; afterwards everything is as if that step had not been."""
    runs = []
    for bad in (True, False):
        ds_config = hosts.config(stage, dtype=dtype, gradient_clipping=1.0)
        ds_config.get("bf16", {}).update(bf16)
        engine = hosts.start(ds_config)
        for k in range(3):
            if k == 1 and not bad:
                continue
            tokens = hosts.batch(k, dist.get_rank())
            loss = engine(tokens)
            if k == 1 and dist.get_rank() == 1:
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
        state = hosts.gather_whole(
            engine, lambda s, p, e=engine: hosts.piece_of(s, p, e.basic_optimizer.state[s.tensor].get("momentum_buffer"))
        )
        runs.append((hosts.values_of(engine), state))
    assert runs[0][1]
    return [torch.equal(part[0][name], part[1][name]) for part in zip(*runs, strict=True) for name in part[0]]


@pytest.mark.parametrize(
    ("stage", "dtype", "bf16"),
    [
        (0, "fp32", {}),
        (0, "bf16", {}),
        (1, "fp32", {}),
        (1, "bf16_fp32", {}),
        (2, "fp32", {}),
        (2, "bf16", {}),
        (3, "bf16", {}),
        (1, "bf16", {"check_grad_overflow": False}),
        (2, "bf16", {"check_grad_overflow": False}),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_no_trace(stage: int, dtype: str, bf16: dict[str, Any]) -> None:
    for same in run_ranks(2, nonfinite, stage, dtype, bf16):
        assert all(same)


def wrong_place() -> str:
    engine = hosts.start(hosts.config(2))
    wrapper = engine.optimizer
    if dist.get_rank() == 1:  # as if parameters lay elsewhere than DeepSpeed says
        wrapper.single_partition_of_fp32_groups[0].data.copy_(wrapper.single_partition_of_fp32_groups[0].roll(1))
    try:
        hosts.train_step(engine, 0)
    except ValueError as error:
        return str(error)
    return ""


def test_pieces_that_lie_elsewhere_are_found_on_all_ranks_before_the_first_update() -> None:
    for message in run_ranks(2, wrong_place):
        assert message.startswith("rank 1: layers.2.bias has other values")


def checkpointed() -> dict[str, float]:
    import deepspeed

    class Recomputed(hosts.Net):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = deepspeed.checkpointing.checkpoint(lambda t, layer=layer: torch.tanh(layer(t)), x)
            return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), (tokens * 7 + 3).flatten() % hosts.VOCABULARY)

    ds_config = hosts.config(2, activation_checkpointing={"partition_activations": False})
    engine = hosts.start(ds_config, hosts.make_net(Recomputed))
    deepspeed.checkpointing.configure(None, deepspeed_config=ds_config)
    return hosts.update_errors(engine, ds_config["optimizer"]["params"], 2)


def test_activation_checkpointing() -> None:
    assert worst(2, checkpointed) < FP32


def both(stage: int) -> float:
    """How far the update is from that of DeepSpeed's Muon where that is right: no clipping, no tensor parallelism, fp32."""
    from .incidents import theirs

    params = {"adjust_lr_fn": "original", "momentum": 0.95}
    ours = theirs.change(hosts.config(stage, params=params, gradient_clipping=0.0), steps=1)
    return theirs.differs(ours, theirs.change(theirs.config(stage), steps=1))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_moving_from_deepspeeds_muon(stage: int) -> None:
    assert max(run_ranks(2, both, stage)) < 1e-3  # its iteration is in Gram space, whose rounding is larger
