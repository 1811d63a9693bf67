"""One bit of any file of a store is turned: every answer is refused in one sentence or is what it was."""

import shutil

import numpy as np
import pytest

from retro.common import checksums
from retro.retrieval import Store, build_index, build_neighbors, open_neighbors, remove_documents, verify_store
from retro.retrieval.search import candidates
from retro.retrieval.search.index import open_index
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from tests.stand_ins import HashingEmbedder, make_store, words

LEXICAL = ("tfidf", "bm25", "tfidf:exact")
FILES = ("manifest.json", "tokenizer/*", "removed/*", "neighbors/*/rows.npy", "neighbors/*/neighbors.json")
FILES += tuple(f"shards/*/{name}" for name in ("tokens.npy", "chunks.npy", "keys.npy", "documents.parquet"))
FILES += tuple(f"index/*/{name}" for name in ("index.json", "faiss.index", "words.json", "idf-*.npy", "weights-*.npy"))
FILES += tuple(f"index/*/{name}.npy" for name in ("postings", "chunk_terms", "chunk_starts", "rows"))


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So that the files of a small store have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_SHIFT", 8)
        patch.setattr(checksums, "BLOCK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    texts = [words(40, seed) for seed in range(12)]
    store = make_store(tmp_path_factory.mktemp("damage"), texts, tokenizer, HashingEmbedder(), shard_chunks=60)
    store = remove_documents(store.path, ["d3"])
    build_index(store, "faiss")
    for kind in LEXICAL:
        build_lexical(store, kind)
    build_neighbors(store, 2)
    return store


def dense(store, kind):
    return open_index(store, kind).search(np.asarray(store.keys(np.asarray([1, 50]))), 3)


def lexical(store, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "POSTINGS", dict.fromkeys(("tfidf", "bm25"), 60))
        index = build_lexical(store, kind)
        queries = Queries(store.tokenizer, tokens=store.token_lists(np.asarray([7, 90])))
        return (*index.search(queries, 3), index.scores(queries, np.asarray([[1, 60], [0, -1]])))


READS = {
    "documents": lambda store: [store.document(row) for row in (0, 11)],
    "values": lambda store: (*store.values(np.asarray([4, 61]), 8), store.keys(np.asarray([5]))),
    "neighbors": lambda store: open_neighbors(store, k=1).rows[[3, 70]],
    "exact": lambda store: dense(store, "exact"),
    "faiss": lambda store: dense(store, "faiss"),
    **{kind: lambda store, kind=kind: lexical(store, kind) for kind in LEXICAL},
}


def test_a_turned_bit_misleads_nobody(store, tmp_path):
    draw, copy = np.random.default_rng(0), tmp_path / "store"
    answers = {name: repr(read(store)) for name, read in READS.items()}
    refused = 0
    for pattern in FILES:
        file = max(store.path.glob(pattern), key=lambda file: file.stat().st_size)
        shutil.copytree(store.path, copy)
        damaged, content = copy / file.relative_to(store.path), bytearray(file.read_bytes())
        place = draw.integers(len(content))
        content[place] ^= 1 << draw.integers(8)
        damaged.write_bytes(content)
        for name, read in READS.items():
            try:
                assert repr(read(Store.open(copy))) == answers[name], (file, place, name)
            except ValueError as error:
                assert "\n" not in str(error), (file, place, name)
                refused += 1
        for level in ("quick", "full"):
            if damaged.is_file() and damaged.read_bytes() == content:  # not built again
                with pytest.raises(ValueError, match="damaged|checksum|JSON"):
                    verify_store(Store.open(copy), level)
        shutil.rmtree(copy)
    assert refused > len(FILES)


def test_only_what_is_asked_for_is_compared(store, monkeypatch):
    """A search of rare words reads a part of a lexical index; documents of one group a part of their table."""
    monkeypatch.setattr(candidates, "LARGE", 0)
    index = build_lexical(Store.open(store.path), "bm25")
    segment = index.segments[0]
    arrays = (segment.postings, segment.chunk_terms)
    assert not any(array.file.is_sound for array in arrays)
    before = [array.file._is_checked.sum() for array in arrays]
    index.search(Queries(store.tokenizer, tokens=store.token_lists(np.asarray([7]))), 1)
    after = [array.file._is_checked.sum() for array in arrays]
    assert all(b < a for b, a in zip(before, after, strict=True))
    build_lexical(Store.open(store.path), "bm25:exact").search(
        Queries(store.tokenizer, texts=store.text(np.arange(9))), 5
    )
