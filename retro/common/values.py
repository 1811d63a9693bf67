"""Values: the type of a field says what it takes, and `check_fields` refuses what is none of it.

    @dataclass
    class Example:
        batch_size: Size = 8
        lr: Positive = 2e-4

        def __post_init__(self):
            check_fields(self)

Everywhere a number is finite and no boolean, and text is not empty, is UTF-8 and holds no NUL.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

from retro.common.settings import type_name


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers above `gt` or from `ge` on, and below `lt` or up to `le`."""

    gt: float = -math.inf
    ge: float = -math.inf
    lt: float = math.inf
    le: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return self.gt < value < self.lt and self.ge <= value <= self.le

    def __str__(self) -> str:
        ends = (("above", self.gt), ("at least", self.ge), ("below", self.lt), ("at most", self.le))
        powers = {1 << 32: "2^32", 1 << 63: "2^63"}
        return " and ".join(f"{word} {powers.get(end, end)}" for word, end in ends if math.isfinite(end))


MAY_BE_EMPTY = "may be empty"
Size = Annotated[int, Range(ge=1, le=1 << 20)]  # of what is in memory at once
NumNeighbors = Annotated[int, Range(ge=1, le=1 << 16)]
Count = Annotated[int, Range(ge=1, lt=1 << 63)]
CountOrZero = Annotated[int, Range(ge=0, lt=1 << 63)]
Seed = Annotated[int, Range(ge=0, lt=1 << 32)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Probability = Annotated[float, Range(ge=0, le=1)]
Prefix = Annotated[str, MAY_BE_EMPTY]


def check_fields(settings: Any, without: Sequence[str] = ()) -> None:
    """Raise ValueError, naming field, value and remedy, for a field of a dataclass that its type does not allow."""
    for name, hint in _hints(type(settings)).items():
        if name not in without:
            check_value(name, getattr(settings, name), hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError, naming field, value and remedy, for a value that a type does not allow."""
    wanted = _wanted(value, hint)
    if wanted:
        raise ValueError(f"{name} is {shown(value)}; give {wanted}")


def check_record(
    where: Any, record: Any, fields: Mapping[str, Any], remedy: str = "restore it from a copy or build it again"
) -> Any:
    """Give a record back whose fields are of these types; ValueError, naming `where` and the field, for any other.

    A type may itself be such a table of fields, or a list of one, for a list of records; {str: ...} is for any names.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is {shown(record)} in the place of a record; {remedy}")
    for name, hint in dict.fromkeys(record, fields[str]).items() if str in fields else fields.items():
        if name not in record:
            raise ValueError(f"{where} has no {name}; {remedy}")
        if isinstance(hint, Mapping):
            check_record(f"{name} of {where}", record[name], hint, remedy)
        elif isinstance(hint, list):
            if not isinstance(record[name], list):
                raise ValueError(f"{name} of {where} is {shown(record[name])} in the place of a list; {remedy}")
            for number, one in enumerate(record[name]):
                check_record(f"{name}[{number}] of {where}", one, hint[0], remedy)
        elif _wanted(record[name], hint):
            raise ValueError(f"{name} of {where} is {shown(record[name])}, not {_wanted(record[name], hint)}; {remedy}")
    return record


def shown(value: Any) -> str:
    """A value as a sentence shows it, cut where it is long."""
    if value == "":
        return "empty"
    try:
        text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def _wanted(value: Any, hint: Any) -> str | None:
    """What a type takes, in words, where the value is none of it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if MAY_BE_EMPTY in args and value == "":
            return None
        within = [one for one in args[1:] if isinstance(one, Range)]
        wanted = _wanted(value, args[0])
        outside = wanted is not None or any(value not in one for one in within)
        return ", ".join([wanted or type_name(args[0]), *map(str, within)]) if outside else None
    if origin in (typing.Union, types.UnionType):
        wanted = [_wanted(value, arg) for arg in args]
        return None if None in wanted else wanted[0]
    if origin is Literal:
        return None if any(value == one and type(value) is type(one) for one in args) else type_name(hint)
    if origin in (list, tuple, Sequence):
        return _wanted_list(value, hint, args)
    if origin is dict:
        if not isinstance(value, Mapping):
            return "a mapping"
        return next(filter(None, (_wanted(one, args[1]) for one in value.values())), None)
    return None if _fits(value, hint) else _WORDS.get(hint) or type_name(hint)


def _wanted_list(value: Any, hint: Any, args: tuple) -> str | None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return "a list"
    fixed = bool(args) and args[-1] is not Ellipsis and typing.get_origin(hint) is tuple
    if fixed and len(value) != len(args):
        return f"a list of {len(args)} values"
    wanted = (_wanted(one, args[i] if fixed else args[0]) for i, one in enumerate(value))
    return next((f"a list of values, each {one}" for one in wanted if one), None)


def _fits(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        of_kind = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return of_kind and (isinstance(value, Integral) or math.isfinite(value))
    if hint is str:
        return isinstance(value, (str, os.PathLike)) and _is_text(os.fspath(value))
    return hint not in (bool, types.NoneType, Path) or isinstance(value, hint)


def _is_text(text: str) -> bool:
    return bool(text.strip(" ")) and "\0" not in text and not any("\ud800" <= one <= "\udfff" for one in text)


_WORDS = {int: "a whole number", float: "a finite number", str: "text without NUL that is not empty"}
