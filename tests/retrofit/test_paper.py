"""The paper's form with the reading start: CCA against loops, what the start is made of, and that it reads."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retro.retrofit import retrofit
from retro.retrofit.hooks import HookPoint
from retro.retrofit.starts import RIDGE, observe, ridge
from tests.retrofit.by_loops import chunk_read, matches, normed, real_parts, stream
from tests.retrofit.conftest import forms

M = 4
IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))
WHOLE = [0] * 14


@pytest.fixture
def around_cca():
    """around_cca(model, **inputs): for each layer of P the stream before and after CCA, as Llama's own parts see it."""

    def run(model, ids, **inputs):
        entered, before, after, handles = {}, {}, {}, []
        for number in model.config.cca_layers:
            layer = model.base.model.layers[number - 1]

            def enters(module, args, number=number):
                entered[number] = args[0]

            def attends(module, args, out, number=number):
                before[number] = entered[number] + out[0]

            def goes_on(module, args, number=number):
                after[number] = args[0]

            handles += [
                layer.register_forward_pre_hook(enters),
                layer.self_attn.register_forward_hook(attends, prepend=True),
                layer.post_attention_layernorm.register_forward_pre_hook(goes_on),
            ]
        with torch.no_grad():
            model(ids, **inputs)
        for handle in handles:
            handle.remove()
        return before, after

    return run


def update_by_loops(model, cca, h, first_h, neighbor_ids, neighbor_mask, documents):
    """tanh|g| W_o sum_j a_t(j) W_v E(j + 1) of every token of one row, written out from the formulas."""
    result = torch.zeros_like(h)
    for t in range(len(h)):
        u, scores, values = chunk_read(t, documents, M), [cca.sink], [torch.zeros(h.shape[1])]
        for ids in [] if u is None else real_parts(neighbor_ids[u], neighbor_mask[u]):
            features = normed(stream(model.base, ids[None], model.config.key_layer))[None, None]
            encoded = model.form.encoder(features, None, first_h[None, None, u * M : (u + 1) * M])[0, 0, 0]
            scores += matches(cca.matching, h, t, encoded)
            values += [cca.value.weight @ e for e in encoded[1:]]
        attention = torch.cat(scores).softmax(0)
        read = sum(a * value for a, value in zip(attention, values, strict=True))
        result[t] = torch.tanh(cca.gate.abs()) * (cca.out.weight @ read)
    return result


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("documents", [WHOLE, [0] * 8 + [1] * 6, [0] * 6 + [1] * 8], ids=str)
def test_cca_is_the_formulas(documents, at_start, make_fitted, make_neighbors, open_gates, around_cca):
    """In both layers; documents end at the border of a chunk and inside one."""
    model, neighbors = make_fitted(), make_neighbors(2, 3)
    with torch.no_grad():
        if not at_start:
            open_gates(model)
            for parameter in model.form.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for cca in model.form.cca.values():
            cca.gate.fill_(-0.8)
            cca.sink.fill_(3.0)
    assert model.config.key_lags == 3 and not neighbors["neighbor_mask"].all()
    rows = [documents, WHOLE]
    packed = {} if documents == WHOLE else {"document_ids": torch.tensor(rows)}
    check_loops(model, IDS, neighbors, rows, around_cca, packed)


def check_loops(model, ids, neighbors, rows, around_cca, given, lengths=(14, 14)):
    before, after = around_cca(model, ids, **neighbors, **given)
    first = model.config.cca_layers[0]
    for number, cca in model.form.cca.items():
        for b, (documents, n) in enumerate(zip(rows, lengths, strict=True)):
            h, first_h = before[int(number)][b, :n], before[first][b, :n]
            with torch.no_grad():
                own = [x[b] for x in neighbors.values()]
                expected = update_by_loops(model, cca, h, first_h, *own, documents)
            update = after[int(number)][b, :n] - h
            assert expected.abs().max() > 0.05
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_cca_of_a_shorter_row(make_fitted, make_neighbors, open_gates, around_cca):
    """Padded on the left; inside the run its tokens stand first."""
    model, neighbors = make_fitted(), make_neighbors(2, 3)
    open_gates(model)
    neighbors["neighbor_mask"][1, 2:] = False
    mask = torch.tensor([[1] * 14, [0] * 5 + [1] * 9])
    check_loops(model, IDS, neighbors, [WHOLE, WHOLE], around_cca, {"attention_mask": mask}, (14, 9))


def test_one_neighbor_token_gives_nothing_to_read(make_fitted, make_neighbors, open_gates):
    """Its value would be the token after it."""
    model, neighbors = make_fitted(), make_neighbors(2, 3)
    open_gates(model)
    neighbors["neighbor_mask"][..., 1:] = False
    assert neighbors["neighbor_mask"].any()
    torch.testing.assert_close(model(IDS, **neighbors).logits, model(IDS).logits)


@pytest.mark.parametrize("form", ["pointer", "paper", "joint"])
def test_the_base_reads_each_neighbor_once_and_none_that_is_missing(form, make_fitted, make_neighbors, monkeypatch):
    model, neighbors, read = make_fitted(form=form), make_neighbors(2, 3), []
    plain = model.hidden_after

    def hidden_after(ids, mask, layer):
        read.append(mask.any(-1).tolist())
        return plain(ids, mask, layer)

    monkeypatch.setattr(model, "hidden_after", hidden_after)
    neighbors["neighbor_mask"][1, 1] = False
    model(IDS, **neighbors)
    assert read == [[True] * 9]


def test_the_encoder_adds_nothing_at_first(make_fitted, make_neighbors):
    """E is what the base makes of the neighbors; the conditions count as soon as anything is learned."""
    model, neighbors = make_fitted(encoder_num_layers=2), make_neighbors(2, 3)
    features, mask = torch.randn(2, 3, 2, 8, 16), neighbors["neighbor_mask"]
    encode = lambda: model.form.encoder(normed(features), mask, 10 * torch.randn(2, 3, 4, 16))  # noqa: E731
    torch.testing.assert_close(encode(), normed(features))
    with torch.no_grad():
        model.form.encoder.layers[0].cross_attention.o_proj.weight.add_(0.1)
    assert not torch.allclose(encode(), normed(features), atol=0.01)


@forms
def test_a_second_start_is_the_first(form, make_fitted):
    """Whatever has been learned in between; and a start of a text is another one."""
    model = make_fitted(form=form)
    text = torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(0))
    states = []
    for given in (None, None, text):
        with torch.no_grad():
            for parameter in model.form.parameters():
                parameter.add_(torch.randn_like(parameter))
        torch.manual_seed(3)
        model.start(given)
        states.append(copy.deepcopy(model.form.state_dict()))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    differ = [name for name, value in states[0].items() if not torch.equal(value, states[2][name])]
    assert bool(differ) == (form != "random") and all("matching" in name or "out" in name for name in differ)


def test_ridge_is_least_squares_with_a_penalty():
    """Against numpy's solution with a row for each penalized weight."""
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, width, generator=generator) + 2 for width in (7, 3))
    x[:, 0] *= 10
    weight, bias = ridge(x, y)
    x, y = (one.double().numpy() for one in (x, y))
    centered = x - x.mean(0)
    penalty = RIDGE * (centered**2).sum(0).mean()
    rows = np.concatenate([centered, penalty**0.5 * np.eye(7)]), np.concatenate([y - y.mean(0), np.zeros((7, 3))])
    expected = np.linalg.lstsq(*rows)[0].T
    np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bias, y.mean(0) - expected @ x.mean(0), rtol=1e-3, atol=1e-4)
    unpenalized = np.linalg.lstsq(centered, y - y.mean(0))[0].T
    assert not np.allclose(weight, unpenalized, rtol=1e-3, atol=1e-5)
    constant, kept = ridge(torch.zeros(5, 2), torch.full((5, 1), 3.0))
    assert not constant.any() and kept.item() == 3.0


def seen_of(model, text):
    return observe(model.base, model.anatomy, model.config, model.form.start_points, text)


def test_observe_gives_what_the_base_makes_of_a_text(make_base, make_fitted, around_cca):
    """More rows than are run at once, of a model in training mode, which stays in it, and without its dropout."""
    model = make_fitted(base=make_base(attention_dropout=0.5), form="joint").train()
    text = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(0))
    seen = seen_of(model, text)
    assert model.base.training
    model.eval()
    before, after = around_cca(model, text)
    assert torch.equal(seen.tokens, text[:, 1:].flatten())
    torch.testing.assert_close(seen.features, normed(stream(model.base, text, 1))[:, 1:].flatten(0, 1))
    assert set(seen.streams) == {HookPoint(2, "attention"), HookPoint(3, "attention")}
    for number in (2, 3):
        assert torch.equal(before[number], after[number])
        torch.testing.assert_close(seen.streams[HookPoint(number, "attention")], before[number][:, 1:].flatten(0, 1))
    assert torch.equal(seen.embeddings, model.base.lm_head.weight)


@pytest.mark.parametrize(("form", "layers"), [("pointer", 1), ("paper", 2), ("random", 0), ("joint", 2)])
def test_a_start_runs_once_up_to_what_it_reads(form, layers, make_fitted):
    """Over two batches of rows; and no hook stays."""
    model, ran = make_fitted(form=form, **({} if form == "pointer" else {"cca_layers": [2]})), []
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules()]  # noqa: E731
    for number, layer in enumerate(model.base.model.layers, start=1):
        layer.self_attn.register_forward_hook(lambda m, args, out, number=number: ran.append(number))
    before = hooks()
    model.start(torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(0)))
    assert ran == 2 * list(range(1, layers + 1)) and hooks() == before


def test_layers_of_several_streams_are_refused(make_base):
    from retro.retrofit import anatomy

    base = make_base()
    for layer in base.model.layers:
        layer.register_forward_hook(lambda m, args, out: anatomy.with_first(out, anatomy.first_tensor(out)[None]))
    for reader in (*base.model.layers[1:], base.model.norm):  # so that the base itself runs
        reader.register_forward_pre_hook(lambda m, args: (args[0][0], *args[1:]))
    with pytest.raises(ValueError, match=r"layer 1 gives \[1, 4, 64, 16\], not one stream of its width 16"):
        retrofit(base, form="pointer", chunk_len=4, retrieved_len=8)


def test_a_text_longer_than_the_bases_positions(make_fitted):
    model, text = make_fitted("gpt2"), torch.randint(3, 64, (3, 80), generator=torch.Generator().manual_seed(0))
    seen = seen_of(model, text)
    assert torch.equal(seen.tokens, text[:, 1:64].flatten()) and len(seen.features) == 3 * 63
    model.start(text)
    for short in (text[:, :1], text[:0], text[0]):
        with pytest.raises(ValueError, match="text has shape .*; give rows of at least 2 tokens"):
            model.start(short)
    for other in ("some text", text.tolist(), text.float()):
        with pytest.raises(ValueError, match="text is .*; give a tensor of token ids"):
            model.start(other)


class Positions(torch.nn.Module):
    """In the place of W_v: the value of token j of neighbor i is the unit vector of r i + j."""

    def forward(self, encoded):
        c, k, r, d = encoded.shape
        return torch.eye(d)[: k * r].view(k, r, d).expand(c, k, r, d)


@pytest.fixture
def untrained():
    """A base whose stream is its token embeddings and a little of what its layers write, in every layer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    torch.nn.init.normal_(base.model.embed_tokens.weight)
    return base


def attention_of(model, number, text, found):
    """What one layer attends to: its values are made the places of the tokens, and other layers stay shut."""
    model, seen = copy.deepcopy(model), []
    cca = getattr(model.form, "paper", model.form).cca[number]
    cca.value, cca.out = Positions(), torch.nn.Identity()
    cca.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        cca.gate.fill_(20.0)
        model(text, found[:, None].repeat(1, 4, 1, 1))
    return seen[0]


@pytest.mark.parametrize("form", ["paper", "joint"])
def test_it_reads_before_it_is_trained(form, untrained):
    """The start of a text: attention falls on what followed the match, on the sink without one, and W_o says it."""
    fit = dict(chunk_len=4, retrieved_len=16, encoder_num_layers=1)
    model = retrofit(untrained, form=form, **fit)
    generator = torch.Generator().manual_seed(1)
    model.start(torch.randint(0, 64, (16, 64), generator=generator))
    ids = torch.randperm(64, generator=generator)[None]
    text, same, other = ids[:, :16], ids[:, :16], ids[:, 16:32]
    found, nothing = torch.stack([other, same], 1), torch.stack([other, ids[:, 32:48]], 1)
    paper = getattr(model.form, "paper", model.form)
    assert model.config.cca_layers == [4, 5] and model.config.key_layer == 1
    for number in paper.cca:
        matched, unmatched = (attention_of(model, number, text, given) for given in (found, nothing))
        for t in range(3, 15):
            assert matched[t].argmax() == 16 + t + 1 and matched[t].max() > 0.9, (number, t)
        assert (unmatched.sum(-1) < 0.1).all() and (matched.sum(-1) < 1.001).all()
    with torch.no_grad():
        for cca in paper.cca.values():
            cca.gate.fill_(20.0)
    on, off = model(text, found[:, None].repeat(1, 4, 1, 1)).logits, model(text).logits
    assert (on[0, 3:15].argmax(-1) == text[0, 4:]).all()
    assert (off[0, 3:15].argmax(-1) == text[0, 4:]).float().mean() < 0.2
