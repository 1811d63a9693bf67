"""The induction-ready start reads at every width: before training, and after its first noisy steps."""

import json
import math

import pytest
import torch

from benchmarks.starts import RECIPE, train
from retro.evaluation.copying import attention_on_copies, copying_text, logit_gain
from retro.model import RetroConfig, RetroForCausalLM


def make(hidden_size: int, layers: int = 4, cca_layers=(2, 4), heads: int = 4, **overrides) -> RetroForCausalLM:
    """The model of the recipe at another size."""
    torch.manual_seed(0)
    size = dict(hidden_size=hidden_size, num_attention_heads=heads, num_hidden_layers=layers, cca_layers=cca_layers)
    return RetroForCausalLM(RetroConfig(vocab_size=8192, **{**RECIPE["model"], **size, **overrides})).eval()


@pytest.mark.parametrize(("d", "heads"), [(128, 4), (256, 4), (256, 8), (512, 8)])
def test_it_reads_at_every_width_before_training(d, heads):
    model = make(d, heads=heads)
    text = copying_text(model.config)
    assert min(attention_on_copies(model, text)) >= 0.75
    assert logit_gain(model, text) >= 3


def test_attention_on_copies_against_one_query_at_a_time():
    """Rotary positions in CCA, of which `attend` turns the queries itself."""
    model = make(64, heads=2, cca_init="random", cca_partial_rotary_factor=1.0, initializer_range=0.3)
    ids, neighbors, places = text = copying_text(model.config, batch_size=1)
    cca, m, given = model.model.layers[1].cross_attention, model.config.chunk_len, []
    handle = cca.register_forward_pre_hook(lambda _, arguments: given.extend(arguments))
    model(ids, neighbors)
    handle.remove()
    (h, encoded), weights = given[:2], []
    keys, _ = cca.keys_and_values(encoded)
    read: list[torch.Tensor] = []
    hook = cca.attention.o_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for token in (places[0] >= 0).nonzero()[:, 0].tolist():
        chunk, position = (token + 1) // m - 1, (token + 1) % m + m - 1
        one_hot = torch.zeros(1, 2, *keys.shape[2:4], 32)  # values that say which key they are of
        one_hot.flatten(2, 3)[0, :, places[0, token]] = 1.0
        cca.attend(h[:, token : token + 1], keys[chunk : chunk + 1], one_hot, None, torch.tensor([position]))
        weights.append(read.pop().mean())
    hook.remove()
    assert attention_on_copies(model, text)[0] == pytest.approx(torch.stack(weights).mean().item(), rel=1e-4)


def test_it_reads_in_twelve_layers():
    model = make(256, layers=12, cca_layers=[6, 9, 12])
    first, second, _ = attention_on_copies(model, copying_text(model.config))
    assert min(first, second) >= 0.6


STEPS = 6  # by then attention is about as low as it gets: it falls for 4 to 8 steps, and rises after them


@pytest.mark.parametrize(
    ("size", "least"),
    [
        (dict(hidden_size=128), 0.6),
        (dict(hidden_size=256), 0.75),
        (dict(hidden_size=512, heads=8), 0.75),
        (dict(hidden_size=128, layers=12, cca_layers=(6, 9, 12)), 0.5),
    ],
)
def test_it_outlives_the_first_steps_of_training(size, least):
    model = make(**size)
    train(model, STEPS)
    text = copying_text(model.config)
    assert min(attention_on_copies(model, text)[:2]) >= least
    assert logit_gain(model, text) >= 3


def test_without_the_multiplier_the_same_steps_bury_it():
    """So that the test above can fail."""
    model = make(128, embedding_multiplier=1)
    text = copying_text(model.config)
    assert min(attention_on_copies(model, text)) >= 0.75  # norms hide the multiplier before training
    train(model, STEPS)
    assert max(attention_on_copies(model, text)) < 0.3


def test_the_start_is_what_it_says():
    model = make(128).requires_grad_(False)
    config, read = model.config, model.model.layers[1].cross_attention
    for layer in (*model.model.layers, *model.model.encoder.layers):
        assert not layer.attention.o_proj.weight.any() and not layer.feed_forward.down_proj.weight.any()
    assert not model.model.encoder.layers[0].cross_attention.o_proj.weight.any()
    identity = torch.eye(128)
    assert torch.equal(read.attention.v_proj.weight, identity)
    torch.testing.assert_close(read.attention.o_proj.weight, 0.02 * 128**0.5 * identity)
    a = ((math.log(2 * 128) + 4.5) / (0.7 * 32**0.5)) ** 0.5
    for projection in (read.attention.q_proj, read.attention.k_proj):
        assert projection.weight.diagonal().mean() == pytest.approx(a, rel=0.01)
        assert (projection.weight - a * identity).std() == pytest.approx(0.15 * a / 128**0.5, rel=0.02)
    assert (model.model.norm.weight == 8 / (0.02 * 128)).all() and (read.smear == 0.7).all()
    assert config.embedding_multiplier == 128**0.5


def test_a_plain_language_model_gets_the_same_start():
    model = make(128, cca_layers=())
    assert model.config.embedding_multiplier == 128**0.5
    assert all(not layer.feed_forward.down_proj.weight.any() for layer in model.model.layers)
    assert (model.model.norm.weight == 8 / (0.02 * 128)).all()


@pytest.mark.parametrize("given", [None, 1, 3.5])
def test_the_multiplier_is_saved_with_the_model(given, tmp_path):
    model = make(128, embedding_multiplier=given)
    model.save_pretrained(tmp_path)
    ids, neighbors, _ = copying_text(model.config)
    loaded = RetroForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_multiplier == (given or 128**0.5)
    assert torch.equal(loaded(ids, neighbors).logits, model(ids, neighbors).logits)


def test_embeddings_given_in_place_of_tokens_are_those_of_the_table():
    model = make(128)
    ids, neighbors, _ = copying_text(model.config)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert torch.equal(model(inputs_embeds=embedded, neighbor_ids=neighbors).logits, model(ids, neighbors).logits)


def test_a_resized_vocabulary_reads_on():
    model = make(128)
    text = copying_text(model.config)
    before = model(*text[:2]).logits
    model.resize_token_embeddings(8200)
    assert model(*text[:2]).logits.shape[-1] == 8200 and model.config.embedding_multiplier == 128**0.5
    torch.testing.assert_close(model(*text[:2]).logits[..., :8192], before)


@torch.no_grad()
def test_it_reads_in_bfloat16():
    model = make(128).to(torch.bfloat16)
    assert logit_gain(model, copying_text(model.config)) >= 3


def test_small_heads_are_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr("retro.model.start.logger.warning_once", said.append)
    make(128, heads=8)
    assert "head_dim is 16; with heads below 32 channels" in said[0]


def test_a_model_of_before_the_multiplier_is_read_without_one(tmp_path):
    model = make(128, embedding_multiplier=1)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("embedding_multiplier") == 1
    (tmp_path / "config.json").write_text(json.dumps(saved))
    ids, neighbors, _ = copying_text(model.config)
    assert torch.equal(RetroForCausalLM.from_pretrained(tmp_path)(ids, neighbors).logits, model(ids, neighbors).logits)
