"""`python -m muon_dist.integrations.megatron SCRIPT [its flags]`: run a Megatron script in which `--optimizer muon_dist` is known."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from typing import Any

import muon_dist

from . import host  # noqa: F401  # its package registers MuonDist


def main(arguments: list[str]) -> int:
    if not arguments or not os.path.isfile(arguments[0]):
        asked = f"there is no script {arguments[0]!r}. " if arguments else ""
        print(f"{asked}usage: python -m muon_dist.integrations.megatron pretrain_gpt.py --optimizer muon_dist [flags]", file=sys.stderr)
        return 2
    sys.argv = arguments  # its folder is on sys.path already, by the package's __init__
    core: Any = importlib.import_module("megatron.core")
    if os.environ.get("RANK", "0") == "0":
        print(f"muon_dist {muon_dist.__version__} in Megatron core {core.__version__}, {os.path.dirname(core.__file__)}", flush=True)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
