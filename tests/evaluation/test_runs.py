"""Rankings: files of TREC and BEIR, and the measures against figures by hand."""

import json

import numpy as np
import pytest

from retro.cli import main
from retro.evaluation.tasks.runs import ranking_measures, read_qrels, read_queries, write_run
from tests.stand_ins import make_store, words

RUN = {"q1": {"d3": 3.0, "d1": 2.0, "d2": 1.0}, "q2": {"d9": 1.0}}


def test_measures_by_hand():
    """q1 finds d1 (grade 2) second and d2 (grade 1) third of d1, d2, d4; q2 finds nothing right; q3 was not found."""
    pytest.importorskip("ir_measures")
    qrels = {"q1": {"d1": 2, "d2": 1, "d4": 1}, "q2": {"d8": 1}, "q3": {"d1": 1}}
    found = {name: one["value"] for name, one in ranking_measures(qrels, RUN, [1, 3]).items()}
    gain, best = 2 / np.log2(3) + 1 / np.log2(4), 2 + 1 / np.log2(3) + 1 / np.log2(4)
    expected = {"nDCG@10": gain / best / 3, "RR@10": 0.5 / 3, "R@1": 0.0, "R@3": 2 / 3 / 3}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.jsonl", '{"_id": "a", "text": "w1 w2", "metadata": {}}\n{"_id": "b", "text": "w3"}\n'),
        ("q.json", '[{"id": "a", "question": "w1 w2"}, {"id": "b", "text": "w3"}]'),
        ("q.tsv", "a\tw1 w2\nb\tw3\n"),
    ],
)
def test_queries(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_queries(tmp_path / name) == [("a", "w1 w2"), ("b", "w3")]


def test_files_of_runs_and_judgements(tmp_path):
    write_run(tmp_path / "run.txt", RUN, "bm25")
    assert (tmp_path / "run.txt").read_text().splitlines()[1] == "q1 Q0 d1 2 2 bm25"
    write_run(tmp_path / "run.json", RUN)
    assert json.loads((tmp_path / "run.json").read_text()) == RUN
    with pytest.raises(ValueError, match="cannot hold ids with a space"):
        write_run(tmp_path / "run.txt", {"q": {"d 1": 1.0}})
    for content in ("q1 0 d1 2\nq1 0 d2 0\n", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"):
        (tmp_path / "qrels").write_text(content)
        assert read_qrels(tmp_path / "qrels") == {"q1": {"d1": 2, "d2": 0}}
    (tmp_path / "qrels").write_text("q1 d1\n")
    with pytest.raises(ValueError, match="line 1: 'q1 d1' is no judgement"):
        read_qrels(tmp_path / "qrels")
    with pytest.raises(ValueError, match="holds 2 queries under 1 ids"):
        (tmp_path / "q.tsv").write_text("a\tw1\na\tw2\n")
        read_queries(tmp_path / "q.tsv")


def test_the_commands(tmp_path, words_tokenizer, capsys):
    """Each document is the nearest to its own text, in a search of many queries and in the measures."""
    pytest.importorskip("ir_measures")
    words_tokenizer.save_pretrained(tmp_path / "tok")
    texts = [words(12, seed) for seed in range(5)]
    store = make_store(tmp_path, texts, words_tokenizer, chunk_len=16)
    queries = "".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "q.jsonl").write_text(queries)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(5)))
    searched = ["--queries", str(tmp_path / "q.jsonl"), "--index", "tfidf", "--k", "2"]
    files = ["--run", str(tmp_path / "new" / "run.trec"), "--json", str(tmp_path / "found.json")]
    assert main(["search", str(store.path), *searched, *files]) == 0
    lines = (tmp_path / "new" / "run.trec").read_text().splitlines()
    assert [line.split()[:4] for line in lines if line.split()[3] == "1"] == [
        [f"q{n}", "Q0", f"d{n}", "1"] for n in range(5)
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["measure"] == "TF-IDF" and found["queries"][3]["neighbors"][0]["document_id"] == "d3"
    assert "== q3: " in capsys.readouterr().out
    asked = ["--data", str(tmp_path / "q.jsonl"), "--qrels", str(tmp_path / "qrels.tsv"), "--ks", "1"]
    asked += ["--store", str(store.path), "--index", "tfidf", "--json", str(tmp_path / "recall.json")]
    assert main(["task", "recall", *asked]) == 0
    measured = json.loads((tmp_path / "recall.json").read_text())["recall"]["tfidf"]["by_document"]
    assert {name: one["value"] for name, one in measured.items()} == {"nDCG@10": 1.0, "RR@10": 1.0, "R@1": 1.0}
    assert "nDCG@10" in capsys.readouterr().out
    assert main(["search", str(store.path)]) == 2 and "give a text to search for" in capsys.readouterr().err
