"""What a training run needs around its optimizer: which rank this is, who failed, what was logged, checkpoints that are whole.

Knows ranks and files, neither models nor Muon. `launch/train_gpt.py` shows all of it in use.
"""

from .bootstrap import Ranks, end_process_group, find_ranks, start_process_group
from .checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from .watchdog import Watchdog

__all__ = [
    "Checkpoint",
    "Ranks",
    "Watchdog",
    "end_process_group",
    "find_ranks",
    "latest_checkpoint",
    "save_checkpoint",
    "start_process_group",
]
