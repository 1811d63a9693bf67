"""`retro.load`: model, tokenizer and retriever belong together, as commands, tasks and servers read with them."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import retro
from retro.cli import main
from retro.evaluation.tasks.reading import open_reader
from retro.loading import load_model
from retro.provenance import read_provenance, write_provenance
from retro.retrieval import Retriever
from retro.sampling import as_json
from retro.serve.server import load_with_stores
from tests.retrieval.remote.test_remote import serving_store
from tests.stand_ins import HashingEmbedder, make_store, make_words_tokenizer, words

PROMPT = words(20, seed=3)


@pytest.fixture(scope="module")
def store(words_tokenizer, tmp_path_factory):
    """Keys of an embedder that no name brings back, so that it is searched by words alone or with `embedder`."""
    texts = [words(40, seed=i) for i in range(12)]
    return make_store(tmp_path_factory.mktemp("store"), texts, words_tokenizer, chunk_len=8)


@pytest.fixture(scope="module", params=["retro", "fit"])
def folder(request, words_tokenizer, store, tmp_path_factory):
    """A model trained with neighbors that TF-IDF found, k = 3 and r = 16."""
    path = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    reads = dict(chunk_len=8, retrieved_len=16, num_neighbors=3)
    if request.param == "retro":
        config = retro.RetroConfig(**sizes, **reads, cca_layers=[2], initializer_range=0.3)
        model = retro.RetroForCausalLM(config)
    else:
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16)).save_pretrained(path.parent / "base")
        model = retro.retrofit(str(path.parent / "base"), **reads)
    model.save_pretrained(path)
    words_tokenizer.save_pretrained(path)
    write_provenance(path, store, "tfidf")
    return path


def settings(retriever):
    return retriever.index.kind, retriever.num_neighbors, retriever.retrieved_len


def check_same(found, expected):
    for name in ("ids", "tokens", "mask", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_every_way_reads_with_the_same_neighbors(folder, store, tmp_path):
    model, tokenizer, retriever = retro.load(folder, store.path)
    assert settings(retriever) == ("tfidf", 3, 16) and not model.training
    assert tokenizer.get_vocab() == store.tokenizer.get_vocab()
    found = retriever([PROMPT])
    check_same(found, Retriever(store, "tfidf", num_neighbors=3, retrieved_len=16)([PROMPT]))
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    served = load_with_stores(str(folder), [f"a={store.path}", f"b={store.path}"])[2]
    for other in (
        retro.load(in_memory, store).retriever,
        open_reader(str(folder), str(store.path)).retriever,
        *served.values(),
    ):
        assert settings(other) == settings(retriever)
        check_same(other([PROMPT]), found)
    argv = ["generate", str(folder), PROMPT, "--store", str(store.path), "--max-new-tokens", "12"]
    assert main([*argv, "--json", str(tmp_path / "text.json")]) == 0
    texts = retro.sample(model, tokenizer, [PROMPT], retriever, max_new_tokens=12)
    assert json.loads((tmp_path / "text.json").read_text())["texts"] == json.loads(json.dumps([as_json(texts[0])]))


def test_a_server_in_place_of_a_store(folder, store):
    local = retro.load(folder, store).retriever
    with serving_store(Retriever(store, "tfidf", num_neighbors=2, retrieved_len=12)) as url:
        remote = retro.load(folder, url).retriever
        assert settings(remote) == settings(local) and isinstance(remote, retro.RemoteRetriever)
        check_same(remote([PROMPT]), local([PROMPT]))
        assert settings(load_with_stores(folder, [url])[2].popitem()[1]) == settings(local)
        for name, value in (("index", "tfidf"), ("deduplicate", True), ("embedder", HashingEmbedder())):
            with pytest.raises(ValueError, match=f"^{name} is for a store of this machine"):
                retro.load(folder, url, **{name: value})


def test_what_is_given_goes_before_what_is_recorded(folder, store, monkeypatch):
    given = dict(index="exact", num_neighbors=1, embedder=HashingEmbedder())
    assert settings(retro.load(folder, store, **given).retriever) == ("exact", 1, 16)
    search = Retriever(store, "exact", HashingEmbedder()).index
    assert retro.load(folder, store, index=search).retriever.index is search
    filtered = retro.load(folder, store, deduplicate=True, max_date="2020", undated="keep").retriever
    assert filtered.index.kind.startswith("tfidf;") and "max_date=2020" in filtered.index.kind
    assert retro.load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    monkeypatch.setenv("RETRO_DTYPE", "float16")
    assert retro.load(folder).model.dtype == torch.float16
    assert retro.load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert retro.load(folder).retriever is None


def test_a_plain_lm_and_a_model_without_a_record(folder, store, words_tokenizer, tmp_path, caplog):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(words_tokenizer), intermediate_size=16, **sizes))
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="lm comes without a tokenizer; give tokenizer=, or a store"):
        retro.load(tmp_path / "lm", store, index="tfidf")
    words_tokenizer.save_pretrained(tmp_path / "lm")
    assert settings(retro.load(tmp_path / "lm", store, index="tfidf").retriever) == ("tfidf", 2, 16)
    assert retro.load(lm, store, index="tfidf").tokenizer is store.tokenizer
    assert load_model(tmp_path / "lm", store).config.model_type == "llama"
    model = retro.RetroForCausalLM(retro.RetroConfig(vocab_size=len(words_tokenizer), chunk_len=8, **sizes))
    model.save_pretrained(tmp_path / "bare")
    with caplog.at_level(logging.WARNING):
        assert retro.load(tmp_path / "bare", store, index="tfidf").tokenizer is store.tokenizer
    assert "bare has no retro.json: whether its tokenizer is the one of" in caplog.text


def test_what_does_not_belong_together_is_refused(folder, store, words_tokenizer, tmp_path):
    other = make_store(tmp_path, [words(30)], make_words_tokenizer(90), name="other", chunk_len=8)
    short = make_store(tmp_path, [words(30)], words_tokenizer, name="short", chunk_len=4)
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    unknown = retro.RetroForCausalLM(retro.RetroConfig(vocab_size=9, hidden_size=8, num_attention_heads=1))
    for model, given, options, said in (
        (folder, None, dict(index="tfidf"), "^index means nothing without a store; name a store"),
        (folder, None, dict(num_neighbors=2), "^num_neighbors means nothing without a store"),
        (folder, None, dict(deduplicate=True), "^deduplicate means nothing without a store"),
        (folder, other, {}, "was trained with the tokenizer .* build a store with the model's tokenizer"),
        (in_memory, other, {}, "was trained with the tokenizer"),
        (lm, store, dict(tokenizer=make_words_tokenizer(90)), "was built with the tokenizer"),
        (folder, short, {}, "reads chunks of 8 tokens, the store .* has chunks of 4"),
        (unknown, store, {}, "reads chunks of 64 tokens, the store .* has chunks of 8"),
        (folder, store, dict(index="scann"), "scann"),
        (folder, tmp_path / "nowhere", {}, "nowhere"),
        (tmp_path / "empty", store, {}, r"empty holds no model \(config.json is missing\)"),
        ("no/such", store, {}, "no/such cannot be loaded"),
        (lm, None, {}, "^a model in memory comes without a tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            retro.load(model, given, **options)


def test_a_model_of_the_hub_says_what_it_was_trained_with(folder, monkeypatch):
    asked = []

    def cached_file(name, file, **options):
        asked.append((name, file))
        return folder / file if name == "someone/model" else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert read_provenance("someone/model")["index"] == "tfidf"
    assert read_provenance("someone/other") is None and read_provenance(None) is None
    assert asked == [("someone/model", "retro.json"), ("someone/other", "retro.json")]


def test_two_models_can_be_loaded_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from retro.retrofit.bases import open_base

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=8)).save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(open_base, [str(tmp_path)] * 8))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).device.type == "cpu"
    assert all(parameter.device.type == "cpu" for model in loaded for parameter in model.parameters())


@pytest.mark.parametrize("model", [None, 3])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match=f"{model} is no model; give a folder"):
        retro.load(model)
