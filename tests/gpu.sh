#!/usr/bin/env bash
# What a GPU does with MuonDist: whether it is right, how fast it is, whether adapting pays, and probes. Within 8 minutes on one H100.
#   bash tests/gpu.sh [--out DIR] [--device cuda|cpu] [--quick] [--minutes N]
# Needs a Python with torch for CUDA, numpy and pytest, and nothing else: no installation, no network. PYTHON chooses it.
# Writes gpu.json, gpu.md and pictures to DIR (default runs/gpu), part by part. Exits 1 where something is wrong.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    for candidate in "$root/.venv/bin/python" python3 python; do
        if "$candidate" -c 'import torch, numpy, pytest' 2>/dev/null; then
            PYTHON="$candidate"
            break
        fi
    done
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m tests.gpu "$@"
