"""Limits of a server: fields with a default and a help text."""

from dataclasses import field, fields
from typing import Any


def limit(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def check_above_zero(limits: Any) -> None:
    for limit in fields(limits):
        value = getattr(limits, limit.name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{limit.name} is {value}; give a number above 0.")
