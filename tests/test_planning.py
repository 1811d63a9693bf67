"""Plans: every forecast against what is really there, refusals in one sentence."""

import gzip
import json

import numpy as np
import pytest
from transformers import LlamaConfig

from retro.cli import main
from retro.planning import SHARD_CHUNKS, PlanSettings, disk_bytes, flops_of_chunk, index_plan, make_plan, model_size
from retro.retrieval import BuildSettings, build_index, build_neighbors, build_store, load_embedder, verify_store
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.hardness import Cost, Growth, Power
from retro.text.estimate import estimate_corpus
from tests.stand_ins import make_store, words, write_jsonl


@pytest.fixture(scope="module")
def texts():
    return [words(3 + i % 90, seed=i) for i in range(400)]


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16"])
def test_disk_is_what_a_build_writes(texts, words_tokenizer, tmp_path, key_dtype):
    store = make_store(tmp_path, texts, words_tokenizer, chunk_len=8, key_dtype=key_dtype)
    table = build_neighbors(store, 2)
    estimate = estimate_corpus([str(tmp_path / "store.jsonl")], words_tokenizer, chunk_len=8)
    corpus = {"documents": estimate.documents, "chunks": estimate.chunks}
    planned, _ = disk_bytes(corpus, estimate, 8, 2, 16 * (4 if key_dtype == "float32" else 2))
    (shard,) = store.manifest["shards"]
    files = {name: file["bytes"] for name, file in shard["files"].items()}
    assert planned["tokens"] == files["tokens.npy"]
    assert planned["chunk_table"] == pytest.approx(files["chunks.npy"], abs=64)  # its header names three fields
    assert planned["keys"] == files["keys.npy"]
    assert planned["document_table"] == pytest.approx(files["documents.parquet"], rel=0.25)
    assert planned["neighbors"] == sum(file["bytes"] for file in table.record["files"].values())
    assert planned["manifest"] == pytest.approx((store.path / "manifest.json").stat().st_size, rel=0.6)


def test_a_sample_of_everything_is_exact(texts, words_tokenizer, tmp_path):
    store = make_store(tmp_path, texts, words_tokenizer, chunk_len=8)
    found = estimate_corpus([str(tmp_path / "store.jsonl")], words_tokenizer, chunk_len=8)
    counts = store.manifest["counts"]
    assert (found.documents, found.chunks, found.share) == (store.num_documents, store.num_chunks, 1.0)
    assert (found.tokens, found.bytes) == (counts["tokens"], counts["bytes"])
    assert len(found.chunk_ids) == store.num_chunks


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet"])
def test_a_part_stands_for_all(words_tokenizer, tmp_path, name):
    texts = [words(200 + i % 100, seed=i) for i in range(1500)]
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=100)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    size = (tmp_path / name).stat().st_size
    found = estimate_corpus([str(tmp_path / name)], words_tokenizer, read_bytes=size // 3, tokenized_bytes=100_000)
    assert sum(len(d.text) for d in found.documents_read) <= 100_000 and found.share == pytest.approx(1 / 3, abs=0.01)
    assert found.documents == pytest.approx(1500, rel=0.03)
    assert found.bytes == pytest.approx(sum(map(len, texts)), rel=0.03)
    chunks = sum(-(-(len(text.split()) + 1) // 64) for text in texts)
    assert found.chunks == pytest.approx(chunks, rel=0.03)


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_of_many_files_all_or_some_are_read(words_tokenizer, tmp_path, ending):
    for number in range(200):
        texts = [words(50, seed=30 * number + i) for i in range(30)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts) if ending == "jsonl" else " ".join(texts)
        (tmp_path / f"{number:03}.{ending}").write_text(lines)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    found = estimate_corpus([str(tmp_path)], words_tokenizer, read_bytes=total // 4)
    assert found == estimate_corpus([str(tmp_path)], words_tokenizer, read_bytes=total // 4)
    assert found.documents == pytest.approx(6000 if ending == "jsonl" else 200, rel=0.03)
    assert 0.2 < found.share < 0.35


TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=200)


def test_operations_of_a_chunk_are_those_of_the_formula(words_tokenizer, tmp_path):
    """2 t x weights of matrices + 4 t^2 x width x layers, of texts of one length. Source: Kaplan et al. 2020."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path)
    words_tokenizer.save_pretrained(tmp_path)
    embedder, tokens = load_embedder(str(tmp_path)), 17
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 48)
    chunks = [words_tokenizer(words(tokens, seed))["input_ids"] for seed in range(5)]
    read = len(embedder.tokenizer(words(tokens))["input_ids"])
    pooler = 2 * 32 * 32  # once a text
    assert flops_of_chunk(embedder, words_tokenizer, chunks) == 2 * read * weights + 4 * read**2 * 32 * 3 + pooler


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    from benchmarks.synthetic import write_synthetic_store

    return write_synthetic_store(tmp_path_factory.mktemp("made") / "store", 4000, 16, "float16", shard_chunks=1500)


@pytest.mark.parametrize("kind", ["scann:brute", "scann:ah", "scann:ah-int8", "faiss:ivf-sq8", "faiss:pq"])
def test_an_index_takes_what_was_planned(made_up, kind):
    pytest.importorskip(kind.partition(":")[0])
    (segment,) = build_index(made_up, kind).segments
    planned = index_plan(kind, 4000, 16)
    assert (planned["segments"], planned["rows"], planned["layout"]) == (1, 4000, segment.layout)
    written = sum(file["bytes"] for file in segment.record["files"].values())
    assert planned["disk"] == pytest.approx(written, rel=0.05)


def test_a_large_index_is_in_segments_of_whole_shards():
    pytest.importorskip("faiss")
    planned = index_plan("faiss:ivf-pq", 28 * 10**9, 768)
    assert planned["rows"] % SHARD_CHUNKS == 0 and planned["segments"] * planned["rows"] >= 28 * 10**9
    assert planned["memory"] == pytest.approx(28e9 * (768 / 8 + 8), rel=0.03)  # and centroids
    assert index_plan("faiss", 5000, 0)["kind"] == "none"  # no keys


def test_a_made_up_store_is_a_store(made_up):
    """Its shards are cut as asked, its keys do not depend on that, and its files are what a build would write."""
    from benchmarks.synthetic import SyntheticKeys

    verify_store(made_up, "full")
    keys = SyntheticKeys(4000, 16)
    assert [record["rows"] for record in made_up.manifest["shards"]] == [1500, 1500, 1000]
    assert np.abs(made_up.keys(np.arange(4000)) - keys.rows(0, 4000)).max() < 1e-3
    assert np.array_equal(keys.rows(10, 20), keys.rows(0, 30)[10:20])
    assert made_up.document(100).num_chunks == 16 and made_up.num_documents == 94 + 94 + 63


@pytest.fixture
def given(texts, words_tokenizer, tmp_path):
    """The arguments of a plan."""
    words_tokenizer.save_pretrained(tmp_path / "tokenizer")
    inputs = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    return [inputs, "--tokenizer", str(tmp_path / "tokenizer")]


def test_everything_of_one_rate(given):
    """Hours are operations over the rate, all grows with the tokens, the exact join with their square."""
    inputs, _, tokenizer = given
    small = make_plan(PlanSettings([inputs], tokenizer, tflops=2.0))
    large = make_plan(PlanSettings([inputs], tokenizer, tflops=2.0, tokens=1000 * small["corpus"]["tokens"]))
    for made in (small, large):
        seconds = {name: 3600 * hours for name, hours in made["hours"].items()}
        assert seconds["embedding"] == pytest.approx(made["flops"]["embedding"] / 2e12)
        assert made["flops"]["exact_neighbors"] == 2 * 384 * made["corpus"]["chunks"] ** 2
        assert seconds["total"] == pytest.approx(seconds["embedding"] + seconds["exact_neighbors"])
        assert made["disk"]["total"] == sum(size for name, size in made["disk"].items() if name != "total")
    assert large["corpus"]["chunks"] == 1000 * small["corpus"]["chunks"]
    assert large["flops"]["embedding"] == pytest.approx(1000 * small["flops"]["embedding"])
    json.dumps(large)


def test_the_verb_measures_prints_and_writes(given, capsys, tmp_path):
    assert main(["plan", *given, "--seconds", "0", "--json", str(tmp_path / "plan.json")]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "400 documents" in printed and "TFLOP/s" in printed
    assert "256 keys were embedded, too few to say" in printed and result["growth"] == {"keys": 256, "needed": 9216}
    assert result["flops_per_second"] > 0 and result["hours"]["embedding"] > 0
    assert main(["plan", *given, "--embedder", "none"]) == 0
    assert "no hours" in capsys.readouterr().out


def test_training(given, capsys, tmp_path):
    from retro.model import RetroConfig, RetroForCausalLM

    more = ["--embedder", "none", "--model", "172m", "--tokens", "419.4e9", "--tflops", "8000"]
    assert main(["plan", *given, *more, "--json", str(tmp_path / "plan.json")]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    forward = result["model"]["forward_flops_per_token"]
    assert result["hours"]["training"] == pytest.approx(3 * forward * 419.4e9 / 8000e12 / 3600, rel=1e-6)
    assert result["memory"]["weights_and_optimizer"] == 16 * result["model"]["parameters"]
    assert "parameters" in printed
    config = RetroConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cca_layers=[2])
    assert model_size(config)[0] == sum(p.numel() for p in RetroForCausalLM(config).parameters())


def test_search_of_a_store_is_carried_on(texts, words_tokenizer, capsys, tmp_path, monkeypatch):
    """Less search than by all rows, in each segment; the join by both."""
    from transformers import BertConfig, BertModel

    pytest.importorskip("faiss")
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "tok")
    words_tokenizer.save_pretrained(tmp_path / "tok")
    inputs, tok = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts]), str(tmp_path / "tok")
    store = build_store(BuildSettings(str(tmp_path / "store"), [inputs], tok, embedder=tok, index="none"))
    found, taken = Power(10.0, 0.5, 0.4, 0.6), []
    costs = Cost("routed", 10_000, 0.95, 1e3, 0.1, 0.001), Cost("exact", 10_000, 1.0, 1e4, 10.0, 0.001)
    measured = lambda keys, *_: taken.append(keys) or Growth(*costs, found, found)  # noqa: E731
    monkeypatch.setattr("retro.planning.measure_growth", measured)
    monkeypatch.setattr("retro.planning.FEWEST_KEYS", 100)
    monkeypatch.setattr(ENGINES["routed"], "most_rows", 200_000_000)
    argv = [inputs, "--tokenizer", tok, "--embedder", tok, "--store", str(tmp_path / "store"), "--tokens", "64e9"]
    assert main(["plan", *argv, "--tflops", "1", "--json", str(tmp_path / "plan.json")]) == 0
    assert sorted(taken[0].tolist()) == sorted(store.keys(store.searchable_rows).tolist())
    first, tenfold, _ = json.loads((tmp_path / "plan.json").read_text())["growth"]["forecast"]
    rows = ENGINES["routed"].most_rows
    segments = first["chunks"] / rows
    assert tenfold["chunks"] == 10 * first["chunks"] > 10**9
    assert first["rows_compared"] == pytest.approx(segments * 10 * rows**0.5)
    assert first["exact_join_cpu_hours"] == pytest.approx(first["chunks"] ** 2 * 0.001 / 3.6e6)
    assert tenfold["cpu_ms"] == pytest.approx(10 * first["cpu_ms"])  # as many times the segments
    assert first["join_cpu_hours"] == pytest.approx(first["chunks"] * first["cpu_ms"] / 3.6e6)
    printed = capsys.readouterr().out
    assert "chunks^0.50 (0.40 to 0.60)" in printed and "extrapolated" in printed


REFUSED = {
    "no such store": (["--store", "{new}"], "{new}"),
    "no such embedder": (["--embedder", "{new}"], "{new}"),
    "no such index": (["--index", "hnsw"], "hnsw"),
    "an index of words": (["--index", "bm25"], "bm25"),
    "no such model": (["--model", "3m"], "172m"),
    "a model that is no RETRO": (["--model", "{llama}"], "of the type llama"),
    "no tokens": (["--tokens", "0"], "tokens"),
    "no rate": (["--tflops", "nan"], "tflops"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, given, capsys, tmp_path):
    argv, expected = REFUSED[case]
    LlamaConfig().save_pretrained(tmp_path / "llama")
    fill = lambda text: text.format(new=tmp_path / "new", llama=tmp_path / "llama")  # noqa: E731
    assert main(["plan", *given, *map(fill, argv)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("retro: error: ") and fill(expected) in error


def test_inputs_without_text_are_refused(words_tokenizer, tmp_path):
    inputs = write_jsonl(tmp_path / "in.jsonl", [{"text": " "}])
    with pytest.raises(ValueError, match="hold no text"):
        estimate_corpus([inputs], words_tokenizer)
