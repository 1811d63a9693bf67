"""Where a pretrained decoder can be written to: its layers, and in each the module whose output joins the residual.

Nothing is known of a base beforehand. Its layers are the longest list of modules, and one small run says the rest: what
enters a layer (x), what each of its parts was given and gave, and what left it. A part's output w is what joins the
residual after self-attention if

    a later part is given x + c w    the paper's place, between self-attention and feed-forward ("between")
    the layer's output is x + w + what another part gave    a parallel block: the place is beside the feed-forward
    the attention was given x, and the part after it is given w    w is the sum already (Bloom's way; "between")

tried for the attention module itself first, then for norms that follow it (Gemma 2, OLMo 2, GLM-4 ...). c is not 1
where a model scales what joins (Granite). So a wrong place cannot be taken silently: what fits none of the three is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retro.common.modes import evaluating, hooked

PROBE_TOKENS = 5


@dataclass(frozen=True)
class Writer:
    """The part of a layer whose output joins the residual after self-attention.

    name: of the part within its layer. kind: "between" self-attention and feed-forward, or "beside" the feed-forward.
    scale: c; the residual becomes x + c w. holds_residual: w is that sum itself.
    """

    name: str
    kind: Literal["between", "beside"]
    scale: float = 1.0
    holds_residual: bool = False

    def residual(self, x: Tensor, written: Tensor) -> Tensor:
        """H = ATTN(H): the residual stream after self-attention."""
        return written if self.holds_residual else x + self.scale * written


@dataclass(frozen=True)
class Anatomy:
    """Names of a base's parts, without PEFT around it, and the writer of each layer that was asked for (1-based)."""

    layers_name: str
    num_layers: int
    writers: dict[int, Writer]

    def layers(self, base: nn.Module) -> nn.ModuleList:
        return without_peft(base).get_submodule(self.layers_name)

    def layer(self, base: nn.Module, number: int) -> nn.Module:
        """Layer `number`, 1-based."""
        return self.layers(base)[number - 1]


def find_anatomy(base: nn.Module, layers: list[int]) -> Anatomy:
    """The anatomy of a causal LM, with the writers of `layers`. Where there are any, runs it once over a few tokens.

    Of a model on the meta device, which cannot run, it is without writers.

    Raises ValueError, naming what is missing, for a model that cannot be fitted.
    """
    kind = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} cannot be fitted: it is an encoder-decoder, not a decoder-only causal LM.")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{kind} cannot be fitted: it has no output embeddings; open it with AutoModelForCausalLM.")
    layers_name, blocks = _layer_list(base)
    attention_names = {number: _attention_name(kind, number, blocks) for number in layers}
    if not layers or is_empty(base):
        return Anatomy(layers_name, len(blocks), {})
    traces = _trace(base, {number: blocks[number - 1] for number in layers})
    writers = {
        number: _find_writer(kind, number, attention_names[number], trace) for number, trace in sorted(traces.items())
    }
    return Anatomy(layers_name, len(blocks), writers)


def without_peft(base: Any) -> nn.Module:
    """The base itself, where PEFT is around it."""
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def is_empty(base: nn.Module) -> bool:
    """Whether a model has no weights yet: it is on the meta device. ValueError where they come and go (accelerate)."""
    empty = any(weight.is_meta for weight in base.parameters())
    if empty and hasattr(base, "_hf_hook"):
        raise ValueError(
            "the base's weights do not fit into the memory that device_map has, and are offloaded, which a fit cannot "
            "read from; give more memory, or quantize the base."
        )
    return empty


def _layer_list(base: nn.Module) -> tuple[str, nn.ModuleList]:
    wanted = base.config.get_text_config().num_hidden_layers
    lists = [
        (name, m) for name, m in without_peft(base).named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted
    ]
    if not lists:
        raise ValueError(f"{type(base).__name__} cannot be fitted: it has no list of {wanted} decoder layers.")
    return min(lists, key=lambda found: found[0].count("."))


def _attention_name(kind: str, number: int, blocks: nn.ModuleList) -> str:
    found = [_attention_of(layer) for layer in blocks]
    if found[number - 1] is not None:
        return found[number - 1]
    parts = ", ".join(type(part).__name__ for part in blocks[number - 1].children())
    others = ", ".join(str(i) for i, name in enumerate(found, start=1) if name is not None)
    remedy = f"name some of {others} in cca_layers" if others else "no layer has one: fit it with form='pointer'"
    raise ValueError(f"{kind} cannot be fitted: layer {number} has no self-attention (it has {parts}); {remedy}.")


def _attention_of(layer: nn.Module) -> str | None:
    for name, part in layer.named_children():
        label = f"{name} {type(part).__name__}".lower()
        if "att" in label and "norm" not in label and "dropout" not in label:
            return name
    return None


# One run, watched


@dataclass
class ModuleCall:
    """One call of a part of a layer: the tensors it was given, and the one it gave."""

    name: str
    given: list[Tensor]
    gave: Tensor


@dataclass
class Trace:
    """What entered a layer, what its parts did, what left it."""

    x: Tensor | None = None
    calls: list[ModuleCall] = field(default_factory=list)
    out: Tensor | None = None


@torch.no_grad()
def _trace(base: nn.Module, layers: dict[int, nn.Module]) -> dict[int, Trace]:
    traces = {number: Trace() for number in layers}
    with ExitStack() as stack:
        for number, layer in layers.items():
            stack.enter_context(_watched(layer, traces[number]))
        run_probe(base, probe_tokens(base))
    return traces


@contextmanager
def _watched(layer: nn.Module, trace: Trace) -> Iterator[None]:
    def enter(module, args, kwargs):
        trace.x = entering(args, kwargs).detach().clone()

    def leave(module, args, kwargs, out):
        trace.out = first_tensor(out).detach().clone()

    def record(name):
        def hook(module, args, kwargs, out):
            given = [t.detach().clone() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if isinstance(first_tensor(out), Tensor):
                trace.calls.append(ModuleCall(name, given, first_tensor(out).detach().clone()))

        return hook

    with ExitStack() as stack:
        stack.enter_context(hooked(layer.register_forward_pre_hook, enter, with_kwargs=True))
        stack.enter_context(hooked(layer.register_forward_hook, leave, with_kwargs=True))
        for name, part in layer.named_children():
            stack.enter_context(hooked(part.register_forward_hook, record(name), with_kwargs=True))
        yield


def entering(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def first_tensor(out: Any) -> Any:
    """What a module gives, or the first of a tuple."""
    return out[0] if isinstance(out, (tuple, list)) else out


def with_first(out: Any, tensor: Tensor) -> Any:
    """`out` with its first tensor replaced."""
    return type(out)((tensor, *out[1:])) if isinstance(out, (tuple, list)) else tensor


def probe_tokens(base: nn.Module) -> Int[Tensor, "1 n"]:
    """A few different tokens of the base's vocabulary."""
    device = base.get_input_embeddings().weight.device
    return torch.arange(PROBE_TOKENS, device=device)[None] % base.config.get_text_config().vocab_size


@torch.no_grad()
def run_probe(base: nn.Module, ids: Int[Tensor, "b n"], **inputs) -> Float[Tensor, "b n v"]:
    """Logits of a small run in evaluation mode."""
    with evaluating(base):
        return base(input_ids=ids, use_cache=False, **inputs).logits


# What the run says


def _find_writer(kind: str, number: int, attention: str, trace: Trace) -> Writer:
    start = next((i for i, call in enumerate(trace.calls) if call.name == attention), None)
    if start is None or trace.x is None:
        raise ValueError(f"{kind} cannot be fitted: layer {number} never calls its {attention}.")
    candidates = list(_candidates(trace, start))
    for i in candidates:
        scale = _between(trace, i)
        if scale is not None:
            return Writer(trace.calls[i].name, "between", scale)
    for i in candidates:
        if _beside(trace, i):
            return Writer(trace.calls[i].name, "beside")
    if _holds_residual(trace, start):
        return Writer(attention, "between", holds_residual=True)
    raise ValueError(
        f"{kind} cannot be fitted: in layer {number} no output of {attention}, nor of a norm after it, joins the "
        "residual stream in a known way; fit it with form='pointer'."
    )


def _candidates(trace: Trace, start: int) -> Iterator[int]:
    """The attention's call, then each call that takes just what the one before gave."""
    yield start
    last = start
    for i in range(start + 1, len(trace.calls)):
        if any(_same(given, trace.calls[last].gave) for given in trace.calls[i].given):
            yield i
            last = i


def _between(trace: Trace, i: int) -> float | None:
    """The scale c if a later part is given x + c w, or if that is what leaves the layer."""
    x, w = trace.x.double(), trace.calls[i].gave.double()
    for given in [t for call in trace.calls[i + 1 :] for t in call.given] + [trace.out]:
        if w.shape != x.shape or given.numel() != x.numel():
            continue
        given = given.reshape(x.shape)  # OPT folds batch and time together
        moved, weight = given.double() - x, (x.abs() + w.abs() + 1e-30) ** -2
        scale = ((moved * w * weight).sum() / (w * w * weight).sum().clamp(min=1e-30)).item()
        scale = 1.0 if abs(scale - 1) < 0.01 else round(scale, 4)
        if scale and _is_sum(given, x, scale * w, eps=torch.finfo(trace.x.dtype).eps):
            return scale
    return None


def _beside(trace: Trace, i: int) -> bool:
    """Whether x + w + what another part gave leaves the layer."""
    x, w, eps = trace.x.double(), trace.calls[i].gave.double(), torch.finfo(trace.x.dtype).eps
    others = [call.gave.double() for j, call in enumerate(trace.calls) if j != i and call.gave.shape == x.shape]
    return w.shape == x.shape and any(_is_sum(trace.out, x, w, other, eps=eps) for other in others)


def _is_sum(total: Tensor, *terms: Tensor, eps: float) -> bool:
    """Whether `total` is the sum of terms up to rounding, and every term matters to it in many places."""
    size = sum(term.abs() for term in terms)
    exact = ((total.double() - sum(terms)).abs() <= 4 * eps * size + 1e-30).all()
    return bool(exact) and all((term.abs() > 16 * eps * size).float().mean() > 0.2 for term in terms)


def _holds_residual(trace: Trace, start: int) -> bool:
    call = trace.calls[start]
    takes_x = any(_same(given, trace.x) for given in call.given)
    used_whole = any(_same(given, call.gave) for later in trace.calls[start + 1 :] for given in later.given)
    return takes_x and used_whole


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
