"""`muon-dist doctor`: versions, devices and backends, then a real two-rank step compared with whole matrices. Paste-ready."""

from __future__ import annotations

import os
import platform
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from ..optimizer import MuonDist
from ..polar.coefficients import JORDAN
from ..run import end_process_group
from ..version import __version__, installed_versions

SHAPES = [(48, 40), (33, 17), (5, 64)]
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}


def run() -> int:
    """Check this installation with two ranks."""
    print(f"muon_dist {__version__}, Python {platform.python_version()}, {platform.platform()}")
    packages = ("torch", "numpy", "deepspeed", "megatron-core", "emerging-optimizers", "transformers", "mpi4py", "triton")
    versions = installed_versions(packages)
    for package in packages:
        print(f"  {package} {versions.get(package, 'not installed')}")
    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"devices: {', '.join(devices) or 'CPU only'}; {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if not dist.is_available():
        print("torch.distributed is not available in this torch: only one process can train")
        return 1
    backends = [name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)]
    print(f"backends: {', '.join(backends)}")
    device = "cuda" if len(devices) >= 2 and "nccl" in backends else "cpu"
    print(f"two ranks, FSDP2 on {device}, {_dtype(device)}, one step against the whole matrices in one process …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, args=(folder, device), nprocs=2)
            with open(os.path.join(folder, "error")) as file:
                error = float(file.read())
        except Exception as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    return verdict(error, device)


def verdict(error: float, device: str) -> int:
    """Say whether an update is right: 0 if so."""
    bound = BOUND[_dtype(device)]
    print(f"largest relative error of an update: {error:.1e} (at most {bound:.0e}): {'ok' if error <= bound else 'WRONG'}")
    return 0 if error <= bound else 1


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cuda" else torch.float64


class _Bank(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=dtype) for m, n in SHAPES)

    def forward(self, k: int, x: Tensor) -> Tensor:
        result: Tensor = self.layers[k](x)
        return result


def _rank(rank: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if device == "cuda":
        torch.cuda.set_device(rank)
    worst = largest_error(device)
    if rank == 0:
        with open(os.path.join(folder, "error"), "w") as file:
            file.write(repr(worst))
    end_process_group()


def largest_error(device: str) -> float:
    """The largest relative error of an update of matrices in FSDP2's shards over all ranks, against whole ones. Collective."""
    rank, size, dtype = dist.get_rank(), dist.get_world_size(), _dtype(device)
    torch.manual_seed(0)
    whole = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    model = _Bank(dtype).to(device)
    fully_shard(model, mesh=init_device_mesh(device, (size,)))
    named = list(model.named_parameters())
    gradients = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    for (_, p), value, gradient in zip(named, whole, gradients, strict=True):
        assert isinstance(p, DTensor)  # fully_shard made it one
        rows = slice(*_rows(value.shape[0], rank, size))
        p.to_local().data.copy_(value[rows])
        p.grad = DTensor.from_local(
            gradient[rows].to(device), p.device_mesh, p.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    MuonDist(named, lr=1.0, weight_decay=0.0, adjust_lr_fn="none", compute_dtype=dtype, ns_steps=5).step()
    worst = 0.0
    for (_, p), value, gradient in zip(named, whole, gradients, strict=True):
        assert isinstance(p, DTensor)
        update = value - p.full_tensor().detach().cpu()
        expected = _naive(gradient.lerp(gradient * 0.05, 0.95))
        worst = max(worst, float((update - expected).norm() / expected.norm()))
    return worst


def _rows(size: int, rank: int, ranks: int) -> tuple[int, int]:
    chunk = -(-size // ranks)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def _naive(matrix: Tensor) -> Tensor:
    """Five Newton–Schulz steps as the formula has them; the optimizer's own code is not used here."""
    if matrix.shape[0] > matrix.shape[1]:
        return _naive(matrix.T).T
    a, b, c = JORDAN
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
