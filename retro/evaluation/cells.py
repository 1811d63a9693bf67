"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

NOTHING = "–"


def figure(value: float | int | None, digits: int = 4) -> str:
    """A count as it is, anything else with so many digits after the point."""
    if isinstance(value, int):
        return f"{value:,}"
    return NOTHING if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float | int | None, sign: str = "") -> str:
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:{sign}.2f}%"


def share(value: float | int) -> str:
    return f"{100 * value:g}%"


def gain_over(bpb: float | int, other: float | int) -> float:
    """By which share a figure is below another one; NaN where the other is 0."""
    return 1 - bpb / other if other else math.nan


def change(gain: float | int) -> str:
    """A gain in words: "8.8% below"."""
    return "not comparable with" if math.isnan(gain) else f"{100 * abs(gain):.1f}% {'below' if gain >= 0 else 'above'}"


def ends(pair: Sequence[float | None] | None, form: Callable = figure) -> str:
    """The two ends of an interval, nothing where they are no numbers."""
    told = [NOTHING] if pair is None else list(map(form, pair))
    return NOTHING if NOTHING in told else " to ".join(told)


def with_ends(value: float | int, low: float, high: float, form: Callable) -> str:
    """A value with its interval in brackets, if there is one."""
    told = ends([low, high], form)
    return form(value) if told == NOTHING else f"{form(value)} ({told})"


def amount(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def plain_cell(value: Any) -> str:
    """Any value of a record in a few characters."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
