"""MuonDist in Megatron: `python -m muon_dist.integrations.megatron pretrain_gpt.py --optimizer muon_dist …` runs an unchanged script;
importing this in the script does the same.

README.md beside this file has the support table and what each flag does.
"""

import os
import sys

# `python -m` imports this before __main__ runs, with "-m" as the script's name: the megatron beside the script comes first
if sys.argv[0] == "-m" and __name__ in sys.orig_argv and len(sys.argv) > 1:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))

from .arguments import add_muon_dist_args
from .config import MuonDistConfig
from .host import register
from .optimizer import MuonDistOptimizer, get_muon_dist_optimizer

register()

__all__ = ["MuonDistConfig", "MuonDistOptimizer", "add_muon_dist_args", "get_muon_dist_optimizer"]
