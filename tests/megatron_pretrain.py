"""A Megatron training script as users have one, which knows nothing of MuonDist. Megatron's own loop needs a GPU; this one steps by itself.

Everything else is Megatron's: its parser and its checks, the model wrapped by its DDP, the optimizer and the scheduler that its
`setup_model_and_optimizer` makes. Prints what it got as one line of JSON per rank.
"""

import json
import os

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.training import setup_model_and_optimizer

from muon_dist.example import megatron_host as host


def main() -> None:
    host.run_without_cuda()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    dist.init_process_group("gloo")
    setup = host.Setup(
        tp=args.tensor_model_parallel_size,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        layers=args.num_layers,
        context=args.seq_length,
        batch=args.micro_batch_size,
        dtype="bf16" if args.bf16 else "fp32",
        distributed_optimizer=args.use_distributed_optimizer,
    )
    host.initialize(setup)

    def provide(pre_process: bool = True, post_process: bool = True, **options: object) -> torch.nn.Module:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        config = core_transformer_config_from_args(args)
        return GPTModel(
            config, get_gpt_layer_local_spec(), setup.vocabulary, setup.context, pre_process=pre_process, position_embedding_type="rope"
        )

    chunks, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, provide)
    losses = []
    for k in range(args.train_iters):
        loss, (stepped, _, _) = host.train_step(setup, chunks, optimizer, k)
        scheduler.step(increment=args.global_batch_size)
        assert stepped
        losses.append(loss)
    told = {
        "optimizer": type(optimizer).__name__,
        "wrappers": [type(wrapper).__name__ for wrapper in optimizer.chained_optimizers],
        "steps": sorted({len(schedule) for _, schedule in getattr(optimizer, "schedules", {}).values()}),
        "lr": optimizer.param_groups[0]["lr"],
        "losses": losses,
    }
    print(f"rank {os.environ['RANK']}: {json.dumps(told)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
