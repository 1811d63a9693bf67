"""Hooks that let a form read and write a base's residual stream, inert outside of a run with neighbors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retro.common.modes import evaluating
from retro.model import RetroCache
from retro.model.fixed import FixedRows, FixedStep
from retro.model.step import CachedStep
from retro.retrofit.anatomy import Anatomy, entering, first_tensor, with_first


class HookPoint(NamedTuple):
    """A point of the residual stream: after self-attention of a layer (1-based), or at the layer's end."""

    layer: int
    at: Literal["attention", "end"]


@dataclass
class RetrofitContext:
    """One run of the base with neighbors.

    Over whole texts rows are aligned left: padding, if any, stands at the end. With a cache the run is over new tokens
    only, padding stands at the left, and `step` knows the neighbors.
    """

    form: Any  # a retro.retrofit.forms.Form
    key: object  # whose hooks this run is for
    neighbor_ids: Int[Tensor, "b l k r"] | None = None
    neighbor_mask: Bool[Tensor, "b l k r"] | None = None
    document_ids: Int[Tensor, "b n"] | None = None
    condition_mask: Bool[Tensor, "b l m"] | None = None  # real tokens of each whole chunk
    cache: RetroCache | FixedRows | None = None
    step: CachedStep | FixedStep | None = None
    keep: int | None = None  # logits of so many last tokens are wanted
    embed: Callable[[Tensor], Tensor] | None = None  # the base's token embeddings
    hidden_after: Callable[[Tensor, Tensor, int], Tensor] | None = None  # the base over other text: see stream_at
    entered: dict[int, Float[Tensor, "b n d"]] = field(default_factory=dict)  # x of each layer
    state: dict[str, Any] = field(default_factory=dict)  # what the form keeps from one point to the next


class _Running(local):
    """What this thread runs. torch.compile can trace it, but no ContextVar, and no attribute that a thread lacks."""

    def __init__(self):
        self.context: RetrofitContext | None = None


_running = _Running()


@contextmanager
def active(context: RetrofitContext | None) -> Iterator[None]:
    """The context that the hooks read; None lets them do nothing."""
    before = _running.context
    _running.context = context
    try:
        yield
    finally:
        _running.context = before


def _of(key: object, point: HookPoint | None = None) -> RetrofitContext | None:
    """This thread's context, if it is the key's, and its form wants to see the point."""
    context = _running.context
    if context is None or context.key is not key:
        return None
    return context if point is None or point in context.form.hook_points else None


def add_hooks(base: nn.Module, anatomy: Anatomy, hook_points: list[HookPoint], key: object) -> list[RemovableHandle]:
    """Put the hooks for `hook_points` into the base. They work in contexts of `key` only."""
    handles = []
    for point in hook_points:
        layer = anatomy.layer(base, point.layer)
        if point.at == "end":
            handles.append(layer.register_forward_hook(_LayerOutputHook(point, key)))
        else:
            writer, enters = anatomy.writers[point.layer], _LayerInputHook(point.layer, key)
            handles.append(layer.register_forward_pre_hook(enters, with_kwargs=True))
            part = layer.get_submodule(writer.name)
            handles.append(part.register_forward_hook(_AttentionHook(point, writer, key)))
    return handles


# Objects, not closures: a deep copy of the base then carries hooks of its own key.


@dataclass
class _LayerInputHook:
    layer: int
    key: object

    def __call__(self, module, args, kwargs=None) -> None:  # None for a thread that runs while this is registered
        context = _of(self.key)
        if context is not None:
            context.entered[self.layer] = entering(args, kwargs)


@dataclass
class _AttentionHook:
    point: HookPoint
    writer: Any
    key: object

    def __call__(self, module, args, out):
        context = _of(self.key, self.point)
        if context is None:
            return None
        written = first_tensor(out)
        h = self.writer.residual(context.entered[self.point.layer], written)
        update = context.form.update(self.point, h, context)
        return None if update is None else with_first(out, written + (update / self.writer.scale).to(written.dtype))


@dataclass
class _LayerOutputHook:
    point: HookPoint
    key: object

    def __call__(self, module, args, out):
        context = _of(self.key, self.point)
        if context is None:
            return None
        h = first_tensor(out)
        update = context.form.update(self.point, h, context)
        return None if update is None else with_first(out, h + update.to(h.dtype))


# What the base makes of other text


class LayerReached(Exception):
    """Ends a run of the base at a layer."""


@dataclass
class _StreamReader:
    """Takes the place of a form in a run that ends at a point, with the stream there."""

    hook_points: list[HookPoint]
    stream: Tensor | None = None

    def update(self, point: HookPoint, h: Tensor, context: RetrofitContext) -> None:
        self.stream = h
        if not torch.compiler.is_exporting():  # which follows modules to their ends
            raise LayerReached


@torch.no_grad()
def stream_at(
    point: HookPoint, base: nn.Module, key: object, ids: Int[Tensor, "q r"], mask: Bool[Tensor, "q r"]
) -> Float[Tensor, "q r d"]:
    """The base's residual stream at a hook point, each row read alone; no dropout, and the layers above are not run.

    `mask` is a prefix, as of retrieved values: what stands behind it is arbitrary.
    """
    reader = _StreamReader([point])
    with evaluating(base), active(RetrofitContext(form=reader, key=key)), suppress(LayerReached):
        base(input_ids=ids.masked_fill(~mask, 0), use_cache=False)
    return reader.stream


# Gradient checkpointing


def bind_checkpoints(base: nn.Module) -> None:
    """Let layers that are computed a second time for their gradients (checkpointing) find their context again.

    Raises ValueError for re-entrant checkpointing, through which no gradient reaches what hooks add.
    """
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False) or _is_bound(function):
            continue
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing has use_reentrant=True, which loses the gradients of what is added to a "
                "frozen base; enable it with use_reentrant=False."
            )
        module._gradient_checkpointing_func = partial(_checkpoint, function)


def _is_bound(function: Callable) -> bool:
    return getattr(function, "func", None) is _checkpoint


def _checkpoint(function: Callable, layer: Callable, *args, **kwargs):
    return function(partial(_resumed, _running.context, layer), *args, **kwargs)


def _resumed(context: RetrofitContext | None, layer: Callable, *args, **kwargs):
    with active(context):
        return layer(*args, **kwargs)
