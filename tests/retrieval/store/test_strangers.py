"""A store from a stranger: no name and no link in it leads a reader, a writer or a server out of its folder."""

import shutil
from copy import deepcopy

import pytest

from retro.common.files import file_record
from retro.common.records import load_record, save_record
from retro.retrieval import (
    Retriever,
    Store,
    add_documents,
    build_index,
    build_neighbors,
    compact,
    remove_documents,
    verify_store,
)
from retro.retrieval.remote.client import RemoteStore
from retro.retrieval.remote.server import create_retrieval_app
from retro.retrieval.search.lexical import build_lexical
from tests.stand_ins import HashingEmbedder, make_store, words, write_jsonl

SECRET = b"not ours to touch"


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    store = make_store(tmp_path_factory.mktemp("built"), [words(9, seed) for seed in range(6)], tokenizer)
    build_lexical(store, "tfidf")
    build_neighbors(store, 2)
    return remove_documents(store.path, ["d1"])


@pytest.fixture
def path(built, tmp_path):
    return shutil.copytree(built.path, tmp_path / "store")


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    return tmp_path / "outside"


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


PLACES = {
    "shard": lambda m, name: m["shards"][0].update(name=name),
    "shard's file": lambda m, name: m["shards"][0]["files"].update({name: m["shards"][0]["files"]["keys.npy"]}),
    "removed": lambda m, name: m["removed"].update(file=name),
    "tokenizer": lambda m, name: m["tokenizer"]["files"].update({name: {"bytes": len(SECRET), "xxh3": "AAAAAAAAAAA="}}),
    "rejects": lambda m, name: m["rejects"].update({name: {"bytes": len(SECRET), "xxh3": "AAAAAAAAAAA="}}),
}


NAMES = ("../outside/secret", "/etc/passwd", "..\\secret", "a/./b", "a//b", "", "C:x", "a\0b", "a\nb", "..")


@pytest.mark.parametrize("place", PLACES)
def test_names_that_lead_out(path, outside, place):
    sound = load_record(path / "manifest.json")
    for name in NAMES:
        manifest = deepcopy(sound)
        PLACES[place](manifest, name)
        save_record(path / "manifest.json", manifest)
        for action in (Store.open, compact):
            with pytest.raises(ValueError, match="manifest.json"):
                action(path)
    assert contents(outside) == {"secret": SECRET}


@pytest.mark.parametrize("record", ["index/{}/index.json", "neighbors/{}/neighbors.json"])
def test_names_in_other_records(path, outside, record):
    (file,) = path.glob(record.format("*")) if "neighbors" in record else list(path.glob(record.format("*")))[:1]
    value = load_record(file)
    value["files"]["../../../outside/secret"] = file_record(outside / "secret")
    save_record(file, value)
    with pytest.raises(ValueError, match="no plain name"):
        verify_store(Store.open(path), level="full")


WRITERS = {
    "compact": lambda path: compact(path, index=False),
    "add": lambda path: add_documents(path, [new_document(path)], HashingEmbedder(), index=False),
    "remove": lambda path: remove_documents(path, ["d2"], index=False),
}


def new_document(path):
    return write_jsonl(path.with_name("new.jsonl"), [{"id": "new", "text": words(9, 99)}])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["index", "neighbors", "shards", "removed", "rejects", "tokenizer", "parts"])
def test_own_folders_that_are_links(path, outside, writer, name):
    if (path / name).exists():
        shutil.copytree(path / name, outside / name)
        shutil.rmtree(path / name)
    (outside / name).mkdir(exist_ok=True)
    (path / name).symlink_to(outside / name)
    before = contents(outside)
    with pytest.raises(ValueError, match="is a link or lies behind one"):
        WRITERS[writer](path)
    assert contents(outside) == before


@pytest.mark.parametrize("name", [".lock", "shards/00001", "index/0123456789abcdef", "rejects/00009/filtered.jsonl"])
def test_links_inside(path, outside, name):
    target = outside / "secret" if "." in name else outside
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(target)
    with pytest.raises(ValueError, match="is a link or lies behind one"):
        compact(path)
    assert contents(outside) == {"secret": SECRET}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("index", lambda store: build_lexical(store, "bm25")),
        ("index", lambda store: build_index(store, "faiss")),
        ("neighbors", lambda store: build_neighbors(store, 1)),
    ],
)
def test_what_searches_write(path, outside, name, write):
    pytest.importorskip("faiss")
    shutil.rmtree(path / name)
    (path / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link or lies behind one"):
        write(Store.open(path))
    assert contents(outside) == {"secret": SECRET}


def test_compact_leaves_what_is_not_ours(path):
    for name in ("index/mine", "neighbors/mine", "shards/mine", "rejects/1st", "removed/mine"):
        (path / name).mkdir(parents=True)
        (path / name / "index.json").write_text("{}")
    (path / "removed/1st.npy").write_bytes(SECRET)
    compact(path, index=False)
    assert {file for file in contents(path) if "mine" in file or "1st" in file} == {
        *(f"{name}/mine/index.json" for name in ("index", "neighbors", "shards", "removed")),
        *("rejects/1st/index.json", "removed/1st.npy"),
    }
    assert not list(path.glob("removed/[0-9]*[0-9].npy"))


def test_a_server_hands_out_no_link(path, outside):
    (path / "tokenizer/more.txt").symlink_to(outside / "secret")
    manifest = load_record(path / "manifest.json")
    manifest["tokenizer"]["files"]["more.txt"] = file_record(outside / "secret")
    save_record(path / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"more\.txt is a link"):
        create_retrieval_app(Retriever(Store.open(path), "tfidf"))


def test_a_server_of_a_stranger(built, tmp_path):
    class Server:
        url = "http://stranger"

        def ask(self, *asked):
            raise AssertionError("nothing is asked for")

    store = RemoteStore.__new__(RemoteStore)
    store.path, store._server = Server.url, Server()
    store.manifest = {"tokenizer": {"files": {"../outside": {"sha256": "?"}}}}
    with pytest.raises(ValueError, match="no plain name"):
        store.tokenizer  # noqa: B018
