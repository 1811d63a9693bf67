"""What is done to a module for a while, beside other threads that may be running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

from torch import nn

_switching = RLock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, a module is in evaluation mode; afterwards each of its parts is in the mode it was in.

    One that is in it already is left alone. Threads that find one in training take turns.
    """
    if not any(part.training for part in module.modules()):
        yield
        return
    with _switching:
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    """A hook that is there for a while and for this thread alone; `register` is a module's method that registers it."""
    thread = get_ident()
    handle = register(lambda *given: hook(*given) if get_ident() == thread else None, **options)
    try:
        yield
    finally:
        handle.remove()
