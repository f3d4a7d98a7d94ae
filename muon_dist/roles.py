"""What a parameter is for: a linear map, which Muon takes, or one of the many things that are stored as matrices and are none.

A module tells by its type and its place in the model; a name alone tells less. Both look through wrappers and adapters. The names are
those of the models in transformers and timm, and of Megatron's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = nn.modules.conv._ConvNd
_MAPS = (nn.Linear, nn.Bilinear, CONVOLUTIONS, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)

# ------------------------------------------------------------------------------------------------------- names behind wrappers

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})  # torch.compile, activation checkpointing, FSDP
_PEFT = frozenset({"base_layer", "original_module", "token_adapter"})
_OF_THE_LAYER_BEFORE = re.compile(r"^lora_[AB]$|^lora_embedding_[AB]$|^trainable_tokens_delta$")  # PEFT's, with the adapter's name after it


def plain_parts(name: str) -> list[str]:
    """The parts of a parameter's name as they would be without wrappers, adapters and parametrisations."""
    parts, result, k = name.split("."), list[str](), 0
    while k < len(parts):
        part = parts[k]
        if part == "modules_to_save":  # PEFT: the adapter's name follows
            k += 1
        elif part == "parametrizations" and k + 1 < len(parts):
            return [*result, "gain" if parts[-1] == "original0" else parts[k + 1]]  # weight_norm's size and direction
        elif _OF_THE_LAYER_BEFORE.match(part):
            return [*result, "weight"]
        elif part not in WRAPPERS | _PEFT:
            result.append(part)
        k += 1
    if result and result[-1] in ("weight_v", "weight_orig"):  # the older weight_norm and spectral_norm
        result[-1] = "weight"
    return result


def adapter(name: str) -> str | None:
    """What PEFT's adapters are called in a parameter's name; None where there is none."""
    return next((part for part in name.split(".") if _OF_THE_LAYER_BEFORE.match(part)), None)


# ----------------------------------------------------------------------------------------------------------------- by name

# Parameters of no linear layer, by the last part of their names
_GAIN = re.compile(
    r"(^|_)bias(es)?(_[a-z0-9]|_table)?$|^b\d$"  # also stacked over experts: (E, n)
    r"|^time_(mix|decay|first|faaaa|maa)(_(?!\w*w\d)\w+)?$|^(r_k|a_logs?|d|ds|dt_bias)$"  # RWKV, Mamba
    r"|(^|_)(gamma|beta|scales?|gains?|alpha|weight_g|temperature)(_?\d+)?$"
)
_POSITION = re.compile(r"(^|_)(rel_|relative_)?pos(ition(al)?s?)?(_(bias|enc(oding)?|emb(ed(ding)?s?)?|table|[hwdtxy]))*(_|$)|^a?pe$|_ape$")
_SYMBOL = re.compile(r"(^|_)(tokens?|latents?|probe|prompts?|registers?|codebook|codevectors|prototypes|pointer)(_|\d|$)")
_QUERY = re.compile(r"^((learned|latent|object|pooling)_)*quer(y|ies)(_(tokens|feat|features|embed))?$")
_EMBEDDED = re.compile(r"(^|_)(emb|embed|embeddings?)(_|$)")
_ROTATION = re.compile(r"^(oft_r|boft_r|hra_u)$")  # PEFT's orthogonal adapters

# Modules that hold rows of symbols or positions, by the last part of their names; also lists of them
_EMBEDDING = re.compile(
    r"(^|_)(emb|embs|embed|embeds|embedder|embeddings?)(_(in|tokens?|positions?|table|tokens_per_layer|char|global|\w+_tokens))?(_?\d+)?$"
    r"|^(wte|wpe|shared|pe_k|reference_points)$|(^|_)(tokens|codebook|bias_values)$|_token$|(^|_)bias(_table)?$"
    r"|^quer(y|ies)_feat(ures)?$|(input|position)_embeds_layers?$"
)
_LISTED = re.compile(
    r"embeddings$|embeds$|embs$|tokens$|^(wte|wpe|shared)$|embeds_layers$|_codebooks?$|^(tok|token|word|value|codebook)_emb(ed)?s?$"
)

# Output heads: wherever they are; those that are one only outside numbered layers; and what their last map is called inside them
_HEAD = re.compile(
    r"^(\w+_)?lm_heads?$|^shared_head$|^unembed(ding)?$|^embed_out$|^(qa|answer)_outputs$|(^|_)class_embed$"
    r"|^(prediction|cls|codec|ctc|token|vocab|codebooks|mlm|nsp)_head$|^logits(_(proj|dense|layer|head))?$"
)
_OUTSIDE = re.compile(
    r"^(heads?|output|output_layer|output_projection|scores?|classifiers?|seq_relationship|ctc_proj|classification_head)$"
    r"|_(classifier|heads?)$"
)
_LAST_MAP = re.compile(
    r"^(head|decoder|out_proj|out|linear_out|fc_out|projection|linear|fc|fc2|conv|convolution|predictions?|seq_relationship|output)$"
)


def role_by_name(name: str, shape: Sequence[int]) -> str | None:
    """Why a parameter of two or more dimensions is no linear map, by its name and shape alone; None where nothing says so."""
    parts = [part.lower() for part in plain_parts(name)]
    leaf = parts[-1]
    while leaf.isdigit() and len(parts) > 1:  # of a list of parameters
        parts, leaf = parts[:-1], parts[-2]
    if leaf == "gain" or (is_row(shape) and not (leaf == "weight" and (len(shape) == 2 or shape[0] * shape[1] > 1))):
        return "one row: a gain, a bias or a scale"
    if leaf == "weight" and len(shape) > 2 and shape[1] == 1 < shape[0]:
        return DEPTHWISE
    if len(parts) > 1 and _ROTATION.match(parts[-2]):
        return f"parameters of a rotation, by their name ({parts[-2]})"
    if leaf != "weight":
        found = _bare(parts, shape)
        if found:
            return found
    path = parts[:-1]
    above = next((part for part in reversed(path) if not part.isdigit()), "")
    listed = bool(path) and path[-1] != above
    if len(shape) == 2 and _EMBEDDING.search(above) and "patch" not in above and (not listed or _LISTED.search(above)):
        return f"embedding, by its name ({above})"
    head = head_by_name(parts, shape)
    return None if head is None else f"output head, by its name ({head})"


def says_nothing(name: str, shape: Sequence[int]) -> bool:
    """Whether a name leaves open that a matrix is an embedding: only numbers before "weight", and far more rows than columns."""
    *path, leaf = plain_parts(name)
    return leaf == "weight" and len(shape) == 2 and shape[0] >= 2 * shape[1] and not any(len(p) > 1 and not p.isdigit() for p in path)


DEPTHWISE = "depthwise convolution: every channel has a kernel of its own, a vector"


def is_row(shape: Sequence[int]) -> bool:
    """Whether a tensor has at most one dimension in which it extends."""
    return sum(size != 1 for size in shape) <= 1


def _bare(parts: Sequence[str], shape: Sequence[int]) -> str | None:
    """Of a parameter that is not called weight."""
    leaf, numbered = parts[-1], any(part.isdigit() for part in parts[:-1])
    for pattern, what in (
        (_GAIN, "bias, gain or decay"),
        (_POSITION, "positions"),
        (_SYMBOL, "learned tokens"),
        (_EMBEDDED, "embedding"),
    ):
        if pattern.search(leaf) and (pattern is _GAIN or "proj" not in leaf):
            return f"{what}, by its name ({leaf})"
    if _QUERY.match(leaf) and (not numbered or "_" in leaf):
        return f"learned queries, by its name ({leaf})"
    if len(shape) == 3 and re.match(r"^([qkvor]|r_kernel)$", leaf):  # XLNet's and Funnel's (in, heads, out of a head)
        return "a map to heads, stored in three dimensions that are not read as a matrix"
    if len(shape) >= 3 and shape[0] == 1 and not any("expert" in part for part in parts):
        return "learned tokens: a stack of one"
    return None


def head_by_name(parts: Sequence[str], shape: Sequence[int]) -> str | None:
    """The part of a name that says output head; None where none does. Of convolutions only those of 1 × 1 can be heads."""
    if parts[-1] != "weight" or any(size != 1 for size in shape[2:]):
        return None
    path, square = parts[:-1], shape[0] == shape[1]
    words = [k for k, part in enumerate(path) if not part.isdigit()]
    for at in words[-2:]:
        part, after = path[at], [path[k] for k in words if k > at]
        anywhere = bool(_HEAD.search(part))
        outside = bool(_OUTSIDE.search(part)) and not any(before.isdigit() for before in path[:at])
        if not (anywhere or outside) or (not anywhere and square and re.search(r"_(classifier|heads?)$", part)):
            continue
        if not after:
            if part != "output" or len(words) <= 2:  # attention has an "output", too
                return part
        elif _LAST_MAP.match(after[0]) or _HEAD.search(after[0]) or (after[0] == "dense" and part.endswith("classifier") and not square):
            return part
    return "predictions.decoder" if path[-1:] == ["decoder"] and "predictions" in path else None


# --------------------------------------------------------------------------------------------------------------- by module

_NUMBERED_LAYER = re.compile(r"(^|\.)\d+\.[^\d]")  # in a path, something inside it


def is_map(module: nn.Module | None) -> bool:
    """Whether a module applies its weight as a linear map."""
    return isinstance(module, _MAPS) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))  # transformers' own


def is_weight_of_map(parts: Sequence[str]) -> bool:
    leaf = parts[-1]
    return leaf == "weight" or (leaf.startswith(("weight_", "in_proj_weight")) or leaf.endswith("_proj_weight"))


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold weights by their paths without wrappers: behind one path a linear map or embedding, where there is one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        path = ".".join(plain_parts(f"{name}.weight" if name else "weight")[:-1])
        if path not in found or (not _is_known(found[path]) and _is_known(module)):
            found[path] = module
    return found


def _is_known(module: nn.Module) -> bool:
    return is_map(module) or isinstance(module, EMBEDDINGS)


def output_heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """id of a module -> why its weight is an output head: the model says so, its name, or its place and size.

    `modules` are the model's, by path (`modules_by_path`).
    """
    heads: dict[int, str] = {}
    for module in model.modules():
        says = getattr(module, "get_output_embeddings", None)  # transformers
        try:
            head = says() if callable(says) else None
        except (AttributeError, NotImplementedError):
            head = None
        if isinstance(head, nn.Module):
            heads[id(head)] = "output head, as the model says (get_output_embeddings)"
    paths = {path: m for path, m in modules.items() if isinstance(m, (nn.Linear, CONVOLUTIONS))}
    for path, module in paths.items():
        parts = [*filter(None, path.lower().split(".")), "weight"]
        if len(parts) > 1 and not any("attn" in part or "attention" in part for part in parts[:-2]):
            head = head_by_name(parts, _declared(module))
            if head is not None:
                heads.setdefault(id(module), f"output head, by its name ({head})")
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential):  # of a head of several layers, the last is it
            inside = [m for m in sequence.modules() if isinstance(m, (nn.Linear, CONVOLUTIONS))]
            for module in inside[:-1]:
                if heads.get(id(module), "").startswith("output head, by its name"):
                    del heads[id(module)]
    symbols = [m.num_embeddings for path, m in modules.items() if isinstance(m, EMBEDDINGS) and not _POSITION.search(path.split(".")[-1])]
    linear = [(path, m) for path, m in paths.items() if isinstance(m, nn.Linear)]
    if linear and symbols and linear[-1][1].out_features == max(symbols) and not _NUMBERED_LAYER.search(linear[-1][0]):
        reason = f"output head: the last linear layer, its {max(symbols)} outputs are the symbols of an embedding"
        heads.setdefault(id(linear[-1][1]), reason)
    return heads


def _declared(module: nn.Module) -> tuple[int, ...]:
    """The shape of its weight, which may be stored in another form (ZeRO's shards), or be computed when it is read (spectral_norm)."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    assert isinstance(module, CONVOLUTIONS)
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def matrices_of_convolution(module: nn.Module) -> int | None:
    """Rows of every matrix of a grouped convolution, whose groups have inputs of their own; None where there is one group.

    0 where the matrices are single rows.
    """
    if not isinstance(module, CONVOLUTIONS) or module.groups == 1:
        return None
    rows = module.out_channels // module.groups
    columns = module.in_channels // module.groups * math.prod(module.kernel_size)
    return 0 if rows == 1 or columns == 1 or module.in_channels == module.groups else rows
