"""What a retrieval server and its clients say to each other: one JSON value and named arrays.

The bytes are those of safetensors: a header of JSON, then little-endian arrays; nothing in them can run. The JSON value
is the header's metadata. What a client reads is held to the types, shapes and ranges that it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np

from retro.common.records import FILES
from retro.common.values import Count, CountOrZero, NumNeighbors, Prefix, Size
from retro.retrieval.neighbors import Neighbors, Source

MEDIA_TYPE = "application/vnd.safetensors"
ROW_TOKENS = 16  # what a document row, or a source, counts as, beside tokens of values
COUNTS = ("num_chunks", "num_documents", "num_searchable", "num_live_chunks", "num_live_documents", "key_dim")
LIMITS = ("max_queries", "max_answer_tokens", "max_seconds")
ABOUT = {  # what a server says of itself, see `check_record`
    "fingerprint": str,
    "manifest": {
        "tokenizer": {"name": Prefix, "fingerprint": str, "vocab_size": Count, "files": FILES},
        "embedder": {"name": str, "fingerprint": str, "dim": CountOrZero},
        "chunk_len": Size,
        "pad_token_id": CountOrZero,
    },
    "counts": dict.fromkeys(COUNTS, CountOrZero),
    "index": {"kind": str, "num_rows": CountOrZero, "recall": float, "shards_total": Count | None},
    "num_neighbors": NumNeighbors,
    "retrieved_len": Size,
    "limits": {"max_queries": Count, "max_answer_tokens": Count},
}
_SOURCE = (str, str, str, int, str | None)


class Wanted(NamedTuple):
    """What an array must be: its type, its shape, and from where to where its values may go."""

    dtype: Any
    shape: tuple[int, ...]
    low: int = 0
    stop: int = 1 << 63

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != self.dtype or array.shape != self.shape:
            wanted = f"{list(self.shape)} of {np.dtype(self.dtype)}"
            raise ValueError(f"{name} is {list(array.shape)} of {array.dtype}, not {wanted}")
        if array.dtype.kind == "i" and array.size and not self.low <= array.min() <= array.max() < self.stop:
            raise ValueError(f"{name} holds {array.min()} to {array.max()}, not {self.low} to {self.stop - 1}")


def pack(value: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """One JSON value and named arrays as bytes."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"json": json.dumps(value)})


def unpack(data: bytes, **wanted: Wanted) -> tuple[Any, dict[str, np.ndarray]]:
    """What `pack` was given; ValueError for bytes that it did not write, for cut ones, and for arrays that are not what
    is wanted of these names."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, what in wanted.items():
            what.check(name, arrays[name])
        return json.loads(header["__metadata__"]["json"]), arrays
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
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


def unpack_sources(fields: Any, number: int | None = None) -> list[Source | None]:
    """What `pack_sources` was given, so many of them; ValueError for anything else."""
    try:
        found = [None if source is None else Source(*source) for source in fields]
    except TypeError as error:
        raise ValueError(f"its sources are none ({error})") from None
    if not all(all(map(isinstance, astuple(one), _SOURCE)) for one in found if one is not None):
        raise ValueError("its sources are no texts and positions")
    if number not in (None, len(found)):
        raise ValueError(f"it has {len(found)} sources for {number} rows")
    return found


def unpack_neighbors(
    data: bytes, shape: tuple[int, int, int], num_rows: int, num_tokens: int
) -> tuple[Neighbors, dict[str, Any]]:
    """What `pack_neighbors` was given of q queries; ValueError for other bytes.

    shape: q, k, r. num_rows, num_tokens: how many of them there are.
    """
    value, arrays = unpack(
        data,
        ids=Wanted(np.int64, shape[:2], -1, num_rows),
        tokens=Wanted(np.int32, shape, 0, num_tokens),
        mask=Wanted(bool, shape),
        scores=Wanted(np.float32, shape[:2]),
        sources=Wanted(np.int32, shape[:2]),
    )
    try:
        known = unpack_sources(value.pop("sources"))
        sources = [[known[place] for place in line] for line in arrays["sources"].tolist()]
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the message holds no neighbors ({error!r})") from None
    tokens = arrays["tokens"].astype(np.int64)
    return Neighbors(arrays["ids"], tokens, arrays["mask"], arrays["scores"], sources), value
