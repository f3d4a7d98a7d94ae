"""MuonDist in DeepSpeed: import this before `deepspeed.initialize`, then say `"optimizer": {"type": "MuonDist"}` in its config.

README.md beside this file has the support table and what each setting does.
"""

from .engine import register
from .optimizer import DeepSpeedMuonDist as MuonDist

register()

__all__ = ["MuonDist"]
