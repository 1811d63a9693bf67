"""Every preset, on tiny random encoders of its architecture in a Hugging Face cache laid out as the hub's."""

import json

import numpy as np
import pytest
import torch

from retro.retrieval import load_embedder
from retro.retrieval.embedding.embedder import embedder_from
from retro.retrieval.embedding.presets import PRESETS, SAME, preset_of
from tests.retrieval.tiny_encoders import add_modules, hub_folder, make_encoder, write_json

TEXTS = ["w1 w2 w3", "passage : w9", "w5 " * 70, "w3 w1 w2"]
GTR = dict(out_features=24, bias=False, activation_function="torch.nn.modules.linear.Identity")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, which is all that there is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def lay_out(cache, name):
    """The encoders of a preset, with the files that their repositories have."""
    preset = PRESETS[name]
    for seed, place in enumerate({preset.passages, preset.queries} - {SAME}):
        folder = hub_folder(cache, place)
        kind = next((k for k in ("t5", "roberta") if k in name), None) or {"grit": "mistral", "reasonir": "llama"}.get(
            name
        )
        kind = kind or ("xlm-roberta" if "multilingual" in name else "bert")
        make_encoder(folder, kind, seed=seed, dtype=torch.float16 if kind == "t5" else torch.float32)
        if kind == "t5":
            add_modules(folder, dense=GTR, normalize=True)
        elif name.startswith("dpr"):
            add_modules(folder, pooling="cls_token", max_length=61)
        elif name.startswith(("e5", "multi", "bge", "minilm")):
            add_modules(folder, "cls_token" if name.startswith("bge") else "mean_tokens", normalize=True)
        if kind in ("mistral", "llama"):
            config = json.loads((folder / "config.json").read_text())
            write_json(folder, "config.json", config | {"auto_map": {"AutoModel": f"modeling_{name}.Model"}})


def by_hand(cache, name, is_query):
    """The vectors of the texts as the model's card makes them, one at a time, without this library."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

    preset = PRESETS[name]
    place = preset.queries if is_query and preset.queries != SAME else preset.passages
    folder = hub_folder(cache, place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoModelForTextEncoding if "t5" in name else AutoModel
    model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    prefix = preset.query_prefix if is_query else preset.passage_prefix
    limit = {"dpr": 61, "minilm": 64, "gtr": 64}.get(name.split("-")[0], 90)
    vectors = []
    for text in TEXTS:
        ids = tokenizer([prefix + text], truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        decoder = name in ("grit", "reasonir")
        mask = {"attention_mask": torch.zeros(1, 1, ids.shape[1], ids.shape[1])} if decoder else {}
        with torch.inference_mode():
            hidden = model(input_ids=ids, **mask).last_hidden_state[0]
        if decoder:
            hidden = hidden[len(tokenizer(prefix)["input_ids"]) :]
        vectors.append(hidden[0] if name.startswith(("dpr", "dragon", "bge")) else hidden.mean(0))
    vectors = torch.stack(vectors)
    if "t5" in name:
        vectors = vectors @ load_file(folder / "2_Dense/model.safetensors")["linear.weight"].T
    kept = name.startswith(("bert-base", "contriever", "dpr", "dragon"))
    return (vectors if kept else vectors / vectors.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_embeds_as_its_card_says(name, cache):
    lay_out(cache, name)
    embedder = load_embedder(name)
    for is_query in (False, True):
        expected = by_hand(cache, name, is_query)
        found = embedder.embed(TEXTS, is_query=is_query)
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=2e-5, rtol=1e-4)
        if PRESETS[name].similarity != "dot":
            assert found.shape == expected.shape
    described = json.loads(json.dumps(embedder.description))
    assert described["name"] == name
    assert embedder_from(described, cache).fingerprint == embedder.fingerprint


def test_the_hub_name_of_a_preset_means_the_preset(cache):
    lay_out(cache, "e5-base-v2")
    by_name, by_place = load_embedder("e5-base-v2"), load_embedder("intfloat/e5-base-v2")
    assert by_place.chosen == by_name.chosen and by_place.chosen.query_prefix == "query: "
    assert preset_of("intfloat/e5-base-v2") is PRESETS["e5-base-v2"]
    assert preset_of("intfloat/e5-base-v3") is None


def test_what_is_asked_goes_before_the_preset(cache):
    lay_out(cache, "contriever")
    for asked, similarity in (
        ({}, "dot"),
        (dict(normalize=True), "cosine"),
        (dict(normalize=False), "dot"),
        (dict(similarity="l2"), "l2"),
    ):
        chosen = load_embedder("contriever", **asked).chosen
        assert (chosen.similarity, chosen.normalize) == (similarity, similarity == "cosine")
    lay_out(cache, "bge-small-en-v1.5")
    chosen = load_embedder("bge-small-en-v1.5", query_prefix="", pooling="mean", max_length=20).chosen
    assert (chosen.query_prefix, chosen.pooling, chosen.max_length) == ("", "mean", 20)


def test_without_the_preset_a_decoders_own_code_is_not_passed_over(cache):
    lay_out(cache, "grit")
    folder = str(hub_folder(cache, PRESETS["grit"].passages))
    with pytest.raises(ValueError, match=r"comes with code of its own \(modeling_grit.Model\)"):
        load_embedder(folder)


def test_a_preset_that_is_not_there_is_one_sentence(cache):
    for name in ("dragon", "gtr-t5-base", "grit"):
        with pytest.raises(
            ValueError, match=f"^the embedder {name} is no folder, nor a Hugging Face encoder"
        ) as caught:
            load_embedder(name)
        assert "\n" not in str(caught.value)
