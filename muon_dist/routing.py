"""Which parameter Muon takes, which AdamW takes, and the reason.

Nothing falls to AdamW silently: every parameter gets a `Route` that says why, and what can't be told apart raises.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import roles
from .polar.matrix_view import MatrixView, matrices_of

ALGORITHMS = ("muon", "adamw")


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
    head: str | None = None,
    shape: Sequence[int] | None = None,
) -> Route:
    """The route of one parameter from what is known of it: an explicit algorithm, its module, its name, its shape.

    Args:
        module: the one it belongs to, behind wrappers, adapters and parametrisations; None where only the name is known.
        head: why that module is an output head, where it is one.
        shape: the whole parameter's, where the tensor is a fragment of it.

    Raises:
        ValueError: a parameter of two or three dimensions of which nothing but the shape is known.
    """
    shape = tuple(parameter.shape if shape is None else shape)
    ndim = len(shape)
    conv = isinstance(module, roles.CONVOLUTIONS) or ndim > 3 or (ndim == 3 and "conv" in name.lower())
    rows = None if module is None else roles.matrices_of_convolution(module)
    view = MatrixView(kind="conv" if conv and ndim > 2 else "matrix", split=(rows or None) if ndim > 2 else None)
    if algorithm is not None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm={algorithm!r} for {name or 'a parameter'}: choose 'muon' or 'adamw'")
        if algorithm == "muon" and ndim < 2:
            raise ValueError(
                f"{name or 'a parameter'} of shape {shape} can't be trained by Muon, which needs a matrix; use algorithm='adamw'"
            )
        return Route(name=name, algorithm=algorithm, reason="asked for", view=view if algorithm == "muon" else None)

    def adamw(reason: str) -> Route:
        return Route(name=name, algorithm="adamw", reason=f"{of}{reason}")

    parts, lora = roles.plain_parts(name), roles.adapter(name)
    of = "" if lora is None else f"{lora} of an adapter: "
    if ndim < 2:
        return adamw(f"{ndim}-D: not a matrix")
    if module is None and not name and ndim <= 3:
        raise ValueError(
            f"a parameter of shape {shape} has no name, so an embedding can't be told from a weight matrix. Pass "
            'model.named_parameters(), build_param_groups(model), or groups with {"algorithm": "muon"} or {"algorithm": "adamw"}'
        )
    if isinstance(module, roles.EMBEDDINGS):
        return adamw("embedding: rows are symbols, not outputs of a linear map")
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return adamw("transposed convolution: stored (in, out, *k), which is not read as a matrix")
    if roles.is_map(module) and roles.is_weight_of_map(parts):
        if head is not None:
            return adamw(head)
        if rows == 0 and ndim > 2:
            return adamw(roles.DEPTHWISE)
        if parts[-2:-1] and parts[-2].endswith("bias"):
            return adamw(f"table of biases, by its name ({parts[-2]})")
    elif name and (reason := roles.role_by_name(name, shape)) is not None:
        return adamw(reason)
    if conv:
        several = f"{shape[0] // rows} groups of a convolution, each" if rows else "convolution kernel,"
        return Route(name=name, algorithm="muon", reason=f"{of}{several} read as (out, in·k)", view=view)
    if ndim == 3:
        return Route(name=name, algorithm="muon", reason=f"{of}stack of {shape[0]} matrices", view=view)
    return Route(name=name, algorithm="muon", reason=f"{of}weight matrix", view=view)


def build_param_groups(
    model: nn.Module,
    *,
    muon: Sequence[str] | str = (),
    adamw: Sequence[str] | str = (),
    split: Mapping[str, Sequence[int] | int] | None = None,
    transpose: Sequence[str] | str = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `MuonDist`, in which every parameter of `model` has a route and a reason.

    A pattern is a shell glob over a parameter's full name ("blocks.*.attn.qkv.weight"); without `*`, `?` or `[` it
    matches every name that contains it ("qkv").

    Args:
        model: its trainable parameters are grouped; frozen ones are left out.
        muon, adamw: patterns of parameters that go there whatever the rules say; a string is one pattern.
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
    modules = roles.modules_by_path(model)
    # a tied weight is an embedding, whichever module comes last
    embeddings = {id(m._parameters.get("weight")): m for m in model.modules() if isinstance(m, roles.EMBEDDINGS)}
    heads = roles.output_heads(model, modules)
    asked_for = [(kind, p) for kind, given in (("muon", muon), ("adamw", adamw)) for p in as_patterns(given, kind)]
    if split is not None and not isinstance(split, Mapping):
        raise ValueError(f"split maps patterns to sizes, such as {{{str(split)!r}: [q, k, v]}}, got {split!r}")
    algorithms = _match(asked_for, names)
    splits = _match([("split", p) for p in as_patterns(split or (), "split")], names)
    transposes = _match([("transpose", p) for p in as_patterns(transpose, "transpose")], names)

    groups: dict[tuple[str, MatrixView | None], dict[str, Any]] = {}
    for name, p in named:
        module = embeddings.get(id(p)) or modules.get(".".join(roles.plain_parts(name)[:-1])) or model
        asked = algorithms.get(name)
        known: dict[str, Any] = {"module": module, "head": heads.get(id(module)), "shape": whole_shapes[name]}
        if asked is not None:
            route = route_parameter(name, p, algorithm=asked[0], **known)
            route = Route(name=name, algorithm=route.algorithm, reason=f"asked for by {asked[0]}={asked[1]!r}", view=route.view)
        else:
            route = route_parameter(name, p, **known)
        if name in splits or name in transposes:
            if route.view is None:
                kind = splits.get(name) or transposes[name]
                raise ValueError(f"{kind[0]} pattern {kind[1]!r} matches {name}, which goes to {route.algorithm} ({route.reason})")
            sizes = split[splits[name][1]] if split is not None and name in splits else None
            sizes = sizes if sizes is None or isinstance(sizes, int) else tuple(sizes)
            view = MatrixView(kind=route.view.kind, split=route.view.split if sizes is None else sizes, transpose=name in transposes)
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


def as_patterns(given: Any, what: str) -> tuple[str, ...]:
    """Patterns as a tuple; one string is one pattern.

    Raises:
        ValueError: anything but strings.
    """
    patterns = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{what} patterns are strings, got {pattern!r}")
    return patterns


def _match(patterns: Sequence[tuple[str, str]], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Which (kind, pattern) each name is matched by; every pattern matches something and no name matches two."""
    matched: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys(patterns):
        pattern = key[1]
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
