"""The `muon-dist` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..groups import PLAN_KEYS, PlanOptions
from ..polar.polynomials import NAMES as POLYNOMIALS
from ..polar.scaling import NAMES
from ..rules import MATRIX_RULES
from ..run.bootstrap import LAUNCHERS
from ..sharding.owners import PLACEMENTS
from ..spectrum.policy import ACCURACIES, ACCURACY, Policy
from ..version import __version__


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="muon-dist", description="Muon for large models, distributed: look, plan, measure.")
    root.add_argument("--version", action="version", version=f"muon-dist {__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="versions, devices, backends, and a real two-rank step checked against whole matrices")
    doctor.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="check a cluster before the job: started by this launcher as the job will be, looks at all ranks, their links and a step",
    )

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
    _add_plan_options(plan)
    plan.add_argument("--tokens", type=int, default=2**20, help="tokens per step, for the model's FLOPs (default 1,048,576)")
    plan.add_argument("--json", metavar="FILE", help="also write every matrix's owner and every rank's load")

    plan.add_argument("--rule", choices=MATRIX_RULES, default="muon", help="what matrices are updated by, for its state (default muon)")
    plan.add_argument("--laws", action="store_true", help="steps per layer as the scaling laws predict them, instead of --ns-steps for all")
    plan.add_argument("--accuracy", choices=ACCURACIES, help=f"for --laws: no further from UVᵀ than so many Jordan steps ({ACCURACY})")
    plan.add_argument("--coverage", type=float, help="for --laws, instead: share of directions to bring near 1")

    spectrum = commands.add_parser("spectrum", help="what a run with telemetry_dir measured: a table per matrix, and a picture")
    spectrum.add_argument("run", help="the run's telemetry directory")
    spectrum.add_argument("--picture", metavar="FILE", help="where the picture goes (default RUN/spectrum.png)")
    spectrum.add_argument("--json", metavar="FILE", help="also write the last measurement of every matrix")

    watch = commands.add_parser("watch", help="a run of launch/train_gpt.py as it goes")
    watch.add_argument("run", help="the run's --out folder")
    watch.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default 2)")
    watch.add_argument("--once", action="store_true", help="look once, as where the output is no terminal")

    report = commands.add_parser("report", help="one HTML page of a run: curves, spectra, schedules, costs, plan, environment")
    report.add_argument(
        "runs", nargs="+", metavar="run", help="--out folders; the page is about the first, the others' curves are beside it"
    )
    report.add_argument("--out", metavar="FILE", help="where the page goes (default RUN/report.html)")

    fit = commands.add_parser("fit", help="scaling laws of singular values per kind of layer, from runs of several sizes")
    fit.add_argument("runs", nargs="+", help="telemetry directories, or CSV files with kind, depth, params, rank, q, sigma")
    fit.add_argument("--q", type=float, default=0.5, help="quantile to show: .1, .25, .5, .75 or .9 (default .5)")
    fit.add_argument("--picture", metavar="FILE", help="plot of the laws with their bands")
    fit.add_argument("--csv", metavar="FILE", help="also write the observations")

    bench = commands.add_parser("bench", help="paired measurements against peers")
    benches = bench.add_subparsers(dest="bench", required=True)
    step = benches.add_parser("step", help="the optimizer step against torch.optim.Muon and a naive sharded Muon")
    dion = benches.add_parser("dion", help="the optimizer step against dion's Muon, sharded as by FSDP2")
    for command, ranks in ((step, [1, 2, 4]), (dion, [2, 4])):
        command.add_argument("--model", help="a config whose matrices are timed (default: GPT-2 small's)")
        command.add_argument("--layers", type=int, default=2, help="only its first N layers (default 2)")
        command.add_argument("--ranks", type=int, nargs="+", default=ranks)
        command.add_argument("--pairs", type=int, default=7, help="paired repetitions (default 7)")
        _add_plan_options(command)
        command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the products and on the wire (default fp32)")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="a GPU per rank, with cuda (default cpu)")
        command.add_argument("--threads", type=int, default=None, help="torch threads per rank (default: cores / ranks, at least 1)")
        command.add_argument("--trace", metavar="FILE", help="also write a timeline of a step per number of ranks, FILE-N.json")

    ns = benches.add_parser("ns", help="Newton–Schulz per shape: the chosen form beside the direct one and torch.optim.Muon's iteration")
    ns.add_argument(
        "--shapes", nargs="+", metavar="MxN", help="matrices such as 768x3072 (default: those of models of .1 to 1 B parameters)"
    )
    ns.add_argument("--polynomial", choices=POLYNOMIALS, default="jordan")
    ns.add_argument("--steps", type=int, default=5)
    ns.add_argument("--batch", type=int, nargs="+", default=[1], help="matrices of each shape (default 1)")
    ns.add_argument("--dtype", help="of the products, such as bf16 (default: what MuonDist takes on the device)")
    ns.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    ns.add_argument("--rounds", type=int, default=7)
    ns.add_argument("--compiled", action="store_true", help="also beside torch.optim.Muon's iteration through torch.compile")
    ns.add_argument("--symmetric-kernels", action="store_true", help="also measure from how many rows on the Triton kernel is faster")

    adaptive = benches.add_parser("adaptive", help="FLOPs and error of adaptive schedules on real momentum, part by part")
    estimates = benches.add_parser("spectrum", help="estimated quantiles over exact ones")
    for command in (adaptive, estimates):
        command.add_argument("--data", metavar="FILE", nargs="+", help="safetensors files of matrices (default: trains small GPTs)")
    adaptive.add_argument("--accuracy", nargs="+", choices=ACCURACIES, default=[ACCURACY, "jordan5"])
    adaptive.add_argument("--coverage", type=float, nargs="+", default=[0.9])
    adaptive.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the products (default fp32)")

    training = benches.add_parser("training", help="loss of a small GPT with fixed, adaptive and exact orthogonalisation, and AdamW")
    training.add_argument("--steps", type=int, default=500)
    training.add_argument("--seconds", type=float, help="train each so long, instead of --steps")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--variants", nargs="+", metavar="NAME", help="only these rows of the table (default: all)")
    training.add_argument("--width", type=int, nargs="+", default=[128])
    training.add_argument("--layers", type=int, default=4)
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--context", type=int, default=128)
    training.add_argument("--lr", type=float, nargs="+", default=[0.005, 0.008, 0.0125], help="of the matrices (default .005 .008 .0125)")
    training.add_argument("--adam-lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="AdamW's (default .0005 .001 .002)")
    training.add_argument("--rest-lr", type=float, default=4e-3, help="of what AdamW trains beside Muon (default .004)")
    training.add_argument("--equal-rms", action="store_true", help="also where updates are as large as those of five Jordan steps")
    training.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model's products (default fp32)")
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    training.add_argument("--results", metavar="FILE", help="keep runs there, as lines of JSON, and take those that are there")
    training.add_argument("--picture", metavar="FILE", help="loss over steps and over time; needs matplotlib")

    ladder = benches.add_parser("ladder", help="GPTs of several widths, their spectra written for muon-dist fit")
    ladder.add_argument("--out", required=True, metavar="DIR", help="a directory per width goes here")
    ladder.add_argument("--widths", type=int, nargs="+", default=[64, 96, 136, 208, 256])
    ladder.add_argument("--layers", type=int, default=4)
    ladder.add_argument("--steps", type=int, default=300)
    ladder.add_argument("--lr", type=float, default=4e-3)
    ladder.add_argument("--seed", type=int, default=0)

    memory = benches.add_parser("associative-memory", help="a task on which the number of steps visibly matters")
    memory.add_argument("--horizons", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="numbers of optimizer steps")
    memory.add_argument("--betas", type=float, nargs="+", default=[1.5, 2.5], help="exponents of the items' frequencies")
    memory.add_argument("--picture", metavar="FILE")

    overhead = benches.add_parser("overhead", help="what adapting costs, as a share of the optimizer step")
    overhead.add_argument("--width", type=int, default=256)
    overhead.add_argument("--layers", type=int, default=6)
    overhead.add_argument("--cycles", type=int, default=2, help="measuring periods to time")
    overhead.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    probes = benches.add_parser("probes", help="what other ways to a polar factor would stand on: Cholesky, skinny products, CUDA graphs")
    probes.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="rows of square matrices")
    probes.add_argument("--directions", type=int, nargs="+", default=[16, 64, 256], help="columns of skinny matrices")
    probes.add_argument("--batch", type=int, default=8, help="matrices at once, beside a single one (default 8)")
    probes.add_argument("--rounds", type=int, default=7)
    probes.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    deepspeed = benches.add_parser("deepspeed", help="whole training steps in DeepSpeed against its own Muon")
    deepspeed.add_argument("--ranks", type=int, nargs="+", default=[2])
    deepspeed.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    deepspeed.add_argument("--width", type=int, default=512)
    deepspeed.add_argument("--layers", type=int, default=4)
    deepspeed.add_argument("--rounds", type=int, default=7, help="steps of every optimizer that are timed (default 7)")
    deepspeed.add_argument("--warmup", type=int, default=3, help="steps before (default 3)")
    deepspeed.add_argument("--offload", action="store_true", help="with the optimizer on the CPU")

    megatron = benches.add_parser("megatron", help="the optimizer step in Megatron against its own Muon (megatron-core 0.19)")
    megatron.add_argument("--ranks", type=int, nargs="+", default=[2])
    megatron.add_argument("--tp", type=int, default=2, help="tensor-parallel size (default 2)")
    megatron.add_argument("--hidden", type=int, default=512)
    megatron.add_argument("--layers", type=int, default=4)
    megatron.add_argument("--rounds", type=int, default=7, help="steps of every optimizer that are timed (default 7)")
    megatron.add_argument("--warmup", type=int, default=3, help="steps before (default 3)")

    scale = benches.add_parser("scale", help="a step of large models at thousands of ranks, simulated; held against this machine first")
    scale.add_argument("--models", nargs="+", choices=("llama-8b", "llama-70b", "moe-1t"), default=["llama-8b", "llama-70b", "moe-1t"])
    scale.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    scale.add_argument("--check-ranks", type=int, nargs="+", default=[1, 2, 4], help="of the steps measured here (default 1 2 4)")
    scale.add_argument("--steps", type=int, default=5, help="Newton–Schulz steps (default 5)")
    scale.add_argument("--rounds", type=int, default=7, help="timings of each, here (default 7)")
    scale.add_argument("--products", type=float, default=400, help="input: TFLOP/s of Newton–Schulz on a rank (default 400)")
    scale.add_argument("--memory", type=float, default=2.5, help="input: TB/s of a rank's memory (default 2.5)")
    scale.add_argument("--link", type=float, default=50, help="input: GB/s that a rank sends and receives at once (default 50)")
    scale.add_argument("--start", type=float, default=100, help="input: µs to start an all-to-all (default 100)")
    scale.add_argument("--model-flops", type=float, default=400, help="input: TFLOP/s of a rank on the model itself (default 400)")
    scale.add_argument("--tokens-per-rank", type=int, default=4096, help="of a step (default 4096)")
    _add_plan_options(scale)
    scale.add_argument("--picture", metavar="FILE", help="plot of the steps; needs matplotlib")

    for command in (ns, adaptive, estimates, training, ladder, memory, overhead, probes):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    for command in (step, dion, ns, adaptive, estimates, training, memory, overhead, probes, deepspeed, megatron, scale):
        command.add_argument("--json", metavar="FILE", help="also write every figure")
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
        from . import doctor, doctor_launcher

        return doctor.run() if arguments.launcher is None else doctor_launcher.run(arguments.launcher)
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
            options=_plan_options(arguments),
            tokens=arguments.tokens,
            laws=arguments.laws,
            policy=Policy(accuracy=arguments.accuracy, coverage=arguments.coverage),
            rule=arguments.rule,
            json_path=arguments.json,
        )
    if arguments.command == "spectrum":
        from ..show import spectrum

        return spectrum.run(arguments.run, arguments.picture, arguments.json)
    if arguments.command == "watch":
        from ..show import watch

        return watch.run(arguments.run, arguments.every, arguments.once)
    if arguments.command == "report":
        from ..show import report

        return report.run(arguments.runs, arguments.out)
    if arguments.command == "fit":
        from . import fit

        return fit.run(arguments.runs, q=arguments.q, picture=arguments.picture, csv_path=arguments.csv)
    return _bench(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "bench", "json", "data", "model")}
    if "json" in arguments:
        options["json_path"] = arguments.json
    if "placement" in arguments:
        options = {"options": _plan_options(arguments), **{key: value for key, value in options.items() if key not in PLAN_KEYS}}
    if arguments.bench in ("step", "dion"):
        from ..bench import step

        return step.run(arguments.model, dion=arguments.bench == "dion", **options)
    if arguments.bench == "ns":
        from ..bench import ns

        return ns.run(options.pop("shapes") or list(ns.SHAPES), **options)
    if arguments.bench == "adaptive":
        from ..bench import adaptive

        return adaptive.run(arguments.data, **options)
    if arguments.bench == "spectrum":
        from ..bench import adaptive

        return adaptive.estimates(arguments.data, **options)
    if arguments.bench == "training":
        from ..bench import training

        return training.run(**options)
    if arguments.bench == "ladder":
        from ..bench import ladder

        return ladder.run(**options)
    if arguments.bench == "associative-memory":
        from ..bench import associative_memory

        return associative_memory.run(**options)
    if arguments.bench == "probes":
        from ..bench import probes

        return probes.run(**options)
    if arguments.bench == "deepspeed":
        from ..bench import deepspeed

        return deepspeed.run(**options)
    if arguments.bench == "megatron":
        from ..bench import megatron

        return megatron.run(**options)
    if arguments.bench == "scale":
        from ..bench import scale

        return scale.run(**options)
    from ..bench import overhead

    return overhead.run(**options)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Those of `MuonDist` that are of no parameter group."""
    parser.add_argument("--bucket-mb", type=float, default=64, help="MiB that an owner gathers at a time, at most (default 64)")
    parser.add_argument("--placement", choices=PLACEMENTS, default="owner", help="who works on a matrix (default owner)")
    parser.add_argument("--symmetric-kernels", type=int, metavar="ROWS", help="from how many rows on a kernel takes symmetric products")


def _plan_options(arguments: argparse.Namespace) -> PlanOptions:
    return PlanOptions(**{key: getattr(arguments, key) for key in PLAN_KEYS})


if __name__ == "__main__":
    sys.exit(main())
