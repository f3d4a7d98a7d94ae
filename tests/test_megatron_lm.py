"""Megatron-LM's own pretrain_gpt.py, started as the README says, from another folder; MEGATRON_LM names its checkout (README.md here)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from muon_dist.run.bootstrap import free_port

ROOT = Path(__file__).parent.parent
SOURCE = Path(os.environ.get("MEGATRON_LM", "/nowhere"))
pytestmark = pytest.mark.skipif(not (SOURCE / "pretrain_gpt.py").exists(), reason="Megatron-LM's source is not here (MEGATRON_LM)")

# After an example's own flags, of which the last counts: a model that two CPU ranks train
SMALL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --kv-channels 16 --seq-length 32 "
    "--max-position-embeddings 32 --tensor-model-parallel-size 1 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 "
    "--lr-warmup-iters 0 --eval-iters 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --log-interval 1 "
    "--transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-persist-layer-norm"
)
PIPELINE = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"


def launched(folder: Path, *flags: str) -> str:
    environment = {**os.environ, "NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONPATH"] = ":".join([str(ROOT / "tests" / "megatron_lm"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = ["bash", str(ROOT / "launch" / "pretrain_megatron.sh"), str(SOURCE / "pretrain_gpt.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"iteration +\d+/ +\d+ .*lm loss: (\S+)", text)]


@pytest.mark.parametrize(
    ("name", "more"), [("quickstart", ""), ("llama-8b", "--tensor-model-parallel-size 2"), ("llama-70b", PIPELINE)], ids=lambda x: x[:12]
)
def test_each_example_starts(name: str, more: str, tmp_path: Path) -> None:
    text = launched(tmp_path, "--args", str(ROOT / "configs" / "megatron" / f"{name}.args"), *SMALL.split(), *more.split())
    assert len(losses(text)) == 2
    assert re.search(rf"muon_dist \S+ in Megatron core \S+, {re.escape(str(SOURCE))}/megatron/core", text)
    assert "Newton–Schulz steps: adaptive (accuracy jordan4)" in text and re.search(r"\d+ Muon +weight matrix", text)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    flags = ["--args", str(ROOT / "configs" / "megatron" / "quickstart.args"), *SMALL.split(), "--ckpt-format", "torch_dist"]
    flags += ["--save-interval", "2", "--no-load-rng", "--override-opt_param-scheduler"]
    launched(tmp_path, *flags, "--save", str(tmp_path / "kept"))
    text = launched(tmp_path, *flags, "--load", str(tmp_path / "kept"), "--train-iters", "3")
    assert len(losses(text)) == 1 and re.search(r"iteration +3/ +3", text)


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    """Word for word, with small sizes in the place of "…"; the one for Slurm starts the same script."""
    text = (ROOT / "integrations" / "megatron" / "README.md").read_text()
    lines = [line for line in text.split("```bash")[1].split("```")[0].splitlines() if "…" in line]
    assert [line.split()[0] for line in lines] == ["python", "bash", "sbatch"]
    assert "launch/pretrain_megatron.sh" in (ROOT / "launch" / "pretrain_megatron.sbatch").read_text()
    enough = "--seed 1 --lr 1e-3 --min-lr 1e-4 --swiglu --disable-bias-linear --group-query-attention --untie-embeddings-and-output-weights"
    environment = {**os.environ, "NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment |= {"MEGATRON_LM": str(SOURCE), "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["PYTHONPATH"] = ":".join([str(ROOT / "tests" / "megatron_lm"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for line in lines[:2]:
        before, comment = line.split("…")[0], line.split("…")[-1]
        assert not comment.strip() or comment.strip().startswith("#")
        more = f"{SMALL} --eval-interval 1000 " + ("" if "--args" in line else enough + " --position-embedding-type rope")
        done = subprocess.run(["bash", "-c", before + more], capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(losses(done.stdout)) == 2
