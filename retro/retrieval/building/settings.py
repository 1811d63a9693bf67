"""What `retro build` needs to know, and the embedder that it names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from retro.retrieval.embedding.embedder import NO_EMBEDDER, Embedder, NoEmbedder, load_embedder
from retro.retrieval.executors.opening import EXECUTORS
from retro.retrieval.filters import FilterSettings
from retro.retrieval.search.searchers import parse_kind

KEY_DTYPES = ("float32", "float16", "bfloat16")
EMBEDDER_CHOICES = ("pooling", "query_prefix", "passage_prefix", "max_length", "normalize")
LATER_CHOICES = ("similarity", "query_encoder", "attention", "pool_prefix")  # in the fingerprint of the embedder


@dataclass
class BuildSettings(FilterSettings):
    """What `retro build` needs to know: the one schema of a store's build. Of filters: see `FilterSettings`.

    Arguments:
        store: the folder to write.
        inputs: see `retro.text.corpus.read_documents`.
        tokenizer: Hugging Face name, folder, GGUF file, or "package:NAME" for the GGUF file of an installed package.
        embedder: see `load_embedder`, and for the fields that bear its names; "none" makes a store without keys, which
            is searched by its words ("tfidf", "bm25").
        key_dtype: "float32", "float16" or "bfloat16".
        chunk_len: m, tokens of a chunk.
        min_chunk_len: chunks with fewer tokens keep their row, but no search returns them.
        text_field: field or column that holds the text.
        on_bad: "error" stops at the first record that is no document; "reject" lists it in rejects/.
        index: "none", or a kind of retro.retrieval.search.searchers: "auto", "exact", "scann", "faiss", "tfidf",
            "bm25", or several joined by "+".
        recall: share of the true nearest keys that an approximate index is tuned to find; None is its default.
        shard_chunks: a shard is closed before the document that would take it beyond this many chunks.
        batch_size: chunks per forward pass of the embedder; None suits the device.
        executor, workers: who does the work, see `open_executor`; the store is the same.
    """

    store: str
    inputs: list[str]
    tokenizer: str
    embedder: str = "minilm"
    pooling: str | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_length: int | None = None
    normalize: bool | None = None
    key_dtype: str = "float32"
    chunk_len: int = 64
    min_chunk_len: int = 8
    text_field: str = "text"
    on_bad: str = "error"
    index: str = "auto"
    recall: float | None = None
    shard_chunks: int = 1_000_000
    batch_size: int | None = None
    similarity: str | None = None
    query_encoder: str | None = None
    attention: str | None = None
    pool_prefix: bool | None = None
    executor: str = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store = os.fspath(self.store)
        self.tokenizer, self.embedder = os.fspath(self.tokenizer), os.fspath(self.embedder)
        self.inputs = [os.fspath(item) for item in self.inputs]
        one_of("key_dtype", self.key_dtype, KEY_DTYPES)
        one_of("on_bad", self.on_bad, ("error", "reject"))
        one_of("executor", self.executor, EXECUTORS)
        if self.index != "none":
            parse_kind(self.index, keyless=self.embedder == NO_EMBEDDER)
        if not 1 <= self.chunk_len <= 65535:
            raise ValueError(f"chunk_len must be from 1 to 65535, not {self.chunk_len}")
        if not 1 <= self.min_chunk_len <= self.chunk_len:
            raise ValueError(f"min_chunk_len must be from 1 to chunk_len ({self.chunk_len}), not {self.min_chunk_len}")
        for name in ("shard_chunks", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def embedder_of_settings(settings: BuildSettings) -> Embedder:
    chosen = {name: getattr(settings, name) for name in EMBEDDER_CHOICES + LATER_CHOICES}
    if settings.embedder != NO_EMBEDDER:
        return load_embedder(settings.embedder, **chosen, batch_size=settings.batch_size)
    chosen |= {"key_dtype": settings.key_dtype, "batch_size": settings.batch_size}
    given = [name for name, value in chosen.items() if value != getattr(BuildSettings, name)]
    if given:
        raise ValueError(f"{given[0]} is given, but embedder is none; leave it out or name an embedder")
    return NoEmbedder()


# Plan


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
