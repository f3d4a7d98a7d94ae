"""Small Megatron models for launch/train_gpt.py, the bench and the tests. Without CUDA, what keeps Megatron from a CPU is redirected."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _CudaIsCpu(TorchFunctionMode):
    """device="cuda" means the CPU, .cuda() is the tensor, and .type() says torch.cuda.*, which Megatron compares."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream on which nothing is ever late."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: None


def run_without_cuda() -> None:
    """Redirect in this process what Megatron asks of CUDA. Does nothing the second time."""
    if torch.cuda.is_available() or any(isinstance(mode, _CudaIsCpu) for mode in _get_current_function_mode_stack()):
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda *args: _Stream()
    cuda.get_device_properties = lambda *args: SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=2**34)
    cuda.synchronize = lambda *args: None
    cuda.Stream, cuda.stream = (lambda *args, **options: _Stream()), (lambda *args: contextlib.nullcontext())
    _CudaIsCpu().__enter__()
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):  # Transformer Engine's layers are compared with
        multi_latent_attention.TELinear = type("TELinear", (), {})
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and how it is parallelised; sizes that ranks divide, but that flat buffers cut at arbitrary elements."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    dtype: str = "fp32"
    distributed_optimizer: bool = False
    instances: int = 1
    overlap: bool = False
    layers: int = 2
    hidden: int = 24
    heads: int = 4
    groups: int = 2
    ffn: int = 40
    gated: bool = True
    experts: int = 0
    dense_layers: int = 0  # before those with experts
    mla: bool = False
    tied: bool = False
    sequence_parallel: bool = False
    micro_batches: int = 1
    batch: int = 4
    context: int = 16
    vocabulary: int = 64
    clip: float = 1.0
    seed: int = 123


def initialize(setup: Setup) -> None:
    """Megatron's process groups and random states, over torch's ranks."""
    from megatron.core import parallel_state, tensor_parallel

    run_without_cuda()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        expert_model_parallel_size=setup.ep,
        expert_tensor_parallel_size=setup.etp,
        num_distributed_optimizer_instances=setup.instances,
    )
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def transformer_config(setup: Setup) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    dtype = DTYPES[setup.dtype]
    more: dict[str, Any] = {}
    if setup.gated:
        more.update(gated_linear_unit=True, activation_func=F.silu)
    if setup.experts:
        more.update(
            num_moe_experts=setup.experts,
            moe_router_topk=2,
            moe_token_dispatcher_type="allgather",
            moe_router_load_balancing_type="none",
            moe_ffn_hidden_size=setup.ffn,
            expert_tensor_parallel_size=setup.etp,
        )
    kind = TransformerConfig
    if setup.mla:
        kind = MLATransformerConfig
        more.update(q_lora_rank=12, kv_lora_rank=10, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=6)
        more.update(rope_type="rope", num_query_groups=setup.heads)
    else:
        more.update(num_query_groups=setup.groups)
    return kind(
        num_layers=setup.layers,
        hidden_size=setup.hidden,
        num_attention_heads=setup.heads,
        ffn_hidden_size=setup.ffn,
        use_cpu_initialization=True,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=setup.dtype == "bf16",
        fp16=setup.dtype == "fp16",
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        expert_model_parallel_size=setup.ep,
        sequence_parallel=setup.sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_sync=False,
        **more,
    )


class _Attention(nn.Module):
    """Softmax attention in which values may be narrower than keys, as multi-latent attention needs; the local spec has none."""

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **options: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (batch, heads, sequence, channels)
        scores = (q @ k.mT) * (self.softmax_scale or q.shape[-1] ** -0.5)
        mixed = scores.masked_fill(mask, float("-inf")).softmax(-1).to(v.dtype) @ v
        return mixed.permute(2, 0, 1, 3).flatten(2)


class _SequenceParallelNorm(nn.LayerNorm):
    """LayerNorm whose gradients Megatron sums over tensor-parallel ranks, as that of Apex, which the local spec lacks on a CPU."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for p in self.parameters():
            p.sequence_parallel = True  # type: ignore[attr-defined]


def make_model(setup: Setup) -> list[Any]:
    """A GPT wrapped by Megatron's DistributedDataParallel: its chunks on this rank."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = transformer_config(setup)
    spec = get_gpt_layer_local_spec(num_experts=setup.experts or None, multi_latent_attention=setup.mla)
    if setup.mla:
        spec.submodules.self_attention.submodules.core_attention = _Attention
    norm = spec.submodules.input_layernorm
    if setup.sequence_parallel:
        norm = spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _SequenceParallelNorm
    if setup.sequence_parallel or setup.dense_layers:
        layers = [get_gpt_layer_local_spec()] * setup.dense_layers + [spec] * (setup.layers - setup.dense_layers)
        here = setup.layers // setup.pp
        first = here * parallel_state.get_pipeline_model_parallel_rank()
        spec = TransformerBlockSubmodules(layer_specs=layers[first : first + here], layer_norm=norm)
    torch.manual_seed(setup.seed)
    model: nn.Module = GPTModel(
        config,
        spec,
        vocab_size=setup.vocabulary,
        max_sequence_length=setup.context,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=setup.tied,
        position_embedding_type="rope",
    )
    model = model.to(_device(), DTYPES[setup.dtype])
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=setup.dtype != "fp32",
        overlap_grad_reduce=setup.overlap,
        overlap_param_gather=setup.overlap and setup.distributed_optimizer,
        use_distributed_optimizer=setup.distributed_optimizer,
        num_distributed_optimizer_instances=setup.instances,
    )
    return [DistributedDataParallel(config, ddp, model)]


def optimizer_config(setup: Setup, kind: Callable[..., Any], **given: Any) -> Any:
    """A config of `kind` (Megatron's `OptimizerConfig` or a subclass) for the model of a setup."""
    return kind(
        **{
            "lr": 3e-3,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "bf16": setup.dtype == "bf16",
            "fp16": setup.dtype == "fp16",
            "params_dtype": DTYPES[setup.dtype],
            "use_distributed_optimizer": setup.distributed_optimizer,
            "clip_grad": setup.clip,
            **given,
        }
    )


def set_rates(optimizer: Any, lr: float, weight_decay: float = 0.0) -> None:
    """What Megatron's scheduler does before a step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, weight_decay * group.get("wd_mult", 1.0)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _positions_and_mask(setup: Setup) -> tuple[Tensor, Tensor]:
    """What the model is called with beside tokens: (batch, context), and (1, 1, context, context), True where nothing is seen."""
    positions = torch.arange(setup.context, device=_device()).unsqueeze(0).expand(setup.batch, -1)
    return positions, torch.triu(torch.ones(1, 1, setup.context, setup.context, dtype=torch.bool, device=_device()), 1)


@torch.no_grad()
def evaluate(setup: Setup, chunks: list[Any], tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of windows of tokens, without pipeline stages."""
    loss: Tensor = chunks[0](tokens, *_positions_and_mask(setup), labels=targets).float().mean()
    return loss


def train_step(
    setup: Setup,
    chunks: list[Any],
    optimizer: Any,
    step: int,
    read: Callable[[int], Tensor] | None = None,
    around: Callable[[Callable[[], Any]], Any] = lambda step: step(),
) -> tuple[float | None, Any]:
    """Forward, backward and the optimizer's step on data of this data-parallel rank: (loss on the last stage, what `step` returned).

    `read(seed)` gives (batch, context + 1) tokens; random ones without it. `around` calls the optimizer's step.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = chunks[0].config
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    seed = 1000 * step + parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        for micro in itertools.count():
            if read is not None:
                yield read(seed + 100 * micro)
            else:
                yield torch.randint(0, setup.vocabulary, (setup.batch, setup.context + 1), generator=generator)

    positions, mask = _positions_and_mask(setup)

    def forward(data: Iterator[Tensor], model: Any) -> Any:
        tokens = next(data).to(positions.device)
        output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

        def loss(value: Tensor) -> Any:
            mean = value.float().mean()
            return mean, {"loss": mean.detach().clone()}  # Megatron divides the first in place

        return output, loss

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches(),
        model=chunks,
        num_microbatches=setup.micro_batches,
        seq_length=setup.context,
        micro_batch_size=setup.batch,
        forward_only=False,
    )
    stepped = around(optimizer.step)
    return (float(sum(each["loss"] for each in losses) / len(losses)) if losses else None), stepped


def whole_matrices(chunks: list[Any]) -> dict[str, Tensor]:
    """The weights of linear layers, whole and as without tensor parallelism, by name."""
    from megatron.core import parallel_state

    group, result = parallel_state.get_tensor_model_parallel_group(), {}
    for name, p in chunks[0].named_parameters():
        if p.ndim == 2 and ".layers." in name:
            shards = [torch.empty_like(p) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, p.detach().contiguous(), group=group)
            if "linear_fc1" in name and chunks[0].config.gated_linear_unit:
                shards = [shard.chunk(2)[k] for k in (0, 1) for shard in shards]
            cut = getattr(p, "tensor_model_parallel", False) and len(shards) > 1
            result[name.removeprefix("module.")] = torch.cat(shards, dim=p.partition_dim) if cut else shards[0]
    return result


def everyone(value: Any, group: Any = None) -> list[Any]:
    """What every rank has."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, value, group=group)
    return told
