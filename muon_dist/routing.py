"""Which parameter Muon takes, which AdamW takes, and the reason.

Nothing falls to AdamW silently: every parameter gets a `Route` that says why, and what can't be told apart raises.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .polar.matrix_view import MatrixView, matrices_of

ALGORITHMS = ("muon", "adamw")

# Names of modules and parameters that map from symbols or positions, or to symbols. Compared with the last two parts of a
# dotted name; a head counts only outside numbered layers, since attention has an "output" too.
EMBEDDING_NAME = re.compile(
    r"(^|_)(emb|embed|embedder|embeddings?)(_|$)|^(wte|wpe|shared|relative_(attention|position)_bias(_table)?)$|_token$"
)
HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "output_layer", "output", "unembed", "unembedding", "embed_out", "classifier", "score"),
        "prediction_head",
    }
)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one parameter goes, and why.

    Attributes:
        name: its name, or "" where none was given.
        algorithm: "muon", "adamw", or "frozen" (requires no gradient now, so nothing touches it).
        reason: in words.
        view: how Muon reads it as matrices; None for the others.
    """

    name: str
    algorithm: str
    reason: str
    view: MatrixView | None = None


def route_parameter(
    name: str,
    parameter: Tensor,
    *,
    algorithm: str | None = None,
    module: nn.Module | None = None,
    shape: Sequence[int] | None = None,
) -> Route:
    """The route of one parameter from what is known of it: an explicit algorithm, its module's type, its name, its shape.

    `shape` is the whole parameter's where the tensor is a fragment of it.

    Raises:
        ValueError: a parameter of two or three dimensions of which nothing but the shape is known.
    """
    shape = tuple(parameter.shape if shape is None else shape)
    ndim = len(shape)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    conv = isinstance(module, nn.modules.conv._ConvNd) or ndim > 3 or (ndim == 3 and "conv" in name.lower())
    view = MatrixView(kind="conv" if conv and ndim > 2 else "matrix")
    if algorithm is not None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm={algorithm!r} for {name or 'a parameter'}: choose 'muon' or 'adamw'")
        if algorithm == "muon" and ndim < 2:
            raise ValueError(
                f"{name or 'a parameter'} of shape {shape} can't be trained by Muon, which needs a matrix; use algorithm='adamw'"
            )
        return Route(name=name, algorithm=algorithm, reason="asked for", view=view if algorithm == "muon" else None)

    def adamw(reason: str) -> Route:
        return Route(name=name, algorithm="adamw", reason=reason)

    if ndim < 2:
        return adamw(f"{ndim}-D: not a matrix")
    if transposed:
        return adamw("transposed convolution: stored (in, out, *k), which is not read as a matrix")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return adamw("embedding: rows are symbols, not outputs of a linear map")
    if module is None and not name and ndim <= 3:
        raise ValueError(
            f"a parameter of shape {shape} has no name, so an embedding can't be told from a weight matrix. Pass "
            'model.named_parameters(), build_param_groups(model), or groups with {"algorithm": "muon"} or {"algorithm": "adamw"}'
        )
    parts = name.lower().split(".")
    embedding = [part for part in parts[-2:] if EMBEDDING_NAME.search(part)]
    head = HEAD_NAMES.intersection(parts[-2:])
    if embedding:
        return adamw(f"embedding, by its name ({embedding[0]})")
    if head and not any(part.isdigit() for part in parts):
        return adamw(f"output head, by its name ({min(head)})")
    if conv:
        return Route(name=name, algorithm="muon", reason="convolution kernel, read as (out, in·k)", view=view)
    if ndim == 3:
        return Route(name=name, algorithm="muon", reason=f"stack of {shape[0]} matrices", view=view)
    return Route(name=name, algorithm="muon", reason="weight matrix", view=view)


def build_param_groups(
    model: nn.Module,
    *,
    muon: Sequence[str] = (),
    adamw: Sequence[str] = (),
    split: Mapping[str, Sequence[int] | int] | None = None,
    transpose: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `MuonDist`, in which every parameter of `model` has a route and a reason.

    A pattern is a shell glob over a parameter's full name ("blocks.*.attn.qkv.weight"); without `*`, `?` or `[` it
    matches every name that contains it ("qkv").

    Args:
        model: its trainable parameters are grouped; frozen ones are left out.
        muon, adamw: patterns of parameters that go there whatever the rules say.
        split: pattern -> sizes along the output dimension, one matrix each: (q, k, v) rows of a fused QKV of equal or
            grouped-query widths, (gate, up) rows, or one integer, the rows of every head.
        transpose: patterns of weights stored (in, out), such as GPT-2's Conv1D.
        shapes: name -> whole shape of parameters whose tensors are pieces, as under DeepSpeed's `zero.Init` or its AutoTP.
        **options: put into every group, such as lr=... or weight_decay=....

    Returns:
        Groups with "params" (names and parameters), "algorithm", "reasons" (one per parameter), and for Muon "kind", "split"
        and "transpose", which say how its parameters are read as matrices.

    Raises:
        ValueError: a pattern that matches nothing, two patterns of one kind or of muon and adamw that match the same parameter,
            a split or transpose of a parameter that Muon doesn't take, or FSDP1's flattened parameters.
    """
    refuse_fsdp1(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    whole_shapes = {name: tuple(p.shape) for name, p in named} | {name: tuple(shape) for name, shape in (shapes or {}).items()}
    names = [name for name, _ in named]
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for embedding in model.modules():  # a tied weight is an embedding, whichever module comes last
        if isinstance(embedding, (nn.Embedding, nn.EmbeddingBag)):
            owners[id(embedding.weight)] = embedding
    algorithms = _match({**{("muon", p): p for p in muon}, **{("adamw", p): p for p in adamw}}, names, "muon/adamw")
    splits = _match({("split", p): p for p in split or {}}, names, "split")
    transposes = _match({("transpose", p): p for p in transpose}, names, "transpose")
    head = _output_head(model)

    groups: dict[tuple[str, MatrixView | None], dict[str, Any]] = {}
    for name, p in named:
        module: nn.Module | None = owners.get(id(p))
        asked = algorithms.get(name)
        if asked is not None:
            route = route_parameter(name, p, algorithm=asked[0], module=module, shape=whole_shapes[name])
            route = Route(name=name, algorithm=route.algorithm, reason=f"asked for by {asked[0]}={asked[1]!r}", view=route.view)
        else:
            route = route_parameter(name, p, module=module, shape=whole_shapes[name])
            if route.view is not None and head is not None and module is head:
                reason = f"output head: the last linear layer, its {head.out_features} outputs are the symbols of an embedding"
                route = Route(name=name, algorithm="adamw", reason=reason)
        if name in splits or name in transposes:
            if route.view is None:
                kind = splits.get(name) or transposes[name]
                raise ValueError(f"{kind[0]} pattern {kind[1]!r} matches {name}, which goes to {route.algorithm} ({route.reason})")
            sizes = split[splits[name][1]] if split is not None and name in splits else None
            sizes = sizes if sizes is None or isinstance(sizes, int) else tuple(sizes)
            view = MatrixView(kind=route.view.kind, split=sizes, transpose=name in transposes)
            route = Route(name=name, algorithm=route.algorithm, reason=route.reason, view=view)
        if route.view is not None:
            matrices_of(whole_shapes[name], route.view, name)  # sizes that don't add up are said here
        read_as = route.view
        structure = {} if read_as is None else {"kind": read_as.kind, "split": read_as.split, "transpose": read_as.transpose}
        empty = {"params": [], "algorithm": route.algorithm, "reasons": [], **structure, **options}
        group = groups.setdefault((route.algorithm, read_as), empty)
        group["params"].append((name, p))
        group["reasons"].append(route.reason)
    return list(groups.values())


def _output_head(model: nn.Module) -> nn.Linear | None:
    """The last linear layer, if it maps to the symbols of the largest embedding. Hidden layers may have as many outputs by chance."""
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))), default=None)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears and linears[-1].out_features == vocabulary else None


def _match(patterns: Mapping[tuple[str, str], str], names: Sequence[str], what: str) -> dict[str, tuple[str, str]]:
    """Which (kind, pattern) each name is matched by; every pattern matches something and no name matches two."""
    matched: dict[str, tuple[str, str]] = {}
    for key, pattern in patterns.items():
        if not isinstance(pattern, str):
            raise ValueError(f"{what} patterns are strings, got {pattern!r}")
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise ValueError(f"{key[0]} pattern {pattern!r} matches no trainable parameter. Names look like {', '.join(names[:4])}")
        for name in hits:
            if name in matched:
                raise ValueError(
                    f"{name} is matched by {matched[name][0]}={matched[name][1]!r} and by {key[0]}={pattern!r}: make the patterns disjoint"
                )
            matched[name] = key
    return matched


def matches(pattern: str, name: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise for FSDP1, whose flat parameters and unsharded-on-demand views don't say which matrix a rank's piece is of."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name or '(root)'} is wrapped by FullyShardedDataParallel (FSDP1), which flattens parameters and hides which "
                "matrix a shard belongs to. Use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def refuse_flattened(names_and_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise for parameters that FSDP1 has flattened, with or without use_orig_params."""
    from torch.distributed.fsdp import FlatParameter

    for name, p in names_and_parameters:
        if isinstance(p, FlatParameter) or getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"{name or 'a parameter'} belongs to FSDP1 (FullyShardedDataParallel), which flattens parameters and hides which matrix "
                "a shard belongs to. Use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
