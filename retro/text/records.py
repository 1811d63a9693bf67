"""One record, of whatever file, to a document."""

from __future__ import annotations

import json
from typing import Any

from retro.text.documents import Document, Reject, has_surrogates


def document_of(record: Any, place: tuple[str, int], text_field: str = "text") -> Document | Reject:
    """One record (a mapping) to a document, or the reason why not."""
    file, line = place
    if not isinstance(record, dict):
        return Reject(
            file, line, f"the record is a {type(record).__name__}, not an object with the field {text_field!r}"
        )
    if text_field not in record:
        named = ", ".join(map(str, sorted(record))) or "none"
        return Reject(file, line, f"the record has no field {text_field!r} (it has {named}; text_field chooses one)")
    text = record[text_field]
    if not isinstance(text, str):
        return Reject(file, line, f"the field {text_field!r} is a {type(text).__name__}, not a string")
    if has_surrogates(text):
        return Reject(file, line, f"the field {text_field!r} is invalid UTF-8 (it holds a lone surrogate)")

    def read(name: str) -> str:
        value = record.get(name)
        return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")

    known = {text_field, "id", "_id", "title", "source", "date"}
    extra = {key: value for key, value in record.items() if key not in known}
    where = f"{file}:{line}"
    return Document(
        read("id") or read("_id") or where,
        text,
        read("title"),
        read("source"),
        read("date") or None,
        json_safe(extra),
        place=where,
    )


def json_safe(value: Any) -> Any:
    """A copy of `value` that JSON can hold; what it cannot (dates, bytes) becomes its string."""
    return json.loads(json.dumps(value, default=str))
