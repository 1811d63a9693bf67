"""Ids seen before, against a set."""

import json

from hypothesis import given
from hypothesis import strategies as st

from retro.retrieval.building import ids as module
from retro.retrieval.building.ids import SeenIds
from tests.stand_ins import make_store, words

BATCHES = st.lists(st.lists(st.integers(0, 60).map(str), max_size=12), max_size=20)


@given(BATCHES)
def test_what_was_there_before_is_told_with_where(batches):
    seen, known = SeenIds(), {}
    for number, batch in enumerate(batches):
        expected = {}
        for place, name in enumerate(batch):
            if name in known:
                expected[place] = set(known[name])
            known.setdefault(name, set()).add(number)
        found = seen.add(batch, number)
        assert list(found) == list(expected)
        assert all(expected[place] <= numbers for place, numbers in found.items())
    assert len(seen) == sum(map(len, batches))


def test_few_runs_of_twelve_bytes_an_id():
    seen = SeenIds()
    for start in range(0, 20_000, 100):
        assert seen.add([str(number) for number in range(start, start + 100)], start) == {}
    assert len(seen._runs) < 10
    assert sum(hashes.nbytes + numbers.nbytes for hashes, numbers in seen._runs) == 12 * 20_000
    assert seen.add(["19999", "20000", "7"], -1) == {0: {19_900}, 2: {0}}


def test_ids_of_one_hash_are_told_apart(tmp_path, tokenizer, monkeypatch):
    real = module.document_hashes
    monkeypatch.setattr(module, "document_hashes", lambda names, seed: real(names, seed) % 3)
    store = make_store(tmp_path, [words(5, seed) for seed in range(12)], tokenizer)
    assert store.document_ids == [f"d{n}" for n in range(12)]
    assert json.loads((store.path / "manifest.json").read_text())["counts"]["kept"] == 12
