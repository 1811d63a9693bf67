"""What a store gives back, against a naive loop; what it refuses to open."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.common.files import file_record
from retro.common.records import load_record, save_record
from retro.retrieval import Store, remove_documents, verify_store
from retro.retrieval.store.format import SHARD_FILES, narrow_keys, widen_keys
from tests.stand_ins import HashingEmbedder, make_store, words

LENGTHS = (3, 7, 1, 4, 20, 2, 8, 16)  # words; a document has one token more (eos)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    texts = [words(n, seed) for seed, n in enumerate(LENGTHS)]
    return make_store(tmp_path_factory.mktemp("store"), texts, tokenizer, shard_chunks=5)


@pytest.fixture
def copy(store, tmp_path):
    """A copy of the store that a test may damage."""
    return shutil.copytree(store.path, tmp_path / "copy")


def naive_documents(store):
    """Token ids of every document, tokenized anew."""
    return [
        [*store.tokenizer(words(n, seed))["input_ids"], store.tokenizer.eos_token_id] for seed, n in enumerate(LENGTHS)
    ]


def naive_rows(store):
    return [(doc, start) for doc, ids in enumerate(naive_documents(store)) for start in range(0, len(ids), 4)]


def test_several_shards_and_contiguous_rows(store):
    assert len(store.manifest["shards"]) > 2
    assert store.num_chunks == len(naive_rows(store)) and store.num_documents == len(LENGTHS)
    rows = np.arange(store.num_chunks)
    assert store.document_rows(rows).tolist() == [doc for doc, _ in naive_rows(store)]
    assert store.positions(rows).tolist() == [start // 4 for _, start in naive_rows(store)]


@pytest.fixture(scope="module", params=["several shards", "one shard", "removed"])
def stored(request, store, tokenizer, tmp_path_factory):
    """A store of the same documents, and which of them were removed."""
    folder = tmp_path_factory.mktemp("stored")
    if request.param == "one shard":
        return make_store(folder, [words(n, seed) for seed, n in enumerate(LENGTHS)], tokenizer), ()
    if request.param == "removed":
        return remove_documents(shutil.copytree(store.path, folder / "store"), ["d1", "d4"]), (1, 4)
    return store, ()


@settings(max_examples=50)
@given(data=st.data(), retrieved_len=st.integers(1, 13))
def test_values_against_a_naive_loop(stored, data, retrieved_len):
    store, removed = stored
    rows = np.array(data.draw(st.lists(st.integers(-1, store.num_chunks - 1), min_size=6, max_size=6))).reshape(3, 2)
    ids, mask = store.values(rows, retrieved_len)
    assert ids.shape == mask.shape == (3, 2, retrieved_len)
    documents, places = naive_documents(store), naive_rows(store)
    for index in np.ndindex(3, 2):
        doc, start = places[rows[index]]
        expected = documents[doc][start : start + retrieved_len] if rows[index] >= 0 and doc not in removed else []
        expected = expected[: -(-retrieved_len // 4) * 4]
        assert ids[index][mask[index]].tolist() == expected
        assert mask[index].tolist() == [i < len(expected) for i in range(retrieved_len)]
        assert (ids[index][~mask[index]] == store.pad_token_id).all()


def test_values_of_no_rows(stored):
    for shape in ((0,), (0, 3), (2, 0)):
        ids, mask = stored[0].values(np.zeros(shape, np.int64), 5)
        assert ids.shape == mask.shape == (*shape, 5) and (ids.dtype, mask.dtype) == (np.int64, bool)


def test_chunks_and_lens(store):
    documents = naive_documents(store)
    for row, (doc, start) in enumerate(naive_rows(store)):
        expected = documents[doc][start : start + 4]
        assert store.chunk_lens(np.array(row)) == len(expected)
        assert store.chunks(np.array([row]))[0].tolist() == expected + [store.pad_token_id] * (4 - len(expected))
    assert store.chunks(np.zeros((2, 3), int)).shape == (2, 3, 4)


def test_continuation_ends_with_its_document(store):
    last = store.document_spans[0]
    assert last.tolist() == [0, 1]  # 3 words and eos: one full chunk, F empty
    assert store.values(np.array([0]), 8)[1].tolist() == [[True] * 4 + [False] * 4]


def test_documents(store):
    record = store.document(4)
    assert (record.id, record.title, record.source, record.num_tokens) == ("d4", "title 4", "here", 21)
    assert (record.first_row, record.num_chunks) == tuple(store.document_spans[4])
    assert record.num_bytes == len(words(20, 4).encode())
    with pytest.raises(ValueError, match="document row 8 is outside"):
        store.document(8)


def test_keys_are_those_of_the_decoded_text(store):
    rows = np.array([[5, 0], [9, 5]])
    expected = HashingEmbedder().embed(store.text(rows)).reshape(2, 2, -1)
    np.testing.assert_allclose(store.keys(rows), expected, atol=1e-6)
    np.testing.assert_array_equal(store.key_block(2, 11), store.keys(np.arange(2, 11)))


def test_rows_outside_are_refused(store):
    with pytest.raises(ValueError, match="row 99 is outside"):
        store.chunks(np.array([0, 99]))
    with pytest.raises(ValueError, match="row -1 is outside"):
        store.keys(np.array([-1]))


def test_float16_is_widened_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(widen_keys(every[None], "float16")[0], every.astype(np.float32))
    finite = every[np.isfinite(every)]
    assert widen_keys(finite[None], "float16").tobytes() == finite.astype(np.float32).tobytes()  # -0 too


def test_bfloat16_rounds_to_nearest():
    import torch

    keys = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    narrow = narrow_keys(keys, "bfloat16")
    expected = torch.from_numpy(keys).bfloat16()
    np.testing.assert_array_equal(widen_keys(narrow, "bfloat16"), expected.float().numpy())


def test_moved_and_read_only(store, tmp_path):
    moved = shutil.copytree(store.path, tmp_path / "elsewhere" / "moved")
    for file in moved.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    again = Store.open(moved)
    assert again.fingerprint == store.fingerprint
    verify_store(again, "full")
    assert len(again.tokenizer) == len(store.tokenizer)


def test_nothing_inside_is_absolute_or_pickled(store):
    for file in store.path.rglob("*"):
        if file.suffix == ".json":
            assert str(store.path.parent) not in file.read_text()
    assert not [file for file in store.path.rglob("*") if file.suffix in (".pkl", ".pt", ".bin")]


@pytest.mark.parametrize("name", ["tokens.npy", "chunks.npy", "documents.parquet", "keys.npy"])
def test_missing_shard_file_is_named(copy, name):
    (copy / "shards" / "00001" / name).unlink()
    with pytest.raises(ValueError, match=f"00001/{name} is missing"):
        Store.open(copy)


@pytest.mark.parametrize("name", ["tokens.npy", "chunks.npy", "documents.parquet", "keys.npy"])
def test_cut_and_damaged_shard_files_are_named(copy, name):
    file = copy / "shards" / "00001" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"00001/{name} is damaged"):
        Store.open(copy)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"00001/{name} has {len(content) - 1} bytes, but {len(content)}"):
        Store.open(copy)


def test_permuted_folders_are_named_at_opening(copy):
    """Two shards of the same sizes, so that only their content tells them apart."""
    twins = make_store(
        copy.parent, [words(3, seed) for seed in range(4)], Store.open(copy).tokenizer, name="twins", shard_chunks=2
    )
    one, two = twins.path / "shards" / "00000", twins.path / "shards" / "00001"
    assert [(one / name).stat().st_size for name in SHARD_FILES] == [
        (two / name).stat().st_size for name in SHARD_FILES
    ]
    one.rename(twins.path / "aside")
    two.rename(one)
    (twins.path / "aside").rename(two)
    with pytest.raises(ValueError, match="shards/00000/.* is damaged"):
        Store.open(twins.path)


@pytest.mark.parametrize(
    "change, named", [("permute", "00001"), ("drop first", "00001"), ("drop last", "counts"), ("drop all", "counts")]
)
def test_permuted_and_dropped_records_are_named(copy, change, named):
    manifest = load_record(copy / "manifest.json")
    shards = manifest["shards"]
    manifest["shards"] = {
        "permute": [shards[1], shards[0], *shards[2:]],
        "drop first": shards[1:],
        "drop last": shards[:-1],
        "drop all": [],
    }[change]
    save_record(copy / "manifest.json", manifest)
    with pytest.raises(ValueError, match=f"manifest.json (puts shard )?{named}.*restore the manifest"):
        Store.open(copy)


def test_dropped_folder_is_named(copy):
    shutil.rmtree(copy / "shards" / "00001")
    with pytest.raises(ValueError, match="shards/00001/.* is missing"):
        Store.open(copy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("hard", [False, True])
def test_more_shards_than_a_process_may_open_files(tmp_path, tokenizer, hard):
    """The limit is raised as far as the system allows; beyond that the remedy is named."""
    import resource

    path = make_store(tmp_path, [words(3, seed) for seed in range(40)], tokenizer, shard_chunks=1).path
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        limit = len(os.listdir("/dev/fd")) + 50
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit if hard else limit + 1000))
        try:
            os.write(writing, str(Store.open(path).num_chunks).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reading, 1000).decode()
    assert ("ValueError" in said and "40 shards of 4 files" in said and "ulimit -n" in said) if hard else said == "40"


def test_document_tables_are_not_all_kept(store, monkeypatch):
    from retro.retrieval.store import documents as documents_module

    monkeypatch.setattr(documents_module, "_KEPT_BYTES", 0)
    monkeypatch.setattr(documents_module, "_KEPT_GROUPS", 1)
    again = Store.open(store.path)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(LENGTHS)), 3))
    assert [again.document(row).id for row in order] == [f"d{row}" for row in order]
    assert len(again._tables) == 1 and len(again._table_groups) == 1


def test_objects_are_not_unpickled(copy):
    """A file that holds a pickle is refused, though size, ends and checksum are the recorded ones."""
    file, manifest = copy / "shards" / "00001" / "chunks.npy", load_record(copy / "manifest.json")
    np.save(file, np.array([{"code": "runs"}], object), allow_pickle=True)
    manifest["shards"][1]["files"][file.name] = file_record(file)
    save_record(copy / "manifest.json", manifest)
    with pytest.raises(ValueError, match="00001/chunks.npy cannot be read .*pickled"):
        Store.open(copy)


def test_not_a_store(tmp_path, copy):
    with pytest.raises(ValueError, match="is not a datastore"):
        Store.open(tmp_path / "none")
    with pytest.raises(ValueError, match="http://host:8001 is the address of a server; name the folder"):
        Store.open("http://host:8001")
    manifest = copy / "manifest.json"
    save_record(manifest, load_record(manifest) | {"format_version": 99})
    with pytest.raises(ValueError, match="format version 99"):
        Store.open(copy)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        Store.open(copy)


def test_opening_reads_no_table(store, monkeypatch):
    """Neither documents nor chunks are read to open a store, count it or know one shard's searchable rows."""
    import pyarrow.parquet as pq

    monkeypatch.setattr(pq, "ParquetFile", lambda *args, **kwargs: pytest.fail("a document table is read"))
    again = Store.open(store.path)
    assert again.num_searchable == again.num_chunks == again.num_live_chunks and again.num_live_documents == len(
        LENGTHS
    )
    assert again.searchable_in(3, 9).tolist() == list(range(3, 9))
    assert "searchable_rows" not in vars(again)


@pytest.mark.parametrize("min_chunk_len", [1, 2, 4])
def test_searchable_rows_by_range_and_number(tmp_path, tokenizer, min_chunk_len):
    texts = [words(n, seed) for seed, n in enumerate(LENGTHS)]
    store = make_store(tmp_path, texts, tokenizer, shard_chunks=5, min_chunk_len=min_chunk_len)
    expected = [row for row in range(store.num_chunks) if store.chunk_lens(np.array(row)) >= min_chunk_len]
    by_range = [store.searchable_in(start, start + 3) for start in range(0, store.num_chunks, 3)]
    assert np.concatenate(by_range).tolist() == expected and store.num_searchable == len(expected)
    assert store.searchable_rows.tolist() == expected
    assert store.searchable_in(2, 7).tolist() == [row for row in expected if 2 <= row < 7]


def test_shard_fingerprints_are_of_the_content_alone(store, tmp_path, tokenizer):
    texts = [words(n, seed) for seed, n in enumerate(LENGTHS)]
    again = make_store(tmp_path, texts, tokenizer, shard_chunks=5)
    found = [again.shard_fingerprint(number) for number in range(len(again.shards))]
    assert found == [store.shard_fingerprint(number) for number in range(len(store.shards))]
    assert len(set(found)) == len(found)


def test_find_documents(store):
    assert store.find_documents(["d7", "nobody", "d0"]) == {"d0": 0, "d7": 7}
    assert store.find_documents(["d7"], removed=True) == {}


def test_another_tokenizer_or_embedder_is_refused(store):
    from tests.text.test_chunks import byte_level

    store.check_tokenizer(store.tokenizer)
    with pytest.raises(
        ValueError, match="was built with the tokenizer words .* not with (PreTrainedTokenizerFast|Tokenizers)"
    ):
        store.check_tokenizer(byte_level())
    store.check_embedder(HashingEmbedder())
    with pytest.raises(ValueError, match="hashing.* not from other .*dim: 16 in the store, 8 given"):
        store.check_embedder(HashingEmbedder(8, "other"))
