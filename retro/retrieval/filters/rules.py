"""Rules about a document's fields, as "extra.score>=0.5": a field, a comparison, a value. Nothing is evaluated.

    rule   = field comparison value
    field  = id | title | source | name {"." name}      a name alone, or after "extra.", is one of the other fields
    comparison = "==" | "!=" | "<=" | ">=" | "<" | ">"
    value  = a number, true, false, or a text, which may stand in double quotes

The comparisons of size need a number on both sides; a text that is written as a number counts as one. The others
compare numbers where both sides are numbers, else texts. A document that has not got the field, or in a form that
cannot be compared, does not pass, whatever the comparison.
"""

from __future__ import annotations

import json
import operator
import re
from dataclasses import dataclass
from typing import Any

from retro.retrieval.filters.records import removed

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_RULE = re.compile(r"\s*([^\W\d][\w-]*(?:\.[\w-]+)*)\s*(==|!=|<=|>=|<|>)\s*([^\s=].*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_OWN_FIELDS = ("id", "title", "source")
_MISSING = object()


@dataclass(frozen=True)
class QualityFilter:
    """Keeps the documents whose field compares well with the value."""

    text: str
    field: tuple[str, ...]
    comparison: str
    value: str
    quoted: bool = False

    @property
    def name(self) -> str:
        """Each rule counts for itself."""
        return f"quality: {self.text}"

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None, or the record of a document that does not pass."""
        found = _field(document, self.field)
        if found is _MISSING or found is None:
            return removed(self, document, f"has no field {'.'.join(self.field)}", value=None)
        if not isinstance(found, (str, int, float)):
            return removed(self, document, f"{'.'.join(self.field)} is a {type(found).__name__}", value=found)
        number, other = _number(found), None if self.quoted else _number(self.value)
        if number is not None and other is not None:
            passes = _OPERATORS[self.comparison](number, other)
        elif self.comparison in ("==", "!="):
            passes = _OPERATORS[self.comparison](_text(found), self.value)
        else:
            return removed(self, document, f"{'.'.join(self.field)} is not a number", value=found)
        return None if passes else removed(self, document, f"not {self.text}", value=found)


def parse_rule(text: str) -> QualityFilter:
    """A rule as written; ValueError says what cannot be read in it."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'the quality rule {text!r} is not "field comparison value" such as extra.score>=0.5 or language==en; '
            f"the comparisons are {' '.join(_OPERATORS)}"
        )
    field, comparison, value = match.groups()
    path = tuple(field.split("."))
    if path[0] in ("text", "date") and len(path) == 1:
        instead = {"date": "min_date and max_date", "text": "min_chars and max_chars"}[path[0]]
        raise ValueError(f"the quality rule {text!r} is about the {path[0]}; use {instead}")
    quoted = value.startswith('"')
    try:
        value = json.loads(value) if quoted else value
    except ValueError:
        raise ValueError(f"the quality rule {text!r} has a text whose double quotes do not close; close them") from None
    if comparison not in ("==", "!=") and (quoted or _number(value) is None):
        raise ValueError(f"the quality rule {text!r} compares by size, but {value!r} is not a number; give a number")
    return QualityFilter(text.strip(), path, comparison, value, quoted)


def _field(document: Any, path: tuple[str, ...]) -> Any:
    if len(path) == 1 and path[0] in _OWN_FIELDS:
        return getattr(document, path[0])
    found: Any = document.extra
    for name in path[1:] if path[0] == "extra" and len(path) > 1 else path:
        found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
    return found


def _number(value: Any) -> float | int | None:
    """A number, or None for anything else; true and false are none."""
    if isinstance(value, (int, float)):
        return None if isinstance(value, bool) else value
    return float(value) if _NUMBER.fullmatch(value.strip()) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
