"""Hooks that let a form read and write a base's residual stream, inert unless a reading is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.model import RetroCache
from retro.model.call import ForwardPass
from retro.retrofit.anatomy import Anatomy, entering, first_tensor, with_first


class Place(NamedTuple):
    """A place in the residual stream: after self-attention of a layer (1-based), or at the layer's end."""

    layer: int
    at: Literal["attention", "end"]


@dataclass
class RetrofitContext:
    """One run of the base with neighbors.

    Over whole texts rows are aligned left: padding, if any, stands at the end. With a cache the run is over new tokens
    only, padding stands at the left, and `call` knows the neighbors.
    """

    form: Any  # a retro.retrofit.forms.Form
    key: object  # whose hooks this reading is for
    neighbor_ids: Int[Tensor, "b l k r"] | None = None
    neighbor_mask: Bool[Tensor, "b l k r"] | None = None
    document_ids: Int[Tensor, "b n"] | None = None
    condition_mask: Bool[Tensor, "b l m"] | None = None  # real tokens of each whole chunk
    cache: RetroCache | None = None
    call: ForwardPass | None = None
    keep: int | None = None  # logits of so many last tokens are wanted
    embed: Callable[[Tensor], Tensor] | None = None  # the base's token embeddings
    hidden_after: Callable[[Tensor, Tensor, int], Tensor] | None = None  # the base over other text: see anatomy
    entered: dict[int, Float[Tensor, "b n d"]] = field(default_factory=dict)  # x of each layer
    state: dict[str, Any] = field(default_factory=dict)  # what the form keeps from one place to the next


_reading: ContextVar[RetrofitContext | None] = ContextVar("reading", default=None)


@contextmanager
def active(reading: RetrofitContext | None) -> Iterator[None]:
    """The reading whose neighbors the hooks read; None for none."""
    token = _reading.set(reading)
    try:
        yield
    finally:
        _reading.reset(token)


def _of(key: object) -> RetrofitContext | None:
    reading = _reading.get()
    return reading if reading is not None and reading.key is key else None


def add_hooks(base: nn.Module, anatomy: Anatomy, places: list[Place], key: object) -> None:
    """Put the hooks for `places` into the base. They work for readings of `key` only."""
    for place in places:
        layer = anatomy.layer(base, place.layer)
        if place.at == "end":
            layer.register_forward_hook(_AtEnd(place, key))
        else:
            writer = anatomy.writers[place.layer]
            layer.register_forward_pre_hook(_Entering(place.layer, key), with_kwargs=True)
            layer.get_submodule(writer.name).register_forward_hook(_AfterAttention(place, writer, key))


# Objects, not closures: a deep copy of the base then carries hooks of its own key.


@dataclass
class _Entering:
    layer: int
    key: object

    def __call__(self, module, args, kwargs) -> None:
        reading = _of(self.key)
        if reading is not None:
            reading.entered[self.layer] = entering(args, kwargs)


@dataclass
class _AfterAttention:
    place: Place
    writer: Any
    key: object

    def __call__(self, module, args, out):
        reading = _of(self.key)
        if reading is None:
            return None
        written = first_tensor(out)
        h = self.writer.residual(reading.entered[self.place.layer], written)
        update = reading.form.update(self.place, h, reading)
        return None if update is None else with_first(out, written + (update / self.writer.scale).to(written.dtype))


@dataclass
class _AtEnd:
    place: Place
    key: object

    def __call__(self, module, args, out):
        reading = _of(self.key)
        if reading is None:
            return None
        h = first_tensor(out)
        update = reading.form.update(self.place, h, reading)
        return None if update is None else with_first(out, h + update.to(h.dtype))


def bind_checkpoints(base: nn.Module) -> None:
    """Let layers that are computed a second time for their gradients (checkpointing) find their reading again.

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
    return function(partial(_resumed, _reading.get(), layer), *args, **kwargs)


def _resumed(reading: RetrofitContext | None, layer: Callable, *args, **kwargs):
    with active(reading):
        return layer(*args, **kwargs)
