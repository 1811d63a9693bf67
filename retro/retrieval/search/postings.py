"""Inverted files of terms: which chunks hold a term and how often, written block by block; then weighed over all.

A segment (retro.retrieval.search.segments) holds counts only, which no other shard changes:

index/<hash>/    counts.npy uint16, postings.npy int32 (chunk of each count, by term), starts.npy int64 (of each term),
                 the same by chunk: chunk_counts.npy, chunk_terms.npy int32, chunk_starts.npy;
                 terms.npy (buckets) or words.json, lengths.npy int32 (words of each chunk, bm25), rows.npy, index.json

What depends on all chunks that are live (in how many a term is, their average length) is reckoned over all segments
for one generation of the store, so that a store that grew gives what a fresh one gives:

index/<hash>/    weights-00000.npy float32 (of each count of the first segment, 0 in removed chunks), idf-00000.npy,
                 norms-00000.npy (of each chunk, infinite for removed ones; see `weight_of`), index.json

Blocks of 1,024 chunks are cut into terms and written aside, by term; once the size of every term is known they are
copied to their places. Memory is that of a block (some 15 MB for chunks of 64 tokens) and some 30 bytes for each term,
of which tfidf has at most 2^24.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32

from retro.common.checksums import CheckedArray, open_array, open_checked
from retro.common.extras import check_installed
from retro.common.files import load_json, new_npy, open_npy, save_json, save_npy
from retro.retrieval.search.exact import blocks
from retro.retrieval.search.queries import Queries
from retro.retrieval.search.segments import ShardRange, row_range
from retro.retrieval.store.store import Store

EXACT = ":exact"
KINDS = ("bm25", "tfidf", f"bm25{EXACT}", f"tfidf{EXACT}")
BUCKETS = 1 << 24
K1, B = 1.5, 0.75  # of bm25
LEAST_IDF = 1e-3  # of tfidf: what all chunks have in common orders only what nothing else does
WEIGHING = {"k1": K1, "b": B, "least_idf": LEAST_IDF}
_BLOCK_ROWS = 1 << 10
_BLOCK_POSTINGS = 1 << 18
_BLOCK_TERMS = 1 << 18


def buckets(ids: Int64[np.ndarray, " t"]) -> Int64[np.ndarray, " terms"]:
    """The buckets of a text's tokens and pairs of tokens: the high bits of a multiplicative hash."""
    single = ids.astype(np.uint64) + np.uint64(1)
    pairs = single[:-1] * np.uint64(0x9E3779B97F4A7C15) + single[1:]
    mixed = np.concatenate([single, pairs]) * np.uint64(0xD6E8FEB86659FD93)  # wraps modulo 2^64
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(40)).astype(np.int64)


Terms = tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, " t"]]  # of many texts, and which text each is of


def bucket_terms(texts: list[Int64[np.ndarray, "_"]]) -> Terms:
    """The buckets of the tokens and pairs of tokens of texts."""
    owners = _owners(texts)
    found = buckets(np.concatenate([np.zeros(0, np.int64), *texts]))
    is_one = np.append(np.ones(len(owners), bool), owners[1:] == owners[:-1])  # no pair of two texts
    return found[is_one], np.append(owners, owners[:-1])[is_one]


def word_terms(texts: list[str]) -> tuple[list[str], Int64[np.ndarray, " t"]]:
    """The words of texts, and which text each is of."""
    words = words_of(texts)
    return [*chain.from_iterable(words)], _owners(words)


def _owners(lists: list[Any]) -> Int64[np.ndarray, " all"]:
    return np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64, len(lists)))


def words_of(texts: list[str]) -> list[list[str]]:
    """The words of texts, as bm25s cuts them: lower case, two letters or more."""
    return _bm25s().tokenize(texts, stopwords=None, return_ids=False, show_progress=False)


def _bm25s() -> Any:
    check_installed("bm25s", "the index bm25")
    import bm25s

    return bm25s


# Terms of a block of chunks


@dataclass(frozen=True)
class _Block:
    """Terms (provisional numbers), chunks and counts of a block, by term, then chunk; words of each chunk (bm25)."""

    terms: Int64[np.ndarray, " p"]
    chunks: Int64[np.ndarray, " p"]
    counts: Int64[np.ndarray, " p"]
    lengths: Int64[np.ndarray, " c"]


class _BucketTerms:
    """Terms that are buckets of tokens and of pairs of tokens."""

    def of(self, store: Store, rows: np.ndarray) -> Terms:
        return bucket_terms(Queries(store.tokenizer, tokens=store.token_lists(rows)).tokens)

    def final(self, terms: np.ndarray) -> np.ndarray:
        """The places of used terms in the order of the index."""
        return np.arange(len(terms), dtype=np.int32)

    def save(self, folder: Path, terms: np.ndarray) -> None:
        save_npy(folder / "terms.npy", terms)


class _WordTerms:
    """Terms that are words, in alphabetical order."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, store: Store, rows: np.ndarray) -> Terms:
        words, owners = word_terms(store.text(rows))
        return np.asarray([self.numbers.setdefault(word, len(self.numbers)) for word in words], np.int64), owners

    def final(self, terms: np.ndarray) -> np.ndarray:
        order = sorted(self.numbers, key=self.numbers.__getitem__)
        places = np.empty(len(order), np.int64)
        places[sorted(range(len(order)), key=order.__getitem__)] = np.arange(len(order))
        return places

    def save(self, folder: Path, terms: np.ndarray) -> None:
        save_json(folder / "words.json", sorted(self.numbers))


def _read_block(terms: _BucketTerms | _WordTerms, store: Store, rows: np.ndarray, first_chunk: int) -> _Block:
    found, chunks = terms.of(store, rows)
    pairs, counts = np.unique(found * len(rows) + chunks, return_counts=True)
    lengths = np.bincount(chunks, minlength=len(rows))
    return _Block(pairs // len(rows), first_chunk + pairs % len(rows), counts, lengths)


# Writing a segment


def write_postings(store: Store, shards: ShardRange, kind: str, rows: UInt32[np.ndarray, " c"], folder: Path) -> None:
    """Write the counts of the shards' searchable rows; ValueError if there is no word at all.

    The bytes depend on the rows only.
    """
    start, _ = row_range(store, shards)
    terms = _BucketTerms() if kind == "tfidf" else _WordTerms()
    used, sizes, lengths, parts = np.zeros(0, np.int32), np.zeros(0, np.int32), [], []
    for low, high in blocks(0, len(rows), _BLOCK_ROWS):
        block = _read_block(terms, store, start + rows[low:high].astype(np.int64), low)
        used, sizes = _added(used, sizes, *np.unique(block.terms, return_counts=True))
        lengths.append(block.lengths.astype(np.int32))
        parts.append(folder / f"block-{low:010d}.npy")
        save_npy(parts[-1], np.stack([block.terms, block.chunks, block.counts]).astype(np.int32))
    places = terms.final(used)
    starts = np.zeros(len(used) + 1, np.int64)
    starts[1:][places] = sizes
    np.cumsum(starts, out=starts)
    save_npy(folder / "starts.npy", starts)
    terms.save(folder, used)
    _place(folder, parts, used, places, starts, len(rows))
    if kind == "bm25":
        save_npy(folder / "lengths.npy", np.concatenate(lengths))


def _added(terms: np.ndarray, sizes: np.ndarray, new: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted lists of terms with their sizes as one."""
    at = np.searchsorted(terms, new)
    is_known = at < len(terms)
    is_known[is_known] = terms[at[is_known]] == new[is_known]
    sizes[at[is_known]] += counts[is_known].astype(np.int32)
    at, new, counts = (array[~is_known] for array in (at, new, counts))
    return np.insert(terms, at, new), np.insert(sizes, at, counts)


def _place(
    folder: Path, parts: list[Path], used: np.ndarray, places: np.ndarray, starts: np.ndarray, num_chunks: int
) -> None:
    """Copy the blocks to where each term's chunks go, in order of the chunks, and one behind the other by chunk, in
    order of the terms; delete them.
    """
    total, following, at = int(starts[-1]), starts, 0
    names = (("postings", np.int32), ("counts", np.uint16), ("chunk_terms", np.int32), ("chunk_counts", np.uint16))
    postings, counts, chunk_terms, chunk_counts = (
        new_npy(folder / f"{name}.npy", dtype, (total,)) for name, dtype in names
    )
    chunk_starts = np.zeros(num_chunks + 1, np.int64)
    for part in parts:
        terms, chunks, times = open_npy(part)
        times = np.minimum(times, np.iinfo(np.uint16).max)
        of_term = places[np.searchsorted(used, terms)]
        heads = np.flatnonzero(np.diff(of_term, prepend=-1))
        sizes = np.diff(np.append(heads, len(of_term)))
        target = np.repeat(following[of_term[heads]] - heads, sizes) + np.arange(len(of_term))
        postings[target], counts[target] = chunks, times
        following[of_term[heads]] += sizes
        order, own = np.lexsort((of_term, chunks)), slice(at, at + len(chunks))
        chunk_terms[own], chunk_counts[own] = of_term[order], times[order]
        sizes = np.bincount(chunks - chunks.min(initial=num_chunks))
        chunk_starts[1:][chunks.min(initial=num_chunks) :][: len(sizes)] += sizes
        at = own.stop
        part.unlink()
    save_npy(folder / "chunk_starts.npy", np.cumsum(chunk_starts))


# Reading a segment


class Postings:
    """The counts of one segment, memory-mapped; live: which chunks are not removed."""

    def __init__(self, store: Store, shards: ShardRange) -> None:
        self.shards, self.folder = shards, shards.folder
        self.kind: str = shards.record["kind"]
        self.first_row, _ = row_range(store, shards)
        names = ("postings", "counts", "chunk_terms", "chunk_counts")
        self.postings, self.counts, self.chunk_terms, self.chunk_counts = map(self._array, names)
        self.rows, self.starts, self.chunk_starts = map(self._whole, ("rows", "starts", "chunk_starts"))
        self._removed = self._removed_chunks(store)

    def _array(self, name: str) -> CheckedArray:
        return open_array(self.folder, f"{name}.npy", self.shards.record["files"])

    def _whole(self, name: str) -> np.ndarray:
        """An array of as many values as there are chunks or terms, all of which are checked."""
        return np.asarray(self._array(name))

    def _removed_chunks(self, store: Store) -> Bool[np.ndarray, " c"] | None:
        if not len(store.removed_documents):
            return None
        parts = [store.is_removed(self.store_rows(slice(*part))) for part in blocks(0, len(self.rows), 1 << 20)]
        removed = np.concatenate([np.zeros(0, bool), *parts])
        return removed if removed.any() else None

    def store_rows(self, chunks: Any) -> Int64[np.ndarray, "*c"]:
        """Store rows of chunks of this segment."""
        return self.first_row + np.asarray(self.rows[chunks], np.int64)

    @property
    def num_live(self) -> int:
        return len(self.rows) - (0 if self._removed is None else int(self._removed.sum()))

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " c"]:
        """Words of each chunk (bm25)."""
        return self._whole("lengths").astype(np.int64)

    @property
    def live_length(self) -> int:
        return int(self.lengths.sum() if self._removed is None else self.lengths[~self._removed].sum())

    def is_live(self, chunks: np.ndarray) -> np.ndarray | bool:
        return True if self._removed is None else ~self._removed[chunks]

    @cached_property
    def terms(self) -> Any:
        """What the terms are, in order: buckets (an array) or words (a list)."""
        if self.kind == "tfidf":
            return self._whole("terms")
        open_checked(self.folder, "words.json", self.shards.record["files"]).check()
        return load_json(self.folder / "words.json")

    def frequencies(self) -> Int64[np.ndarray, " terms"]:
        """In how many live chunks each term is."""
        if self._removed is None:
            return np.diff(self.starts)
        found = np.zeros(len(self.starts) - 1, np.int64)
        for part, of_term in self.parts():
            found += np.bincount(of_term[self.is_live(self.postings[part])], minlength=len(found))
        return found

    def parts(self) -> Iterator[tuple[slice, Int64[np.ndarray, " p"]]]:
        """Ranges of postings, and the term of each."""
        for low, high in blocks(0, len(self.postings), _BLOCK_POSTINGS):
            first, last = np.searchsorted(self.starts, [low, high - 1], side="right") - 1
            inner = np.clip(self.starts[first : last + 2], low, high)
            yield slice(low, high), np.repeat(np.arange(first, last + 1), np.diff(inner))


# Weighing


def write_weights(segments: list[Postings], kind: str, folder: Path) -> None:
    """Write the weights of all segments over the live chunks of all; ValueError if bm25 finds no word."""
    num_chunks = sum(segment.num_live for segment in segments)
    average = 0.0 if kind == "tfidf" else sum(segment.live_length for segment in segments) / max(num_chunks, 1)
    for number, (segment, frequency) in enumerate(zip(segments, _over_all(segments), strict=True)):
        idf = _idf(kind, num_chunks, frequency)
        norms = _tfidf_norms(segment, idf) if kind == "tfidf" else _bm25_norms(segment, average)
        norms = np.where(segment.is_live(np.arange(len(norms))), norms, np.float32(np.inf))
        save_npy(folder / f"idf-{number:05d}.npy", idf)
        save_npy(folder / f"norms-{number:05d}.npy", norms)
        _write_weights(segment, kind, idf, norms, folder / f"weights-{number:05d}.npy")


def _over_all(segments: list[Postings]) -> list[Int64[np.ndarray, " terms"]]:
    """For the terms of each segment, in how many live chunks of all segments they are."""
    own = [segment.frequencies() for segment in segments]
    if len(segments) < 2:
        return own
    if segments[0].kind == "tfidf":
        terms, place = np.unique(np.concatenate([s.terms for s in segments]), return_inverse=True)
        total = np.zeros(len(terms), np.int64)
        np.add.at(total, place, np.concatenate(own))
        return [total[np.searchsorted(terms, segment.terms)] for segment in segments]
    totals: dict[str, int] = {}
    for segment, frequency in zip(segments, own, strict=True):
        for word, count in zip(segment.terms, frequency.tolist(), strict=True):
            totals[word] = totals.get(word, 0) + count
    return [np.asarray([totals[word] for word in segment.terms], np.int64) for segment in segments]


def _idf(kind: str, num_chunks: int, frequency: Int64[np.ndarray, " terms"]) -> Float32[np.ndarray, " terms"]:
    """log((N - n + 1/2) / (n + 1/2)): at least a little for tfidf, so that a chunk of common terms is found too, of 1
    more for bm25; 0 for terms of removed chunks alone."""
    found = np.empty(len(frequency), np.float32)
    for low, high in blocks(0, len(frequency), _BLOCK_TERMS):
        known = frequency[low:high]
        odds = (num_chunks - known + 0.5) / (known + 0.5)
        idf = np.log(odds).clip(min=LEAST_IDF) if kind == "tfidf" else np.log(1 + odds)
        found[low:high] = np.where(known > 0, idf, 0)
    return found


def weight_of(kind: str, raw: Any, idf: Any, norm: Any) -> Any:
    """The weight of a term in a chunk; `raw` is log(1 + count) for tfidf, the count for bm25, in float32.

    norm: for tfidf the chunk's length, for bm25 k1 (1 - b + b words / average words): Lucene's variant.
    """
    return raw * idf / norm if kind == "tfidf" else idf * (raw / (norm + raw))


def raw_of(kind: str) -> Float32[np.ndarray, "65536"]:
    """What `weight_of` takes for each count."""
    counts = np.arange(np.iinfo(np.uint16).max + 1, dtype=np.float32)
    return np.log1p(counts) if kind == "tfidf" else counts


def _tfidf_norms(segment: Postings, idf: Float32[np.ndarray, " terms"]) -> Float32[np.ndarray, " c"]:
    """Of log(1 + count) idf over a chunk's terms, summed in their order."""
    squares, raw = np.zeros(len(segment.rows), np.float64), raw_of("tfidf")
    for part, of_term in segment.parts():
        weights = raw[segment.counts[part]] * idf[of_term]
        np.add.at(squares, segment.postings[part], np.square(weights, dtype=np.float64))
    return np.maximum(np.sqrt(squares), 1e-9).astype(np.float32)


def _bm25_norms(segment: Postings, average: float) -> Float32[np.ndarray, " c"]:
    return (K1 * (1 - B + B * segment.lengths / max(average, 1e-9))).astype(np.float32)


def _write_weights(segment: Postings, kind: str, idf: np.ndarray, norms: np.ndarray, file: Path) -> None:
    out, raw = new_npy(file, np.float32, (len(segment.postings),)), raw_of(kind)
    for part, of_term in segment.parts():
        out[part] = weight_of(kind, raw[segment.counts[part]], idf[of_term], norms[segment.postings[part]])
    out.flush()
