"""Text and tokens: memory-mapped, cut into windows, visited in an order that depends on the seed and on nothing else.

Window `s` of a run is the same at any number of ranks, so the position in the data is one number: how many windows have been taken.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from options import Options
from torch import Tensor

from muon_dist.example.small_gpt import read_text

BLOCKS, BLOCK = 64, 256  # tokens that a fingerprint reads


class Windows:
    """A file of tokens as windows of `context + 1`, which overlap by one token: each is predicted once.

    Args:
        path: None: the Python standard library's sources, as bytes.
        dtype: "bytes", or what a file of tokens holds; a .npy file says it by itself.
        context: tokens that the model sees.
        vocabulary: tokens are below it.
        holdout: share of the windows, at the end of the file, that `evaluation` takes.
        seed: of the order.

    Raises:
        ValueError: a file that can't be read, that is too short, or with tokens that the vocabulary doesn't have.
    """

    def __init__(self, path: str | None, *, dtype: str, context: int, vocabulary: int, holdout: float, seed: int) -> None:
        self._path, self._context, self._vocabulary, self._seed = path, context, vocabulary, seed
        self.tokens = _map(path, dtype)
        self.count = (len(self.tokens) - 1) // context
        self.held_out = int(np.ceil(self.count * holdout))
        if self.count - self.held_out < 1:
            raise ValueError(
                f"--data {path or '(the standard library)'} has {len(self.tokens):,} tokens: --context {context} cuts them into "
                f"{self.count} window(s), of which --holdout keeps {self.held_out}, and none is left to train on"
            )
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @classmethod
    def of(cls, options: Options) -> Windows:
        """What the flags name."""
        return cls(
            options.data,
            dtype=options.data_dtype,
            context=options.context,
            vocabulary=options.vocabulary,
            holdout=options.holdout,
            seed=options.seed,
        )

    @property
    def training(self) -> int:
        """How many windows one epoch has."""
        return self.count - self.held_out

    def fingerprint(self) -> str:
        """Of the number of tokens, their dtype, and blocks from all over the file: other data has another one, all but surely."""
        digest = hashlib.sha256(f"{len(self.tokens)} {self.tokens.dtype}".encode())
        for start in np.linspace(0, max(0, len(self.tokens) - BLOCK), BLOCKS).astype(int):
            digest.update(np.ascontiguousarray(self.tokens[start : start + BLOCK]).tobytes())
        return digest.hexdigest()[:16]

    def training_windows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows `first` … `first + count − 1` of the run: tokens and targets, both (count, context) int64."""
        return self._read([self._shuffled(s) for s in range(first, first + count)])

    def evaluation_windows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The held-out windows, from the beginning again where there are too few."""
        return self._read([self.training + s % self.held_out for s in range(first, first + count)])

    def _shuffled(self, s: int) -> int:
        epoch, place = divmod(s, self.training)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.training, generator=generator))
        return int(self._order[1][place])

    def _read(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.stack([self.tokens[i * self._context : (i + 1) * self._context + 1] for i in indices]).astype(np.int64)
        if rows.min() < 0 or rows.max() >= self._vocabulary:
            wrong = int(rows.max() if rows.max() >= self._vocabulary else rows.min())
            raise ValueError(f"--data {self._path} has token {wrong}, and --vocabulary is {self._vocabulary}")
        windows = torch.from_numpy(rows)
        return windows[:, :-1], windows[:, 1:]


def _map(path: str | None, dtype: str) -> np.ndarray:
    if path is None:
        return read_text(None).numpy()
    try:
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r")
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"it holds {tokens.dtype} of shape {tokens.shape}; one dimension of integers is needed")
            return tokens
        kind = np.dtype({"bytes": np.uint8}.get(dtype, dtype))
        size = Path(path).stat().st_size
        if size == 0 or size % kind.itemsize:
            raise ValueError(f"its {size} bytes are no whole number of {kind} tokens" if size else "it is empty")
        return np.memmap(path, dtype=kind, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} can't be read: {error}") from error
