"""What a retrieval server and its clients say to each other: one JSON value and named arrays.

The bytes are those of safetensors: a header of JSON, then little-endian arrays; nothing in them can run. The JSON value
is the header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from retro.retrieval.neighbors import Neighbors, Source

MEDIA_TYPE = "application/vnd.safetensors"
ROW_TOKENS = 16  # what a document row, or a source, counts as, beside tokens of values


def pack(value: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """One JSON value and named arrays as bytes."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"json": json.dumps(value)})


def unpack(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """What `pack` was given; ValueError for bytes that it did not write, or cut ones."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return json.loads(header["__metadata__"]["json"]), arrays
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the {len(data)} bytes are no whole message of a retrieval server ({error})") from None


def pack_neighbors(found: Neighbors, about: dict[str, Any] | None = None) -> bytes:
    """Neighbors as bytes, each source once, and what else is to be said about them."""
    sources: dict[Source | None, int] = {}
    places = [[sources.setdefault(source, len(sources)) for source in line] for line in found.sources]
    arrays = {
        "ids": found.ids.astype(np.int64),
        "tokens": found.tokens.astype(np.int32),
        "mask": found.mask,
        "scores": found.scores.astype(np.float32),
        "sources": np.asarray(places, np.int32).reshape(found.ids.shape),
    }
    return pack({**(about or {}), "sources": pack_sources(sources)}, arrays)


def pack_sources(sources: Iterable[Source | None]) -> list[Any]:
    """Sources as JSON."""
    return [None if source is None else astuple(source) for source in sources]


def unpack_sources(fields: Sequence[Any]) -> list[Source | None]:
    """What `pack_sources` was given."""
    return [None if source is None else Source(*source) for source in fields]


def unpack_neighbors(data: bytes) -> tuple[Neighbors, dict[str, Any]]:
    """What `pack_neighbors` was given; ValueError for other bytes."""
    value, arrays = unpack(data)
    try:
        known = unpack_sources(value.pop("sources"))
        sources = [[known[place] for place in line] for line in arrays["sources"].tolist()]
        tokens = arrays["tokens"].astype(np.int64)
        return Neighbors(arrays["ids"], tokens, arrays["mask"], arrays["scores"], sources), value
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the message holds no neighbors ({error!r})") from None
