"""Plans: every formula against what is really there, the grammar of numbers, refusals in one sentence."""

import gzip
import json

import numpy as np
import pytest

from retro.retrieval import verify_store
from retro.retrieval.planning.calibration import Calibration, calibration_file
from retro.retrieval.planning.plan import (
    IndexPlan,
    PlanSettings,
    corpus_of_numbers,
    disk_bytes,
    embedding_flops,
    hours,
    index_plan,
    make_plan,
    npy_bytes,
    parse_bytes,
    parse_count,
    shard_rows,
)
from retro.retrieval.planning.sampling import sample_corpus
from retro.retrieval.planning.shapes import EmbedderShape, embedder_shape, shape_of_config
from retro.retrieval.search.engines import IndexLayout
from tests.stand_ins import make_store, words, write_jsonl

COUNTS = {"1": 1, "10k": 10_000, "1.5M": 1_500_000, "28B": 28 * 10**9, "1.8T": 18 * 10**11, "2e9": 2 * 10**9}
COUNTS |= {"1,000,000": 10**6, "1_000": 1000, " 3 g ": 3 * 10**9, ".5k": 500}
SIZES = {
    "40GB": 40 * 10**9,
    "24GiB": 24 << 30,
    "1.5t": 15 * 10**11,
    "512M": 512 * 10**6,
    "7": 7,
    "7B": 7,
    "1e3kb": 10**6,
}


@pytest.mark.parametrize("text", COUNTS)
def test_counts(text):
    assert parse_count(text) == COUNTS[text]


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text):
    assert parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "-1", "0.4", "ten", "1 0", "1kk", "nan", "inf", "1e40", "5GB", "0x10"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="^--chunks is .*; give a number"):
        parse_count(text, "--chunks")


def test_a_corpus_of_numbers():
    by_tokens = corpus_of_numbers(tokens=10**9, documents=10**6)
    assert by_tokens.chunks == pytest.approx(10**9 / 64 + 10**6 / 2, rel=0.01)
    by_chunks = corpus_of_numbers(chunks=by_tokens.chunks, documents=10**6)
    assert by_chunks.tokens == pytest.approx(10**9, rel=1e-6)
    assert corpus_of_numbers(bytes=4 * 10**9).tokens == 10**9
    assert corpus_of_numbers(chunks=28 * 10**9).tokens == pytest.approx(28e9 * 64, rel=0.05)
    everything = corpus_of_numbers(documents=10, tokens=640, chunks=12, bytes=3000)
    assert (everything.documents, everything.tokens, everything.chunks, everything.bytes) == (10, 640, 12, 3000)
    assert [note for note in everything.assumed if "embedder" not in note] == []


@pytest.mark.parametrize("given", [{"tokens": 640, "chunks": 9}, {"tokens": 640, "chunks": 99, "documents": 5}, {}])
def test_numbers_that_contradict_or_are_missing(given):
    with pytest.raises(ValueError, match="leave one out|give at least one"):
        corpus_of_numbers(**given)


@pytest.mark.parametrize("shape, dtype", [((0,), "<u2"), ((12345,), "<u4"), ((7, 384), "float16"), ((10**6, 2), "<i8")])
def test_bytes_of_npy_files(shape, dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype))
    assert npy_bytes(shape, dtype) == (tmp_path / "a.npy").stat().st_size


def test_rows_of_shards():
    assert shard_rows(10, 4) == [4, 4, 2] and shard_rows(8, 4) == [4, 4] and shard_rows(3, 4) == [3]


@pytest.fixture(scope="module")
def built(words_tokenizer, tmp_path_factory):
    """A store of 400 documents and the file it was built from."""
    folder = tmp_path_factory.mktemp("planned")
    texts = [words(3 + i % 90, seed=i) for i in range(400)]
    return make_store(folder, texts, words_tokenizer, chunk_len=8, shard_chunks=700), str(folder / "store.jsonl")


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16"])
def test_disk_is_what_a_build_writes(built, words_tokenizer, tmp_path, key_dtype):
    from retro.retrieval import build_neighbors

    texts = [words(3 + i % 90, seed=i) for i in range(400)]
    store = make_store(tmp_path, texts, words_tokenizer, chunk_len=8, shard_chunks=700, key_dtype=key_dtype)
    table = build_neighbors(store, 3)
    corpus = sample_corpus([str(tmp_path / "store.jsonl")], words_tokenizer, chunk_len=8)
    settings = PlanSettings(len(words_tokenizer), key_dtype, shard_chunks=700, num_neighbors=3)
    planned = disk_bytes(corpus, settings, dim=16)
    files = {}
    for record in store.manifest["shards"]:
        for name, file in record["files"].items():
            files[name] = files.get(name, 0) + file["bytes"]
    assert planned["tokens"] == files["tokens.npy"] and planned["chunk_table"] == files["chunks.npy"]
    assert planned["keys"] == files["keys.npy"]
    saved = sum(file["bytes"] for file in store.manifest["tokenizer"]["files"].values())
    assert planned["tokenizer"] == pytest.approx(saved, rel=0.05)
    assert planned["document_table"] == pytest.approx(files["documents.parquet"], rel=0.25)  # headers of small shards
    assert planned["neighbors"] == sum(file["bytes"] for file in table.record["files"].values())
    assert planned["manifest"] == pytest.approx((store.path / "manifest.json").stat().st_size, rel=0.6)


def test_a_sample_of_everything_is_exact(built, words_tokenizer):
    store, inputs = built
    corpus = sample_corpus([inputs], words_tokenizer, chunk_len=8)
    assert (corpus.documents, corpus.chunks) == (store.num_documents, store.num_chunks)
    assert (corpus.tokens, corpus.bytes) == tuple(store.manifest["counts"][name] for name in ("tokens", "bytes"))
    assert corpus.assumed == ()


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet"])
def test_a_part_stands_for_all(words_tokenizer, tmp_path, name):
    texts = [words(200 + i % 100, seed=i) for i in range(1500)]
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    size = (tmp_path / name).stat().st_size
    corpus = sample_corpus([str(tmp_path / name)], words_tokenizer, read_bytes=size // 3, tokenized_bytes=100_000)
    assert corpus.sampled_bytes <= 100_000 and "33" in corpus.assumed[0]
    assert corpus.documents == pytest.approx(1500, rel=0.03)
    assert corpus.bytes == pytest.approx(sum(map(len, texts)), rel=0.03)
    chunks = sum(-(-(len(text.split()) + 1) // 64) for text in texts)
    assert corpus.chunks == pytest.approx(chunks, rel=0.03)


def test_files_are_drawn(words_tokenizer, tmp_path):
    for number in range(20):
        write_jsonl(tmp_path / f"{number:02}.jsonl", [{"text": words(50, seed=10 * number + i)} for i in range(30)])
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    read = lambda seed: sample_corpus([str(tmp_path)], words_tokenizer, read_bytes=total // 4, seed=seed)  # noqa: E731
    assert read(0) == read(0) and read(0).documents == pytest.approx(600, rel=0.1)


def test_embedder_tokens_are_counted(words_tokenizer, built):
    corpus = sample_corpus([built[1]], words_tokenizer, words_tokenizer, chunk_len=8)
    store = built[0]
    per_chunk = (store.manifest["counts"]["tokens"] - store.num_documents) / store.num_chunks  # without eos
    assert corpus.embedder_tokens == pytest.approx(per_chunk, rel=0.05)


TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=50)
CONFIGS = {
    "bert": TINY,
    "llama": {**TINY, "num_key_value_heads": 2},
    "t5": dict(d_model=32, d_ff=48, d_kv=8, num_layers=3, num_heads=4, vocab_size=50),
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_operations_are_those_that_torch_counts(model_type):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    config._attn_implementation = "eager"  # torch does not count what its fused kernel for CPUs does
    model = T5EncoderModel(config) if model_type == "t5" else AutoModel.from_config(config)
    tokens, texts = 17, 3
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(input_ids=torch.ones(texts, tokens, dtype=torch.long))
    shape = shape_of_config(config)
    assert texts * shape.flops(tokens) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_known_embedders_need_no_download():
    shape = embedder_shape("bert-base-uncased")
    assert shape.parameters == 109_482_240 and shape.dim == 768
    assert embedder_shape("sentence-transformers/all-MiniLM-L6-v2").parameters == 22_713_216
    assert shape.flops(80) == pytest.approx(14e9, rel=0.05)
    assert embedder_shape("none").flops(80) == 0
    with pytest.raises(ValueError, match="nowhere.*config.json"):
        embedder_shape("nowhere/nothing")


CONSTANTS = Calibration(
    machine={"name": "a", "cores": 2, "processor": "p", "memory_bytes": 24 << 30},
    measured_at="2026-01-01 00:00 UTC",
    tokenizer="t",
    reading_rate=2e7,
    tokenizing_rate=1e6,
    embedder="minilm",
    device="cpu",
    processes=2,
    embedder_tokens=70.0,
    embedder_flops=1.5e9,
    chunks_per_second_one=60.0,
    chunks_per_second_all=100.0,
    worker_bytes=500 << 20,
    start_seconds=5.0,
    pair_seconds=1e-10,
    pair_dim_seconds=2e-11,
    index_kind="scann",
    index_seconds=2.0,
    codebook_seconds=1e-6,
    encode_seconds=1e-7,
    queries_per_second=1000.0,
    write_rate=5e8,
    checksum_rate=1e9,
)
SHAPE = EmbedderShape("minilm", 384, 10_000_000, 2304, 147_456, 22_000_000)


def test_hours_by_hand():
    """100,000 chunks on the calibrated machine, every stage from its constants."""
    corpus = corpus_of_numbers(documents=5000, tokens=6_240_000, chunks=100_000, bytes=25_000_000)
    settings = PlanSettings(num_neighbors=0, index="none")
    index = index_plan(corpus.chunks, settings, 384)
    disk = disk_bytes(corpus, settings, 384)
    found = hours(corpus, settings, SHAPE, index, disk, CONSTANTS)
    flops = 2 * 10_000_000 * corpus.embedder_tokens + 4 * corpus.embedder_tokens**2 * 2304 + 2 * 147_456
    assert embedding_flops(corpus, SHAPE) == pytest.approx(100_000 * flops)
    assert 3600 * found["embedding"] == pytest.approx(100_000 * flops / (100 * 1.5e9))
    assert 3600 * found["reading and tokenizing"] == pytest.approx(25e6 * (1 / 2e7 + 1 / 1e6) / 2)
    assert 3600 * found["writing and checksums"] == pytest.approx(2 * sum(disk.values()) * (1 / 5e8 + 1 / 1e9))
    assert 3600 * found["starting"] == pytest.approx(2 * 5)
    assert set(found) == {"starting", "reading and tokenizing", "embedding", "writing and checksums"}
    joined = hours(corpus, PlanSettings(num_neighbors=2, index="none"), SHAPE, index, disk, CONSTANTS)
    assert 3600 * joined["neighbors, exact"] == pytest.approx(1e10 * (1e-10 + 384 * 2e-11))
    large = IndexPlan("scann", 4, 6_000_000, IndexLayout("scann", "ah", 100, 2), 0, 0, 0)
    joined = hours(corpus_of_numbers(chunks=24_000_000), PlanSettings(), SHAPE, large, disk, CONSTANTS)
    assert 3600 * joined["neighbors, scann"] == pytest.approx(24e6 * 4 * 10 / 1000)


def test_workers_and_gpus_share_the_work():
    corpus, disk = corpus_of_numbers(chunks=10**6), {"neighbors": 0}
    none = index_plan(10**6, PlanSettings(index="none"), 384)
    took = lambda **given: hours(corpus, PlanSettings(**given), SHAPE, none, disk, CONSTANTS)["embedding"]  # noqa: E731
    assert took(workers=1) == pytest.approx(took(workers=2) * 100 / 60)
    assert took(workers=8) == pytest.approx(took(workers=2) / 4)
    flops = embedding_flops(corpus, SHAPE)
    assert took(gpus=4, gpu_tflops=300.0, mfu=0.5) == pytest.approx(flops / (4 * 300e12 * 0.5) / 3600)


def test_segments_are_whole_shards_that_fit():
    settings = PlanSettings(index="faiss:ivf-pq", shard_chunks=1000)
    one = index_plan(5000, settings, 64)
    assert (one.segments, one.rows_per_segment) == (1, 5000)
    cut = index_plan(5000, settings, 64, memory=one.peak // 2)
    assert cut.rows_per_segment % 1000 == 0 and cut.segments > 1
    assert cut.peak <= one.peak // 2 or cut.rows_per_segment == 1000
    assert index_plan(5000, settings, 0).segments == 0  # no keys


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    from retro.retrieval.planning.synthetic import write_synthetic_store

    return write_synthetic_store(tmp_path_factory.mktemp("made") / "store", 4000, 16, "float16", shard_chunks=1500)


@pytest.mark.parametrize("kind", ["scann:brute", "scann:ah", "scann:ah-int8", "faiss:ivf-sq8", "faiss:pq"])
def test_an_index_takes_what_was_planned(made_up, kind):
    from retro.retrieval import build_index

    pytest.importorskip(kind.partition(":")[0])
    index = build_index(made_up, kind)
    (segment,) = index.segments
    planned = index_plan(4000, PlanSettings(index=kind, shard_chunks=1500), 16)
    assert (planned.segments, planned.rows_per_segment, planned.layout) == (1, 4000, segment.layout)
    written = sum(file["bytes"] for file in segment.record["files"].values())
    assert planned.disk == pytest.approx(written, rel=0.05)


def test_a_made_up_store_is_a_store(made_up):
    """Its shards are cut as asked, its keys do not depend on that, and its files are what a build would write."""
    from retro.retrieval.planning.synthetic import SyntheticKeys

    verify_store(made_up, "full")
    keys = SyntheticKeys(4000, 16)
    assert [record["rows"] for record in made_up.manifest["shards"]] == [1500, 1500, 1000]
    assert np.abs(made_up.keys(np.arange(4000)) - keys.rows(0, 4000)).max() < 1e-3
    assert np.array_equal(keys.rows(10, 20), keys.rows(0, 30)[10:20])
    assert made_up.document(100).num_chunks == 16 and made_up.num_documents == 94 + 94 + 63
    corpus = corpus_of_numbers(made_up.num_documents, 4000 * 64, 4000)
    planned = disk_bytes(corpus, PlanSettings(4096, "float16", 1500), 16)
    counted = sum(record["files"]["keys.npy"]["bytes"] for record in made_up.manifest["shards"])
    assert planned["keys"] == counted


def test_a_plan_without_constants_gives_no_times():
    made = make_plan(corpus_of_numbers(chunks=28 * 10**9), PlanSettings(), embedder_shape("bert-base-uncased"))
    assert made["hours"] is None and made["calibration"] is None and made["shards"] == 28_000
    assert made["disk"]["keys"] == pytest.approx(28e9 * 768 * 4, rel=1e-6)
    assert made["index"]["segments"] * made["index"]["rows_per_segment"] >= 28 * 10**9
    json.dumps(made)


def test_a_calibration_survives_the_file(tmp_path):
    CONSTANTS.save(tmp_path / "deep" / "c.json")
    assert Calibration.load(tmp_path / "deep" / "c.json") == CONSTANTS
    content = json.loads((tmp_path / "deep" / "c.json").read_text())
    del content["write_rate"]
    (tmp_path / "c.json").write_text(json.dumps(content))
    for name, words_of_it in (("c.json", "write_rate"), ("none.json", "--calibrate")):
        with pytest.raises(ValueError, match=words_of_it):
            Calibration.load(tmp_path / name)


def test_where_a_calibration_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "retro-lm" / "calibration.json"


REFUSED = {
    "nothing": ([], "nothing to plan"),
    "both": (["{docs}", "--tokens", "1M"], "one of them"),
    "no tokenizer": (["{docs}"], "--tokenizer"),
    "a vocabulary beside inputs": (["{docs}", "--tokenizer", "x", "--vocab-size", "5"], "--vocab-size"),
    "no number": (["--chunks", "many"], "many"),
    "a calibration that is not there": (["--chunks", "1M", "--calibration", "{new}"], "{new}"),
    "half a GPU": (["--chunks", "1M", "--gpus", "8"], "gpu_tflops"),
    "no such embedder": (["--chunks", "1M", "--embedder", "{new}"], "{new}"),
    "no such index": (["--chunks", "1M", "--index", "hnsw"], "hnsw"),
    "training without GPUs": (["--chunks", "1M", "--model", "172m"], "--gpu-tflops"),
    "training of no model": (["--chunks", "1M", "--train-tokens", "1B"], "--model"),
    "an mfu of 2": (["--chunks", "1M", "--mfu", "2"], "mfu"),
    "no worker": (["--chunks", "1M", "--workers", "0"], "workers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, built, capsys, tmp_path, monkeypatch):
    from retro.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv, expected = REFUSED[case]
    fill = lambda text: text.format(docs=built[1], new=tmp_path / "new")  # noqa: E731
    assert main(["plan", *map(fill, argv)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("retro: error: ") and fill(expected) in error


def test_the_verb_prints_and_writes(capsys, tmp_path, monkeypatch):
    from retro.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    CONSTANTS.save(tmp_path / "c.json")
    given = ["plan", "--chunks", "1M", "--documents", "50k", "--json", str(tmp_path / "plan.json")]
    assert main([*given, "--calibration", str(tmp_path / "c.json")]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "1,000,000 chunks of 64 in 1 shards" in printed and "2026-01-01" in printed
    assert result["hours"]["total"] == pytest.approx(sum(v for n, v in result["hours"].items() if n != "total"))
    assert main(given) == 0
    assert "no times" in capsys.readouterr().out


def test_calibrating_this_machine(tmp_path, monkeypatch):
    """Everything is measured, at sizes that tell nothing about the machine."""
    from retro.retrieval.planning import calibration

    small = {"INDEX_ROWS": (1200, 2400), "INDEX_DIM": 8, "INDEX_QUERIES": 16, "PRODUCT_ROWS": 2048}
    small |= {"PRODUCT_QUERIES": 64, "DISK_BYTES": 1 << 20, "SAMPLE_BYTES": 20_000}
    for name, value in small.items():
        monkeypatch.setattr(calibration, name, value)
    inputs = [write_jsonl(tmp_path / "in.jsonl", [{"text": words(200, i)} for i in range(9)])]
    found = calibration.calibrate(inputs, embedder="minilm", workers=1, seconds=0.1)
    rates = ("reading_rate", "tokenizing_rate", "chunks_per_second_all", "write_rate", "checksum_rate")
    assert all(getattr(found, name) > 0 for name in (*rates, "queries_per_second", "worker_bytes", "embedder_flops"))
    assert found.chunks_per_second_one == found.chunks_per_second_all and found.processes == 1
    assert 40 < found.embedder_tokens < 200
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found


def test_the_verb_plans_training(capsys, tmp_path, monkeypatch):
    from retro.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster = ["--gpus", "64", "--gpu-tflops", "312", "--gpu-memory", "80GB"]
    given = ["plan", "--chunks", "1B", "--model", "172m", "--train-tokens", "419.4B", *cluster]
    assert main([*given, "--json", str(tmp_path / "plan.json")]) == 0
    printed, training = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())["training"]
    assert "random reads a second of a node" in printed and "memory of a GPU: it fits" in printed
    assert training["tokens_per_second"] == pytest.approx(64 * 312e12 * 0.4 / (4 * training["forward_flops_per_token"]))
    assert training["node_reads_per_second"] == pytest.approx(training["tokens_per_second"] / 8 * 2 * 2 / 64)
