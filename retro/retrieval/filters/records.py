"""What a filter is, and what is recorded of a document that it keeps out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DocumentFilter(Protocol):
    """A rule about one document alone: the same verdict in whatever order, process or store it is asked.

    name: under which its verdicts are counted.
    """

    name: str

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None to keep a document (`Document` or, where no text is asked for, `DocumentRecord`), else a JSON-able
        record {"filter", "place", "document_id", "reason", and what was measured}."""


def removed(by: Any, document: Any, reason: str, **measured: Any) -> dict[str, Any]:
    """The record of a document that a filter keeps out."""
    place = getattr(document, "place", "")
    return {"filter": by.name, "place": place, "document_id": document.id, "reason": reason, **measured}
