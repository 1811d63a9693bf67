"""Texts with their sources, as --json of `retro generate` holds them, back to what the page of sources is made of."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from retro.retrieval import Source
from retro.sampling import Attribution, CopiedRun, ReadingChunk, ReadNeighbor


def attribution_from_json(value: dict[str, Any]) -> Attribution:
    """What `retro.sampling.as_json` was given. The value has the shape `retro.evaluation.report.shapes._TEXT`."""
    chunks = [
        _made(ReadingChunk, chunk | {"number": chunk["chunk"], "neighbors": list(map(_neighbor, chunk["neighbors"]))})
        for chunk in value["chunks"]
    ]
    return _made(Attribution, value | {"chunks": chunks})


def _neighbor(value: dict[str, Any]) -> ReadNeighbor:
    known = value["document_id"] is not None and value["position"] is not None
    named = value | {name: value[name] or "" for name in ("title", "source")}
    copied = None if value["copied"] is None else _made(CopiedRun, value["copied"])
    return _made(ReadNeighbor, value | {"source": _made(Source, named) if known else None, "copied": copied})


def _made(kind: Any, value: dict[str, Any]) -> Any:
    """The dataclass of an object's fields, lists as tuples."""
    given = {field.name: value[field.name] for field in fields(kind)}
    return kind(**{name: tuple(one) if isinstance(one, list) else one for name, one in given.items()})
