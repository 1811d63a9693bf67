"""The pointer form against loops, and what it promises: a distribution, nothing where nothing may be read."""

import pytest
import torch
import torch.nn.functional as F

from retro.retrofit import RetrofitForCausalLM, retrofit
from retro.retrofit.hooks import HookPoint
from tests.retrofit.by_loops import chunk_read, matches, normed, real_parts, stream

IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))
M = 4


@pytest.fixture
def opened(make_fitted, open_gates):
    """opened(name): a pointer whose every weight is away from its start."""

    def make(name="llama", **options):
        model = make_fitted(name, form="pointer", **options)
        open_gates(model)
        with torch.no_grad():
            for parameter in model.form.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


def probabilities_by_loops(model, row, neighbor_ids, neighbor_mask, documents):
    """p' of every position of one row, written out from the formulas."""
    form, base = model.form, model.base
    gate, layer = form.gate, model.config.key_layer
    log_p = base(row[None]).logits[0].log_softmax(-1)
    p = log_p.exp()
    h, last = stream(base, row[None], layer)[0], stream(base, row[None], 3)[0]
    result = p.clone()
    for t in range(len(row)):
        u, scores, tokens = chunk_read(t, documents, M), [], []
        for ids in [] if u is None else real_parts(neighbor_ids[u], neighbor_mask[u]):
            scores += matches(form.matching, h, t, stream(base, ids[None], layer)[0])
            tokens += ids[1:].tolist()
        if not scores:
            continue
        scores, best = torch.cat(scores), max(scores) / form.matching.log_sharpness.exp()
        weights = (scores + form.prior * log_p[t, tokens].clamp(min=-15.0)).softmax(0)
        copied = torch.zeros_like(p[t])
        for weight, token in zip(weights, tokens, strict=True):
            copied[token] += weight
        agreement = sum(weight * p[t, token] for weight, token in zip(weights, tokens, strict=True))
        belief = normed(last[t]) @ gate.hidden + gate.bias
        belief = belief + gate.match * best + gate.likelihood * torch.log(agreement + 1e-6)
        g = torch.tanh(gate.opening.abs()) * torch.sigmoid(belief)
        result[t] = (1 - g) * p[t] + g * copied
    return result


@pytest.mark.parametrize("documents", [[0] * 14, [0] * 8 + [1] * 6])
@pytest.mark.parametrize("prior", [0.7, 0.0])
def test_logits_and_loss_are_the_formulas(prior, documents, opened, make_neighbors):
    model, neighbors = opened(rms_norm_eps=1e-6), make_neighbors(2, 3)
    with torch.no_grad():
        model.form.prior.fill_(prior)
        model.base.lm_head.weight.mul_(12.0)  # some log p(y_j) are below what counts
    assert (model.form.gate.opening.abs() > 0.5).all() and model.config.key_lags == 3
    documents_ids = torch.tensor([documents, [0] * 14])
    packed = len(set(documents)) > 1
    with torch.no_grad():
        logits = model(IDS, **neighbors, **({"document_ids": documents_ids} if packed else {})).logits
        for b, row in enumerate(IDS):
            if packed and b == 0:  # the base over each document alone; a neighbor is read in the first one only
                parts = [
                    probabilities_by_loops(model, row[:8], *(v[b, :2] for v in neighbors.values()), documents[:8]),
                    probabilities_by_loops(model, row[8:], *(v[b, 2:] for v in neighbors.values()), documents[8:]),
                ]
                expected = torch.cat(parts)
            else:
                expected = probabilities_by_loops(model, row, *(v[b] for v in neighbors.values()), [0] * 14)
            torch.testing.assert_close(logits[b].softmax(-1), expected, rtol=1e-4, atol=1e-6)
        if not packed:
            torch.testing.assert_close(logits.logsumexp(-1), model(IDS).logits.logsumexp(-1))
    labels = IDS.masked_fill(torch.rand(IDS.shape) < 0.2, -100)
    expected = F.cross_entropy(
        model(IDS, **neighbors).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(model(IDS, **neighbors, labels=labels).loss, expected)
    torch.testing.assert_close(model.train()(IDS, **neighbors, labels=labels).loss, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_the_loss_in_slices(name, opened, make_neighbors, monkeypatch):
    """Whatever the slices, for a plain output matrix and for others, with and without logits; and its gradients."""
    from retro.retrofit import loss as loss_module
    from retro.retrofit import pointer

    model, neighbors, results = opened(name), make_neighbors(2, 3), []
    for tokens, logits in ((1000, 2**25), (6, 2**25), (1000, 6 * model.config.vocab_size)):
        monkeypatch.setattr(loss_module, "SLICE_TOKENS", tokens)
        monkeypatch.setattr(loss_module, "SLICE_LOGITS", logits)
        monkeypatch.setattr(pointer, "SLICE_TOKENS", tokens)
        for lean in (True, False):
            model.zero_grad()
            out = model(IDS, **neighbors, labels=IDS, return_logits=not lean)
            out.loss.backward()
            assert (out.logits is None) == lean
            results.append((out.loss.detach(), [p.grad.clone() for p in model.form.parameters()]))
            if not lean:
                expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
                torch.testing.assert_close(out.loss, expected)
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_it_finds_what_the_text_repeats(make_fitted):
    """A text copied from its neighbor: the pointer as it starts stands on the next token, from the fourth on."""
    model = make_fitted(form="pointer", retrieved_len=14)
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:14][None] + 3
    neighbor_ids = torch.stack([ids.flip(1), ids], 1)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        model.form.gate.opening.fill_(3.0)
        p = model(ids, neighbor_ids).logits.softmax(-1)
    found = p[0, M - 1 : -1].gather(-1, ids[0, M:, None])[:, 0]
    base = model(ids).logits.softmax(-1)[0, M - 1 : -1].gather(-1, ids[0, M:, None])[:, 0]
    assert (found > 5 * base).all() and found.mean() > 0.3


def test_extreme_logits_stay_finite(make_fitted, make_neighbors, open_gates):
    """A base so sure that probabilities underflow, and a gate driven fully open."""
    model, neighbors = make_fitted(form="pointer"), make_neighbors(2, 3)
    open_gates(model, to=50.0)
    with torch.no_grad():
        model.base.lm_head.weight.mul_(1e3)
        model.form.gate.bias.fill_(1e3)
    out = model(IDS, **neighbors, labels=IDS, return_logits=True)
    assert out.logits.isfinite().all() and out.loss.isfinite()
    torch.testing.assert_close(out.logits.logsumexp(-1), model(IDS).logits.logsumexp(-1))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.form.parameters())


def test_the_gate_is_alive_on_both_sides_of_0(make_fitted, make_neighbors):
    model, neighbors = make_fitted(form="pointer"), make_neighbors(2, 3)
    logits = []
    for sign in (1, -1):
        with torch.no_grad():
            model.form.gate.opening.fill_(0.7 * sign)
        logits.append(model(IDS, **neighbors).logits)
    assert torch.equal(*logits) and not torch.equal(logits[0], model(IDS).logits)


def test_the_start_is_the_same_every_time(make_base):
    base = make_base()
    one, two = (retrofit(base, form="pointer", chunk_len=4, retrieved_len=8).form.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert torch.equal(one["matching.key.weight"], torch.eye(16)) and one["matching.key.bias"].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba", {}),
        ("recurrent_gemma", {}),
        ("falcon_h1", dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8)),
    ],
)
def test_bases_without_a_place_for_cca(name, changes, make_base, make_neighbors, open_gates):
    """Nothing is written inside a layer, so that no self-attention is needed there."""
    base = make_base(name, **changes)
    model, neighbors = retrofit(base, form="pointer", chunk_len=4, retrieved_len=8), make_neighbors(2, 3)
    expected = base(IDS).logits
    assert torch.equal(model(IDS, **neighbors).logits, expected)
    open_gates(model)
    after = model(IDS, **neighbors).logits
    assert not torch.equal(after, expected)
    ids = IDS.clone()
    ids[:, 11] = (ids[:, 11] + 5) % 61 + 3
    torch.testing.assert_close(model(ids, **neighbors).logits[:, :11], after[:, :11], rtol=1e-4, atol=1e-5)


def test_options(make_base, make_fitted, make_neighbors, open_gates, tmp_path):
    model = make_fitted(form="pointer", key_layer=3, key_lags=0)
    assert model.form.hook_points == [HookPoint(3, "end")] and model.form.matching.lags.tolist() == [1.0]
    open_gates(model)
    model.save_pretrained(tmp_path)
    loaded = RetrofitForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert (loaded.config.key_layer, loaded.config.key_lags) == (3, 0)
    assert torch.equal(loaded(IDS, **make_neighbors(2, 3)).logits, model(IDS, **make_neighbors(2, 3)).logits)


def test_what_is_trained_in_the_base_gets_its_gradient(opened, make_neighbors):
    """As with adapters on the base: through the base's probabilities, the gate and the queries."""
    model, neighbors, gradients = opened().train(), make_neighbors(2, 3), []
    weight = model.base.model.layers[0].mlp.up_proj.weight.requires_grad_()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for lean in (True, False):
            model.zero_grad()
            out = model(IDS, **neighbors, labels=IDS, return_logits=not lean)
            loss = out.loss if lean else F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            gradients.append(weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)


def test_logits_of_some_positions(opened, make_neighbors):
    model, neighbors = opened(), make_neighbors(2, 3)
    logits = model(IDS, **neighbors).logits
    torch.testing.assert_close(model(IDS, **neighbors, logits_to_keep=3).logits, logits[:, -3:])
    places = torch.tensor([2, 11])
    torch.testing.assert_close(model(IDS, **neighbors, logits_to_keep=places).logits, logits[:, places])
