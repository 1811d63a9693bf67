"""Verification finds what opening does not, and names it."""

import json
import shutil

import numpy as np
import pytest

from retro.common.files import file_record
from retro.common.records import load_record, save_record
from retro.retrieval import Store, build_neighbors, compact, remove_documents, verify_store
from retro.retrieval.embedding.embedder import NoEmbedder
from retro.retrieval.search.searchers import open_searcher
from tests.stand_ins import HashingEmbedder, make_store, words


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    texts = [words(n, seed) for seed, n in enumerate((3, 7, 1, 4, 20, 2, 8, 16))]
    store = make_store(tmp_path_factory.mktemp("verify"), texts, tokenizer, shard_chunks=5)
    open_searcher(store, "tfidf+bm25", build=True)
    build_neighbors(store, 2)
    return store


@pytest.fixture
def path(built, tmp_path):
    return shutil.copytree(built.path, tmp_path / "copy")


def change_shard(path, name, change, number=2):
    """Change one file of a shard, and its record in the manifest with it, as a wrong writer would."""
    file, manifest = path / "shards" / f"{number:05d}" / name, load_record(path / "manifest.json")
    array = np.load(file)
    change(array)
    np.save(file, array)
    manifest["shards"][number]["files"][name] = file_record(file)
    save_record(path / "manifest.json", manifest)
    return manifest["shards"][number]["first_row"]


def test_a_whole_store(path):
    store = Store.open(path)
    quick, full = verify_store(store, "quick"), verify_store(store, "full", embed=5, embedder=HashingEmbedder())
    assert (quick["documents"], quick["chunks"], quick["files"]) == (8, store.num_chunks, full["files"])
    assert full["files"] > 4 * len(store.shards) and full["embedded"] == 5 and full["largest_difference"] < 1e-5
    remove_documents(path, ["d1", "d4"])
    after = verify_store(Store.open(path), "full", embed=100, embedder=HashingEmbedder())
    assert (after["documents"], after["removed_documents"], after["generation"]) == (6, 2, 2)
    assert after["embedded"] == after["chunks"] < store.num_chunks


@pytest.mark.parametrize("column", ["document", "position", "length"])
def test_chunks_that_do_not_fit_their_documents(path, column):
    def change(chunks):
        chunks[column][2] += 1

    row = change_shard(path, "chunks.npy", change) + 2
    with pytest.raises(ValueError, match=f"shards/00002/chunks.npy: row {row} has {column} "):
        verify_store(Store.open(path), "full")


def test_a_removed_list_that_does_not_fit_its_documents(path):
    remove_documents(path, ["d1", "d4"])
    manifest, file = load_record(path / "manifest.json"), path / "removed" / "00002.npy"
    removed = np.load(file)
    removed[0, 1] += 1
    np.save(file, removed)
    manifest["removed"] |= file_record(file)
    save_record(path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="00002.npy has other chunks for document row 1 "):
        verify_store(Store.open(path), "full")


@pytest.mark.parametrize("place", ["shards/*/keys.npy", "tokenizer/*", "index/*/*.npy", "neighbors/*/*.npy"])
def test_a_changed_byte_anywhere_is_found(path, place):
    file = next(file for file in sorted(path.glob(place)) if file.stat().st_size > 130)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.parent.name}/{file.name} is damaged"):
        verify_store(Store.open(path), "full")


def test_keys_that_are_not_finite(path):
    def change(keys):
        keys[3, 1] = np.nan

    row = change_shard(path, "keys.npy", change) + 3
    verify_store(Store.open(path), "quick")
    with pytest.raises(ValueError, match=f"the key of row {row} of .* is not finite"):
        verify_store(Store.open(path), "full")


def test_keys_of_other_chunks_are_found_by_embedding_again(path):
    def exchange(keys):
        keys[[2, 4]] = keys[[4, 2]]

    row = change_shard(path, "keys.npy", exchange) + 2
    assert verify_store(Store.open(path), "full")["embedded"] == 0
    with pytest.raises(ValueError, match=f"the key of row {row} of .* is not that of its text"):
        verify_store(Store.open(path), "quick", embed=1000, embedder=HashingEmbedder())
    with pytest.raises(ValueError, match="come from the embedder hashing"):
        verify_store(Store.open(path), "quick", embed=1, embedder=HashingEmbedder(name="other"))


def test_a_store_that_changes_meanwhile(path):
    """A missing file of a generation that is no more is no damage."""
    remove_documents(path, ["d1"])
    old = Store.open(path)
    compact(path)
    with pytest.raises(ValueError, match="was changed while it was checked; run this again"):
        verify_store(old, "full")
    assert verify_store(Store.open(path), "full")["documents"] == 7


def test_what_is_asked_wrongly(path):
    with pytest.raises(ValueError, match="level must be one of quick, full, not 'deep'"):
        verify_store(Store.open(path), "deep")
    with pytest.raises(ValueError, match="embed must be at least 0, not -1"):
        verify_store(Store.open(path), "full", embed=-1)


def test_no_keys_are_not_compared(tmp_path, tokenizer):
    store = make_store(tmp_path, ["w1 w2"], tokenizer, NoEmbedder())
    assert verify_store(store, "full")["embedded"] == 0
    with pytest.raises(ValueError, match="no keys to compare; leave embed out"):
        verify_store(store, "full", embed=1)


def test_the_command(path, tmp_path, capsys):
    from retro.cli import main

    assert main(["verify", str(path), "--full", "--json", str(tmp_path / "out.json")]) == 0
    assert "is whole: 8 documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["level"] == "full"
    (path / "shards/00001/keys.npy").unlink()
    assert main(["verify", str(path)]) == 2
    assert "00001/keys.npy is missing" in capsys.readouterr().err
