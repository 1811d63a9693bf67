"""A store is built without what its filters leave out, and says what that was."""

import json
from collections import Counter

import numpy as np
import pytest

from retro.retrieval import BuildSettings, Retriever, build_store
from retro.retrieval.filters import document_hashes
from tests.retrieval.filters.test_filters import EXPECTED, RECORDS
from tests.retrieval.filters.test_filters_duplicates import near_copy
from tests.stand_ins import HashingEmbedder, words, write_jsonl


def build(folder, records, tokenizer, name="store", **settings):
    given = dict(chunk_len=8, min_chunk_len=1, index="none", **settings)
    inputs = [write_jsonl(folder / f"{name}.jsonl", records)]
    return build_store(BuildSettings(str(folder / name), inputs, "words", **given), HashingEmbedder(), tokenizer)


def left_out(store):
    lines = (store.path / "rejects" / "filtered.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_filter_counts_under_its_name_and_lists_what_it_removed(tmp_path, tokenizer):
    copies = [{**RECORDS[4], "id": "copy"}, {**RECORDS[4], "id": "old copy", "date": "1999"}]
    records = [*RECORDS, *copies, {"id": "blank", "text": " "}, {"id": "bad"}]
    store = build(
        tmp_path,
        records,
        tokenizer,
        on_bad="reject",
        decontaminate=[write_jsonl(tmp_path / "test.jsonl", [{"id": "q", "text": words(40, 3)}])],
        decontaminate_by=["jaccard>=0.9", "longest_run>=20"],
        deduplicate="exact",
        min_date="2010",
        min_chars=20,
        quality=["score>=0.5"],
    )
    counts, found = store.manifest["counts"], left_out(store)
    assert store.document_ids == ["good"]
    assert {name: counts[name] for name in ("read", "kept", "empty", "filtered", "rejected")} == {
        "read": 11,
        "kept": 1,
        "empty": 1,
        "filtered": 8,
        "rejected": 1,
    }
    expected = {**EXPECTED, "copy": "deduplicate", "old copy": "date"}
    assert {record["document_id"]: record["filter"] for record in found} == expected
    assert counts["filtered_by"] == Counter(expected.values()) and sum(counts["filtered_by"].values()) == 8
    assert [record["place"] for record in found] == [f"store.jsonl:{n}" for n in (1, 2, 3, 4, 6, 7, 8, 9)]
    by_id = {record["document_id"]: record for record in found}
    assert by_id["copy"]["kept_id"] == "good" and by_id["test"]["held_out_id"] == "q"
    assert by_id["short"]["chars"] == 2 and by_id["poor"]["value"] == 0.1 and by_id["old"]["date"] == "2001"


@pytest.mark.parametrize("by", ["exact", "minhash"])
def test_a_store_of_half_copies_keeps_the_first_of_each(by, tmp_path, tokenizer):
    draw = np.random.default_rng(4)
    texts = [words(200, seed, vocabulary=100) for seed in range(12)]
    order = draw.permutation(np.repeat(np.arange(12), 2)).tolist()
    seen, records = set(), []
    for n, i in enumerate(order):
        text = near_copy(texts[i], 1, draw) if by == "minhash" and i in seen else texts[i]
        seen.add(i)
        records.append({"id": f"d{n}", "text": text})
    store = build(tmp_path, records, tokenizer, deduplicate=by)
    assert store.document_ids == [f"d{order.index(i)}" for i in sorted(range(12), key=order.index)]
    assert {r["document_id"]: r["kept_id"] for r in left_out(store)} == {
        f"d{n}": f"d{order.index(i)}" for n, i in enumerate(order) if order.index(i) != n
    }
    if by == "exact":
        plain = build(tmp_path, records, tokenizer, "whole")
        found = Retriever(plain, "exact", HashingEmbedder(), deduplicate=True)(store.text(np.arange(3)), 10).ids
        assert all(len(np.unique(plain.chunks(line), axis=0)) == 10 for line in found)


def test_shares_of_stores_are_nested_and_those_of_a_query(tmp_path, tokenizer):
    records = [{"id": f"document {i}", "text": words(9, i)} for i in range(60)]
    stores = {p: build(tmp_path, records, tokenizer, f"s{p}", subsample=(p, 7)) for p in (0.3, 0.6)}
    whole, hashes = build(tmp_path, records, tokenizer), document_hashes([r["id"] for r in records], 7)
    for share, store in stores.items():
        chosen = [record["id"] for record, value in zip(records, hashes.tolist(), strict=True) if value < share * 2**64]
        assert store.document_ids == chosen
        found = Retriever(whole, "exact", HashingEmbedder(), subsample=(share, 7))(["w1"], whole.num_chunks)
        assert {source.document_id for source in found.sources[0] if source} == set(chosen)
    assert set(stores[0.3].document_ids) < set(stores[0.6].document_ids)


def test_other_filters_make_another_store(tmp_path, tokenizer):
    build(tmp_path, RECORDS, tokenizer, min_date="2010")
    assert build(tmp_path, RECORDS, tokenizer, min_date="2010").document_ids
    for changed in ({"min_date": "2011"}, {}, {"min_date": "2010", "undated": "keep"}):
        with pytest.raises(ValueError, match="min_date|undated"):
            build(tmp_path, RECORDS, tokenizer, **changed)
    with pytest.raises(ValueError, match="hold no document with text .* 7 filtered"):
        build(tmp_path, RECORDS, tokenizer, "none", min_date="2030")
    assert not (tmp_path / "none").exists()
