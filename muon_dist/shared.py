"""Numbers on their way to all ranks and to the host, behind the steps: nobody waits for them before they are needed."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .domain import Ranks


class Shared:
    """Numbers that are summed up over ranks: each has zeros where another has something to say. Collective."""

    def __init__(self, numbers: Tensor, ranks: Ranks) -> None:
        self._work, self._event = None, None
        if ranks.process_group is not None:
            numbers = numbers.to(ranks.device, non_blocking=True)
            self._work = dist.all_reduce(numbers, group=ranks.process_group, async_op=True)
        self._numbers = numbers
        if numbers.device.type != "cpu":
            if self._work is not None:
                self._work.wait()  # on the device's stream; the host goes on
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.Event(numbers.device)
            self._event.record()

    def wait(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        values: np.ndarray = self._numbers.numpy()
        values[np.isnan(values)] = math.nan  # with one sign and payload, so that all ranks have the same bits
        return values
