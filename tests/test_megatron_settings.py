"""What a Megatron user sets: what it means to MuonDist, and what is refused, with the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from muon_dist.integrations.megatron import MuonDistConfig, layout
from muon_dist.integrations.megatron.settings import (
    COEFFICIENTS,
    REFUSED,
    arguments,
    coefficients,
    completed,
    refuse_unsupported,
)

from muon_dist import MuonDist
from muon_dist.groups import PLAN_KEYS

from . import megatron_hosts as hosts
from .incidents import megatron_theirs as theirs
from .megatron_hosts import Setup
from .ranks import run_ranks


def chunk(ddp: dict[str, Any], model: dict[str, Any]) -> Any:
    return SimpleNamespace(ddp_config=SimpleNamespace(**ddp), config=SimpleNamespace(**model))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "muon_tp_mode": ({"muon_tp_mode": "duplicated"}, {}, {}),
    "muon_scalar_optimizer other than adam": ({"muon_scalar_optimizer": "lion"}, {}, {}),
    "decoupled_weight_decay=False": ({"decoupled_weight_decay": False}, {}, {}),
    "Megatron-FSDP": ({}, {"use_megatron_fsdp": True}, {}),
    "models that Megatron's DistributedDataParallel doesn't wrap, such as torch FSDP2": ({}, None, {}),
    "optimizer_cpu_offload": ({"optimizer_cpu_offload": True}, {}, {}),
    "use_precision_aware_optimizer": ({"use_precision_aware_optimizer": True}, {}, {}),
    "optimizer_cuda_graph": ({"optimizer_cuda_graph": True}, {}, {}),
    "use_layer_wise_distributed_optimizer": ({"use_layer_wise_distributed_optimizer": True}, {}, {}),
    "fp8 or fp4 parameters": ({}, {"fp8_param_gather": True}, {}),
    "interleaved gate and up of experts with muon_split_fc1": ({}, {}, {"moe_mlp_glu_interleave_size": 32}),
    "grad_norm_skip_threshold": ({"grad_norm_skip_threshold": 10.0}, {}, {}),
    "qk_clip with the distributed optimizer": ({"use_distributed_optimizer": True}, {}, {"qk_clip": True}),
    "use_mup": ({}, {}, {"use_mup": True}),
    "muon_use_syrk": ({"muon_use_syrk": True}, {}, {}),
    "use_kitchen": ({}, {}, {"use_kitchen": True}),
}


def test_every_refusal_has_a_case() -> None:
    assert {setting for setting, _, _ in REFUSED} == set(CASES)


@pytest.mark.parametrize("setting", CASES)
def test_what_is_not_supported_raises_with_the_reason(setting: str) -> None:
    given, ddp, model = CASES[setting]
    config = MuonDistConfig(lr=1e-3)
    refuse_unsupported(config, [chunk({}, {})])
    for name, value in given.items():
        setattr(config, name, value)
    wrapped = chunk({}, model) if ddp is None else chunk(ddp, model)
    if ddp is None:
        wrapped.ddp_config = None
    with pytest.raises(ValueError, match=r"MuonDist does not support .* in Megatron: ") as error:
        refuse_unsupported(config, [wrapped])
    assert setting in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"muon_scale_mode": "spectrl"}, "choose one of spectral"),
        ({"muon_fp32_matmul_prec": "fp8"}, "choose 'low' or 'medium'"),
        ({"muon_coefficient_type": "quintic"}, "for a fixed muon_num_ns_steps"),
        ({"muon_num_ns_steps": 5, "muon_coefficient_type": "quadratic"}, "choose one of simple"),
        ({"muon_num_ns_steps": 0}, "positive integer or 'adaptive'"),
        ({"muon_num_ns_steps": "many"}, "positive integer or 'adaptive'"),
    ],
)
def test_values_that_mean_nothing_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(MuonDistConfig(lr=1e-3, **given))


def test_every_argument_of_muondist_is_reachable_or_megatrons_to_decide() -> None:
    import inspect

    known = set(inspect.signature(MuonDist.__init__).parameters) - {"self"}
    of_megatron = {
        "params",
        "lr",
        "muon_lr",
        "adam_lr",
        "weight_decay",
        "adam_weight_decay",
        "process_group",
        "layouts",
        "nonfinite",
        "replicate_momentum",
        "eps",
    }
    apart = {*PLAN_KEYS, "telemetry_dir", "telemetry_sinks"}  # arguments of the optimizer, not of its groups
    assert set(arguments(MuonDistConfig(lr=1e-3))) == known - of_megatron - apart
    assert {f"muon_{name}" for name in apart} <= {f.name for f in dataclasses.fields(MuonDistConfig)}


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 3, 5, 7, 11])
def test_coefficients_are_those_of_megatrons_muon(name: str, steps: int) -> None:
    if importlib.util.find_spec("emerging_optimizers") is None:
        pytest.skip(theirs.WHY)
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    expected = newton_schulz(matrix, steps, name)
    x = matrix / matrix.norm()
    for a, b, c in coefficients(name, steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert (x - expected).norm() < 1e-3 * expected.norm()  # repeated, some of them magnify rounding


def test_megatrons_config_is_completed_and_its_defaults_count_as_not_given() -> None:
    from megatron.core.optimizer import OptimizerConfig

    plain = OptimizerConfig(lr=1e-3, optimizer="muon_dist", muon_momentum=0.8)
    whole = completed(plain)
    assert (whole.muon_num_ns_steps, whole.muon_coefficient_type, whole.muon_tp_mode) == ("adaptive", None, None)
    assert (whole.muon_momentum, whole.lr, whole.optimizer) == (0.8, 1e-3, "muon_dist")
    assert completed(OptimizerConfig(lr=1e-3, optimizer="muon_dist", muon_num_ns_steps=4)).muon_num_ns_steps == 4
    own = MuonDistConfig(lr=1e-3)
    assert completed(own) is own


# ------------------------------------------------------------------------------------------------------------------ names


def named(setup: Setup, given: dict[str, Any]) -> Any:
    try:
        _, optimizer = hosts.start(setup, **given)
    except ValueError as error:
        return str(error)
    return {route.name: (route.algorithm, route.reason) for route in optimizer.routes}


def test_names_are_those_of_the_whole_model() -> None:
    first, last = run_ranks(2, named, Setup(pp=2, micro_batches=2, layers=4), {})
    numbers = [sorted({int(name.split(".")[2]) for name in names if name.startswith("decoder.layers")}) for names in (first, last)]
    assert numbers == [[0, 1], [2, 3]]
    first, last = run_ranks(2, named, Setup(ep=2, experts=4), {})
    experts = [sorted({name.split("local_experts.")[1][0] for name in names if "local_experts" in name}) for names in (first, last)]
    assert experts == [["0", "1"], ["2", "3"]]


def test_routes_say_why() -> None:
    (routes,) = run_ranks(1, named, Setup(), {})
    assert routes["embedding.word_embeddings.weight"] == ("adamw", "embedding or output head, as Megatron marks it")
    assert routes["output_layer.weight"] == ("adamw", "embedding or output head, as Megatron marks it")
    assert routes["decoder.final_layernorm.weight"] == ("adamw", "1-D: not a matrix")
    assert routes["decoder.layers.1.mlp.linear_fc1.weight"] == ("muon", "weight matrix")


def test_patterns_decide_and_must_match_something_somewhere() -> None:
    setup = Setup(pp=2, micro_batches=2)
    # on the last stage only, and on both
    for names in run_ranks(2, named, setup, {"muon_params": ["output_layer"], "muon_adamw_params": ["linear_fc2"]}):
        assert all(r == ("adamw", "asked for by 'linear_fc2'") for name, r in names.items() if "linear_fc2" in name)
        assert names.get("output_layer.weight", ("muon",))[0] == "muon"
    assert all("matches no trainable parameter" in m for m in run_ranks(2, named, setup, {"muon_adamw_params": ["rooter"]}))
    assert "make the patterns disjoint" in run_ranks(1, named, Setup(), {"muon_params": ["fc2"], "muon_adamw_params": ["linear_fc2"]})[0]
    assert "muon_lr must be positive" in run_ranks(1, named, Setup(), {"muon_lr": -1.0})[0]


# ---------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(
    "fused",
    [
        layout.Fused(parts=(8, 2, 2), repeats=4),  # query groups
        layout.Fused(parts=(6, 6, 3, 3), repeats=2),  # with an output gate; cut inside q and inside v
        layout.Fused(parts=(7, 5), repeats=1),
        layout.Fused(parts=(24, 12), cut_by_part=True),
    ],
)
def test_every_row_is_held_once_and_is_where_megatron_has_it(fused: layout.Fused, ranks: int) -> None:
    if fused.rows % ranks:
        return
    interleaved = [
        sum(fused.split[:part]) + unit * size + row
        for unit in range(fused.repeats)
        for part, size in enumerate(fused.parts)
        for row in range(size)
    ]
    held = [[row for start, stop in fused.held(rank, ranks) for row in range(start, stop)] for rank in range(ranks)]
    if fused.cut_by_part:
        starts = [0, fused.parts[0]]
        share = [size // ranks for size in fused.parts]
        wanted = [[start + rank * n + row for start, n in zip(starts, share, strict=True) for row in range(n)] for rank in range(ranks)]
    else:
        n = fused.rows // ranks
        wanted = [interleaved[rank * n : (rank + 1) * n] for rank in range(ranks)]
    assert held == wanted
    assert sorted(row for rows in held for row in rows) == list(range(fused.rows))


@pytest.mark.parametrize(
    ("fused", "dim", "stride", "message"),
    [
        (layout.Fused(parts=(3, 1, 1), repeats=2), 0, 1, "has 8 rows, but its config says 2 × \\(3, 1, 1\\)"),
        (layout.Fused(parts=(2, 2)), 1, 1, "cut along dimension 1"),
        (None, 0, 2, "partition_stride 2"),
    ],
)
def test_rows_that_don_t_add_up_raise(fused: layout.Fused | None, dim: int, stride: int, message: str) -> None:
    p: Any = torch.nn.Parameter(torch.zeros(4, 6))
    p.partition_dim, p.partition_stride = dim, stride
    with pytest.raises(ValueError, match=message):
        layout.whole_parameter("w", p, fused, dim=dim, rank=0, ranks=2)


def test_mambas_projection_is_one_matrix_cut_by_its_sizes() -> None:
    p: Any = torch.nn.Parameter(torch.zeros(9, 6))
    p.partition_dim, p.partition_sizes = 0, [4, 3, 2]
    config = SimpleNamespace(num_attention_heads=2, gated_linear_unit=False)
    fused = layout.fused_rows("mixer.in_proj.weight", p, config, tensor_parallel=2, split_qkv=True, split_fc1=True)
    whole = layout.whole_parameter("mixer.in_proj.weight", p, fused, dim=0, rank=1, ranks=2)
    assert whole.shape == (18, 6) and whole.split is None
    assert [block[0] for block in whole.blocks] == [(4, 8), (11, 14), (16, 18)]


@pytest.mark.parametrize("allreduce", [True, False])  # without and with expert parallelism
@pytest.mark.parametrize("path", ["mlp.experts.weight1", "mlp.experts.linear_fc1.weight"])
def test_experts_packed_into_one_tensor_are_refused(path: str, allreduce: bool) -> None:
    model = module = torch.nn.Module()
    model.config = SimpleNamespace(num_moe_experts=4)  # type: ignore[assignment]
    *parents, leaf = path.split(".")
    for name in parents:
        module.add_module(name, torch.nn.Module())
        module = getattr(module, name)
    p: Any = torch.nn.Parameter(torch.zeros(4, 8))
    p.allreduce = allreduce
    setattr(module, leaf, p)
    with pytest.raises(ValueError, match="packs all local experts into one tensor"):
        list(layout.model_parameters([model], expert_rank=0, expert_ranks=2))


class TELinear(torch.nn.Module):
    """Transformer Engine's layers need a GPU; these have their names, and what they set on their weights in megatron-core 0.16."""

    def __init__(self, partition_dim: int) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(torch.zeros(4, 6))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, partition_dim, 1


class TELayerNormColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class TEColumnParallelGroupedLinear(TELinear):
    pass


class TERowParallelGroupedLinear(TELinear):
    pass


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (TELinear(0), None),  # duplicated: multi-latent attention's down projections
        (TELayerNormColumnParallelLinear(0), 0),
        (TERowParallelLinear(1), 1),
        (TEColumnParallelGroupedLinear(0), 0),
        (TERowParallelGroupedLinear(0), 1),  # Transformer Engine marks it as cut along its rows
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TELinear) else str(value),
)
def test_a_layers_class_says_how_its_weight_is_cut(layer: TELinear, dim: int | None) -> None:
    assert layout.cut_dimension(layer.weight, layer) == dim


def test_other_layers_are_cut_as_their_weights_say() -> None:
    layer, p = torch.nn.Linear(6, 4), torch.nn.Parameter(torch.zeros(4, 6))
    assert layout.cut_dimension(p, layer) is None
    marked: Any = p
    marked.tensor_model_parallel, marked.partition_dim = True, 1
    assert layout.cut_dimension(marked, layer) == 1
    marked.tensor_model_parallel, marked.partition_dim = True, -1
    assert layout.cut_dimension(marked, layer) is None


def without_expert_parallelism() -> str | float:
    import megatron.core

    setup = Setup(tp=2, etp=1, experts=4, sequence_parallel=True)
    try:
        chunks, optimizer = hosts.start(setup)
    except ValueError as error:
        assert megatron.core.__version__.startswith("0.16")
        return str(error)
    return max(hosts.update_errors(setup, chunks, optimizer, steps=2, lr=0.05).values())


def test_experts_with_another_tensor_parallel_size_and_no_expert_parallelism() -> None:
    """0.16 marks them as dense, whose group they don't have; 0.19 knows better."""
    for found in run_ranks(2, without_expert_parallelism):
        assert "set expert_tensor_parallel_size" in found if isinstance(found, str) else found < 2e-5


def given_groups(missing: str) -> str:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from muon_dist.integrations.megatron import MuonDistConfig, get_muon_dist_optimizer

    setup = Setup(tp=2)
    hosts.initialize(setup)
    chunks = hosts.make_model(setup)
    everything = ProcessGroupCollection.use_mpu_process_groups()
    some = ProcessGroupCollection()
    for field in dataclasses.fields(ProcessGroupCollection):
        if field.name != missing and getattr(everything, field.name, None) is not None:
            setattr(some, field.name, getattr(everything, field.name))
    config = hosts.optimizer_config(setup, MuonDistConfig, **hosts.PLAIN)
    try:
        optimizer = get_muon_dist_optimizer(config, chunks, {}, False, some)  # by position, as Megatron's function takes it
    except ValueError as error:
        return str(error)
    return str(max(hosts.update_errors(setup, chunks, optimizer, steps=1, lr=0.05).values()))


def test_process_groups_of_the_users_own() -> None:
    assert all(float(error) < 2e-5 for error in run_ranks(2, given_groups, "nothing"))
    assert all("pg_collection has no expt_dp" in message for message in run_ranks(2, given_groups, "expt_dp"))


# ------------------------------------------------------------------------------------------------------------------ moving


def first_update(ours: bool) -> dict[str, torch.Tensor]:
    setup = Setup(tp=2)
    moved = {"muon_num_ns_steps": 5, "muon_coefficient_type": None, "muon_split_fc1": False, "muon_fp32_matmul_prec": "highest"}
    if ours:
        return theirs.update(setup, hosts.start, **moved)
    return theirs.update(setup, theirs.start, muon_tp_mode="duplicated", muon_coefficient_type="quintic")


@theirs.needs_theirs
def test_the_flags_for_moving_give_megatrons_first_update() -> None:
    a, b = (run_ranks(2, first_update, ours)[0] for ours in (True, False))
    # fused gate and up lie shard by shard in theirs, which permutes rows and changes nothing else
    assert theirs.differs(a, b) < 2e-5
