"""The factor between an orthogonalised matrix and its update, from the matrix's whole, unpadded shape."""

from __future__ import annotations

import math

NAMES = ("match_rms_adamw", "original", "spectral", "none")


def update_scale(adjust_lr_fn: str | None, rows: int, cols: int) -> float:
    """What the learning rate of a rows × cols matrix (outputs × inputs) is multiplied by.

    - "match_rms_adamw": 0.2·√max(rows, cols): the update's RMS is AdamW's (Moonlight, arXiv 2502.16982).
    - "original", or None as in torch: √max(1, rows/cols) (Jordan et al., 2024).
    - "spectral": √(rows/cols) (Bernstein & Newhouse, arXiv 2409.20325).
    - "none": 1.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / cols))
    if adjust_lr_fn == "spectral":
        return math.sqrt(rows / cols)
    if adjust_lr_fn == "none":
        return 1.0
    raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}: choose one of {', '.join(NAMES)}")
