"""The induction-ready start reads at every width: before training, and after its first noisy steps."""

import math

import pytest
import torch

from retro.config import RetroConfig
from retro.model import RetroForCausalLM
from retro.settings import find_config, read_yaml
from retro.train.optimizer import parameter_groups

RECIPE = read_yaml(find_config("train_small", "train"))


def make(hidden_size: int, layers: int = 4, cca_layers=(2, 4), heads: int = 4, **overrides) -> RetroForCausalLM:
    """The model of the recipe at another size."""
    torch.manual_seed(0)
    size = dict(hidden_size=hidden_size, num_attention_heads=heads, num_hidden_layers=layers, cca_layers=cca_layers)
    return RetroForCausalLM(RetroConfig(vocab_size=8192, **{**RECIPE["model"], **size, **overrides})).eval()


def copying_text(model: RetroForCausalLM, b: int = 2, num_chunks: int = 4, k: int = 2, seed: int = 0):
    """Random tokens [b, n] and neighbors [b, l, k, r] in one of which the last token of C_u and the half chunk after it
    stand somewhere; and for each token the place (of k * r) of the token after it, -1 where it is not copied."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    m, r = config.chunk_len, config.retrieved_len
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=generator)  # noqa: E731
    ids, neighbors = draw(config.vocab_size, b, num_chunks * m), draw(config.vocab_size, b, num_chunks, k, r)
    places, copied = torch.full(ids.shape, -1), m // 2
    for row in range(b):
        for u in range(num_chunks - 1):
            last, start, which = (u + 1) * m - 1, int(draw(r - copied, 1)), int(draw(k, 1))
            neighbors[row, u, which, start : start + copied + 1] = ids[row, last : last + copied + 1]
            places[row, last : last + copied] = which * r + start + 1 + torch.arange(copied)
    return ids, neighbors, places


@torch.no_grad()
def attention_on_copies(model: RetroForCausalLM, ids, neighbors, places) -> list[float]:
    """For each layer of P the attention on the token to copy, a mean over heads and over the tokens that are copied."""
    read = []
    ccas = [layer.cross_attention for layer in model.model.layers if layer.cross_attention is not None]
    handles = [cca.register_forward_pre_hook(lambda cca, given: read.append((cca, *given[:2]))) for cca in ccas]
    model(ids, neighbors)
    for handle in handles:
        handle.remove()
    return [_on_copies(*given, places) for given in read]


def _on_copies(cca, h, encoded, places) -> float:
    """Scores made here, token by token, from what went into CCA."""
    heads, m, weights = cca.attention.num_heads, cca.chunk_len, []
    keys = cca.keys_and_values(encoded)[0].flatten(2, 3).unflatten(0, (len(h), -1))  # [b, l, h, kr, dh]
    queries = cca.attention.q_proj(h).unflatten(-1, (heads, -1))  # [b, n, h, dh]
    for row, token in (places >= 0).nonzero().tolist():
        chunk = (token + 1) // m - 1  # C_u+ begins with the last token of C_u
        scores = keys[row, chunk] @ queries[row, token][..., None] * queries.shape[-1] ** -0.5  # [h, kr, 1]
        weights.append(scores.softmax(1)[:, places[row, token]].mean())
    return torch.stack(weights).mean().item()


@torch.no_grad()
def logit_gain(model: RetroForCausalLM, ids, neighbors, places) -> float:
    """How far neighbors raise the logit of the token to copy above those of all tokens, in nats."""
    moved = model(ids, neighbors).logits - model(ids).logits
    followed = moved[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] - moved[:, :-1].mean(-1)
    return followed[places[:, :-1] >= 0].mean().item()


def train(model: RetroForCausalLM, steps: int) -> None:
    """Steps of the recipe, at its full learning rate, on text that is new at each."""
    ratio = RECIPE["lr_width"] / model.config.hidden_size
    groups = parameter_groups(model, RECIPE["weight_decay"], RECIPE.get("lr_ratios", {}), width_ratio=ratio)
    groups = [{**group, "lr": RECIPE["lr"] * group["lr_ratio"]} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        ids, neighbors, _ = copying_text(model, seed=1 + step)
        model(ids, neighbors, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("d", "heads"), [(128, 4), (256, 4), (256, 8), (512, 8)])
def test_it_reads_at_every_width_before_training(d, heads):
    model = make(d, heads=heads)
    text = copying_text(model)
    assert min(attention_on_copies(model, *text)) >= 0.75
    assert logit_gain(model, *text) >= 3


def test_it_reads_in_twelve_layers():
    model = make(256, layers=12, cca_layers=[6, 9, 12])
    first, second, _ = attention_on_copies(model, *copying_text(model))
    assert min(first, second) >= 0.6


@pytest.mark.parametrize("d", [128, 256])
def test_it_outlives_the_first_steps_of_training(d):
    model = make(d)
    train(model, 20)
    text = copying_text(model)
    assert min(attention_on_copies(model, *text)) >= 0.6
    assert logit_gain(model, *text) >= 3


def test_without_the_multiplier_the_same_steps_bury_it():
    """So that the test above can fail."""
    model = make(128, embedding_multiplier=1)
    text = copying_text(model)
    assert min(attention_on_copies(model, *text)) >= 0.75  # norms hide the multiplier before training
    train(model, 20)
    assert max(attention_on_copies(model, *text)) < 0.3


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
    ids, neighbors, _ = copying_text(model)
    loaded = RetroForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_multiplier == (given or 128**0.5)
    assert torch.equal(loaded(ids, neighbors).logits, model(ids, neighbors).logits)


def test_embeddings_given_in_place_of_tokens_are_those_of_the_table():
    model = make(128)
    ids, neighbors, _ = copying_text(model)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert torch.equal(model(inputs_embeds=embedded, neighbor_ids=neighbors).logits, model(ids, neighbors).logits)


def test_a_resized_vocabulary_reads_on():
    model = make(128)
    text = copying_text(model)
    before = model(*text[:2]).logits
    model.resize_token_embeddings(8200)
    assert model(*text[:2]).logits.shape[-1] == 8200 and model.config.embedding_multiplier == 128**0.5
    torch.testing.assert_close(model(*text[:2]).logits[..., :8192], before)


@torch.no_grad()
def test_it_reads_in_bfloat16_and_compiled():
    model = make(128)
    text = copying_text(model)
    plain = model(*text[:2]).logits
    torch.testing.assert_close(torch.compile(model)(*text[:2]).logits, plain, rtol=1e-4, atol=1e-4)
    model.to(torch.bfloat16)
    assert logit_gain(model, *text) >= 3


def test_small_heads_are_warned_of(caplog):
    make(128, heads=8)
    assert "head_dim is 16; with heads below 32" in caplog.text
