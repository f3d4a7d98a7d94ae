"""The `muon-dist` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..polar.scaling import NAMES
from ..version import __version__


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="muon-dist", description="Muon for large models, distributed: look, plan, measure.")
    root.add_argument("--version", action="version", version=f"muon-dist {__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, backends, and a real two-rank step checked against whole matrices")

    inspect = commands.add_parser("inspect", help="every parameter of a model: route, reason, matrices, scale")
    inspect.add_argument("model", help="a config such as configs/models/llama-8b.json, or a module path such as package.module:Class")
    inspect.add_argument("--adjust-lr-fn", default="match_rms_adamw", choices=NAMES)
    inspect.add_argument("--json", metavar="FILE", help="also write what is printed")

    plan = commands.add_parser("plan", help="owners, balance, bytes and memory of a job, from shapes alone")
    plan.add_argument("config", help="a config such as configs/models/llama-8b.json")
    plan.add_argument("--dp", type=int, default=1, help="data-parallel ranks (default 1)")
    plan.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default 1)")
    plan.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage (default 1)")
    plan.add_argument("--ns-steps", type=int, default=5)
    plan.add_argument("--bucket-mb", type=float, default=64)
    plan.add_argument("--tokens", type=int, default=2**20, help="tokens per step, for the model's FLOPs (default 1,048,576)")
    plan.add_argument("--json", metavar="FILE", help="also write every matrix's owner and every rank's load")

    bench = commands.add_parser("bench", help="paired measurements against peers")
    benches = bench.add_subparsers(dest="bench", required=True)
    step = benches.add_parser("step", help="the optimizer step against torch.optim.Muon and a naive sharded Muon")
    step.add_argument("--model", help="a config whose matrices are timed (default: GPT-2 small's)")
    step.add_argument("--layers", type=int, default=2, help="only its first N layers (default 2)")
    step.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    step.add_argument("--pairs", type=int, default=7, help="paired repetitions (default 7)")
    step.add_argument("--threads", type=int, default=None, help="torch threads per rank (default: cores / ranks, at least 1)")
    step.add_argument("--json", metavar="FILE", help="also write every repetition")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        print(f"muon-dist {arguments.command}: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "doctor":
        from . import doctor

        return doctor.run()
    if arguments.command == "inspect":
        from . import inspect

        return inspect.run(arguments.model, arguments.adjust_lr_fn, arguments.json)
    if arguments.command == "plan":
        from . import plan

        return plan.run(
            arguments.config,
            dp=arguments.dp,
            tp=arguments.tp,
            zero=arguments.zero,
            ns_steps=arguments.ns_steps,
            bucket_mb=arguments.bucket_mb,
            tokens=arguments.tokens,
            json_path=arguments.json,
        )
    from ..bench import step

    return step.run(
        arguments.model,
        layers=arguments.layers,
        ranks=arguments.ranks,
        pairs=arguments.pairs,
        threads=arguments.threads,
        json_path=arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
