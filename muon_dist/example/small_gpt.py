"""The small GPT that the launch scripts and the benchmarks train, and its text: bytes, so that no tokenizer is needed."""

from __future__ import annotations

import math
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT_LIMIT = 20_000_000  # bytes of the standard library's sources that are read


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape  # the number of heads is read off, since tensor parallelism leaves fewer of them
        q, k, v = (y.view(b, t, -1, self.head_size).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))  # (b, heads, t, head size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.proj(y.transpose(1, 2).reshape(b, t, -1))
        return result


class MLP(nn.Module):
    """Four times as wide inside, or 8/3 with a gate, as in Llama."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        inner = 8 * width // 3 if gated else 4 * width
        self.gate = nn.Linear(width, inner, bias=False) if gated else None
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        result: Tensor = self.down(inner)
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.RMSNorm(width), MLP(width, gated)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class GPT(nn.Module):
    """The model of configs/models/gpt-5m.json."""

    def __init__(self, *, layers: int, width: int, heads: int, context: int, vocabulary: int = 256, gated: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, gated) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                out = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if out else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def read_text(path: str | None) -> Tensor:
    """A file's bytes, or those of the standard library's modules, in alphabetical order."""
    if path is not None:
        data = Path(path).read_bytes()
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
        files: list[Path] = []
        for folder, inside, names in os.walk(root):
            inside[:] = [name for name in inside if name not in skip]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        data = b"".join(f.read_bytes() for f in sorted(files))[:TEXT_LIMIT]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def windows(text: Tensor, count: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` random windows and the bytes that follow each position: two (count, context) tensors."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (count,), generator=generator).tolist()
    rows = torch.stack([text[s : s + context + 1] for s in starts]).long()
    return rows[:, :-1], rows[:, 1:]
