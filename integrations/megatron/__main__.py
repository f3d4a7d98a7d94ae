"""`python -m muon_dist.integrations.megatron SCRIPT [its flags]`: run a Megatron script in which `--optimizer muon_dist` is known."""

from __future__ import annotations

import os
import runpy
import sys

from . import host  # noqa: F401  # its package registers MuonDist


def main(arguments: list[str]) -> int:
    if not arguments or not os.path.isfile(arguments[0]):
        asked = f"there is no script {arguments[0]!r}. " if arguments else ""
        print(f"{asked}usage: python -m muon_dist.integrations.megatron pretrain_gpt.py --optimizer muon_dist [flags]", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # as `python SCRIPT` does
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
