"""Two ranks whose CPUs round unlike: coefficients, forms, decisions and state are the same on both, since each is settled once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from muon_dist.run.bootstrap import free_port

JOB = """
import hashlib, json, os
import numpy as np, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from muon_dist import MuonDist
from muon_dist.spectrum.moments import spectrum_from_quantiles

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
shapes = [(96, 128), (128, 96), (96, 96), (64, 256)]
parameters = [torch.nn.Parameter(distribute_tensor(torch.randn(s), mesh, [Shard(0)])) for s in shapes]
optimizer = MuonDist([(f"blocks.{k}.attn.q.weight", p) for k, p in enumerate(parameters)], lr=1e-2, accuracy="jordan5", measure_every=6)
for step in range(40):
    for k, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + k)
        gradient = torch.randn(shapes[k], generator=generator) * torch.logspace(0, -1 - k, shapes[k][1])
        p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
generator = np.random.default_rng(0)
a, b = generator.standard_normal((2, 300, 300))
own = hashlib.sha256((a @ b).tobytes() + (torch.from_numpy(a).float() @ torch.from_numpy(b).float()).numpy().tobytes()).hexdigest()
rows = torch.cat([optimizer.state[p]["spectrum"] for p in parameters]).nan_to_num(-1)
plans = [plan.digest() for _, plan in optimizer.plans]
schedules = [[list(map(list, s.steps)), s.deflation] for _, s in optimizer.schedules.values()]
if os.environ["RANK"] == "1":
    dist.barrier()
print(json.dumps({"own": own, "rows": rows.tolist(), "plans": plans, "schedules": schedules, "measured": int(rows[:, 5].min())}))
if os.environ["RANK"] == "0":
    dist.barrier()
dist.destroy_process_group()
"""
OLD = {"OPENBLAS_CORETYPE": "Prescott", "MKL_CBWR": "COMPATIBLE", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}


def run_unlike() -> list[dict]:
    port, processes = free_port(), []
    for rank, cpu in enumerate(({}, OLD)):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", JOB],
                env={**os.environ, **own, **cpu},
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    found = []
    for process in processes:
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_ranks_with_unlike_cpus_have_the_same_schedules_and_state() -> None:
    new, old = run_unlike()
    assert new["own"] != old["own"], "both round alike here, so that this shows nothing"
    assert new["plans"] == old["plans"] and new["schedules"] == old["schedules"]
    assert new["rows"] == old["rows"] and new["measured"] >= 3
    assert any(deflation for _, deflation in new["schedules"])
