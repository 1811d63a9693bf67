"""What tells a base's weights from others, in a few numbers that a configuration keeps.

Each kind of weight is one number: the product of all its values with a fixed pattern of signs, in units of their norm.
Rounding of another type moves it a little, another base far more, and whatever is trained, merged or edited by more
than the rounding of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from retro.retrofit.anatomy import probe_tokens, run_probe
from retro.retrofit.bases import is_quantized

SAME, ROUNDED = 1e-9, 1e-2  # the largest difference of the same weights, and after rounding to another type
_PERIOD, _AT_ONCE = 8191, 1 << 20
KINDS = ("embeddings", "vectors", "matrices", "packed")


def fingerprint(base: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """The numbers of a base's weights, adapters left out; none where weights are not in memory (the meta device).

    Matrices in few bits, which change as they are used, are known by the logits that they give ("packed"), unless
    adapters change these.

    weights: in the place of the base's own, by the names that `state_dict` gives.
    """
    heads = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = {module: f"{name}." for name, module in base.named_modules()}
    names = [names[module] for module in heads if module in names]
    tied = len(names) == 2 and heads[0].weight is getattr(heads[1], "weight", None)
    adapters, packed = adapter_prefixes(base), is_quantized(base.config)
    own = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    groups: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for name, weight in (base.state_dict() if weights is None else weights).items():
        if not name.startswith(adapters) and weight.is_floating_point() and not (tied and name.startswith(names[1])):
            kind = "packed" if packed and name not in own else "vectors" if weight.ndim < 2 else "matrices"
            groups["embeddings" if name.startswith(tuple(names)) else kind].append(weight)
    if any(weight.is_meta for group in groups.values() for weight in group):
        return {}
    if packed:
        groups |= {"matrices": [], "packed": [] if adapters else [run_probe(base, probe_tokens(base))]}
    return {kind: _number(group) for kind, group in groups.items() if group}


def differing_kind(one: Mapping[str, float], other: Mapping[str, float], exact: bool) -> str | None:
    """The kind of weights in which two fingerprints differ; None if they are of one base.

    exact: Of the same type; otherwise rounding is allowed for, and what one of both has in few bits is not compared.
    """
    for kind in KINDS:
        near = SAME if exact and kind != "packed" else ROUNDED
        if (near == SAME or (kind in one and kind in other)) and not abs(one.get(kind, 0) - other.get(kind, 0)) <= near:
            return kind
    return None


def adapter_prefixes(module: nn.Module) -> tuple[str, ...]:
    """How the names of PEFT's adapter weights begin."""
    found = [
        f"{name}.{part}."
        for name, layer in module.named_modules()
        for part in getattr(layer, "adapter_layer_names", ())
    ]
    return tuple(found)


def _number(weights: Iterable[Shaped[Tensor, "..."]]) -> float:
    signs = torch.randint(0, 2, (_PERIOD,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    along, square = 0.0, 0.0
    for weight in weights:
        flat = weight.detach().flatten()
        for start in range(0, len(flat), _AT_ONCE // _PERIOD * _PERIOD):
            part = flat[start : start + _AT_ONCE // _PERIOD * _PERIOD].double()
            whole = len(part) // _PERIOD * _PERIOD
            sums = part[:whole].view(-1, _PERIOD).sum(0)
            sums[: len(part) - whole] += part[whole:]
            along += float(sums.cpu() @ signs)
            square += float(part.square().sum())
    return round(along / max(square, 1e-300) ** 0.5, 12)
