"""CCA's place against blocks written out by hand: the paper's RETRO block inside Llama and GPT-2."""

import pytest
import torch

from retro.modules.encoder import chunks_of

IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(3))


def read(model, number, h, neighbors, state):
    """H + CCA(H, E) of a layer, as the paper writes it."""
    form = model.form
    if "encoded" not in state:
        embedded = model.base.get_input_embeddings()(neighbors["neighbor_ids"])
        state["encoded"] = form.encoder(embedded, neighbors["neighbor_mask"], chunks_of(h, 4))
    cca = form.cca[str(number)]
    update = cca.cross_attention(cca.norm(h), state["encoded"], neighbors["neighbor_mask"])
    return h + torch.tanh(cca.gate) * update


def causal(scores):
    n = scores.shape[-1]
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf")).softmax(-1)


def heads(x, number):
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def llama_by_hand(model, ids, neighbors):
    base, config = model.base, model.base.config
    h, state = base.model.embed_tokens(ids), {}
    cos, sin = base.model.rotary_emb(h, torch.arange(ids.shape[1])[None])

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    for number, layer in enumerate(base.model.layers, start=1):
        x, attention = layer.input_layernorm(h), layer.self_attn
        q = rotated(heads(attention.q_proj(x), config.num_attention_heads))
        k = rotated(heads(attention.k_proj(x), config.num_key_value_heads)).repeat_interleave(2, 1)
        v = heads(attention.v_proj(x), config.num_key_value_heads).repeat_interleave(2, 1)
        out = causal(q @ k.mT / q.shape[-1] ** 0.5) @ v
        h = h + attention.o_proj(out.transpose(1, 2).flatten(2))
        if number in model.config.cca_layers:
            h = read(model, number, h, neighbors, state)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return base.lm_head(base.model.norm(h))


def gpt2_by_hand(model, ids, neighbors):
    base = model.base
    h, state = base.transformer.wte(ids) + base.transformer.wpe(torch.arange(ids.shape[1])), {}
    for number, layer in enumerate(base.transformer.h, start=1):
        q, k, v = (heads(x, 2) for x in layer.attn.c_attn(layer.ln_1(h)).chunk(3, -1))
        out = causal(q @ k.mT / q.shape[-1] ** 0.5) @ v
        h = h + layer.attn.c_proj(out.transpose(1, 2).flatten(2))
        if number in model.config.cca_layers:
            h = read(model, number, h, neighbors, state)
        h = h + layer.mlp(layer.ln_2(h))
    return base.lm_head(base.transformer.ln_f(h))


@pytest.mark.parametrize(("name", "by_hand"), [("llama", llama_by_hand), ("gpt2", gpt2_by_hand)])
def test_the_block_is_the_papers(name, by_hand, make_fitted, make_neighbors, open_gates):
    model, neighbors = make_fitted(name, form="random"), make_neighbors(2, 3)
    open_gates(model)
    with torch.no_grad():
        ours, written_out = model(IDS, **neighbors).logits, by_hand(model, IDS, neighbors)
        assert not torch.allclose(ours, model(IDS).logits, atol=1e-2)
    torch.testing.assert_close(ours, written_out, rtol=1e-5, atol=1e-5)
