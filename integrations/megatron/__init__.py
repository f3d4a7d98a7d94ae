"""MuonDist in Megatron: `python -m muon_dist.integrations.megatron pretrain_gpt.py --optimizer muon_dist …` runs an unchanged script;
importing this in the script does the same.

README.md beside this file has the support table and what each flag does.
"""

import os
import sys

if sys.argv[0] == "-m" and len(sys.argv) > 1:  # `python -m` imports this before __main__ runs: the script's own megatron wins
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))

from .arguments import add_muon_dist_args
from .host import register
from .optimizer import MuonDistOptimizer, get_muon_dist_optimizer
from .settings import MuonDistConfig

register()

__all__ = ["MuonDistConfig", "MuonDistOptimizer", "add_muon_dist_args", "get_muon_dist_optimizer"]
