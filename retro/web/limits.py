"""Limits of a server are numbers above 0."""

from dataclasses import fields
from typing import Any


def check_above_zero(limits: Any) -> None:
    """Raise ValueError for a limit that is not above 0."""
    for limit in fields(limits):
        value = getattr(limits, limit.name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{limit.name} is {value}; give a number above 0.")
