"""Attention by blocks against the textbook formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.modules import blockwise
from retro.modules.attention import Attention
from retro.modules.blockwise import blockwise_attention, suits_blocks


def textbook(q, k, v, mask=None, is_causal=False):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def drawn(b, h, i, j, dh, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, h, dh, generator=generator, dtype=torch.float64).transpose(1, 2) for n in (i, j, j)]


def a_mask(b, i, j, seed=0):
    mask = torch.rand(b, 1, i, j, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0] = True
    return mask


@settings(max_examples=40)
@given(
    b=st.integers(1, 5), h=st.integers(1, 3), i=st.integers(1, 40), j=st.integers(1, 40), kind=st.integers(0, 4),
    scores=st.sampled_from([1, 64, 1000, 1 << 19]), queries=st.sampled_from([1, 7, 64]),
)  # fmt: skip
def test_agrees_with_the_formula_however_it_is_cut(b, h, i, j, kind, scores, queries):
    i = j if kind == 1 else i
    mask = {2: a_mask(b, i, j), 3: a_mask(1, i, j), 4: a_mask(b, 1, j)}.get(kind)
    q, k, v = (x.requires_grad_() for x in drawn(b, h, i, j, 8))
    grad = torch.randn(b, h, i, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BLOCK_SCORES", scores)
        patch.setattr(blockwise, "_BLOCK_QUERIES", queries)
        patch.setattr(blockwise, "_CAUSAL_BLOCK_QUERIES", queries)
        out = blockwise_attention(q, k, v, mask, kind == 1)
        found = torch.autograd.grad(out, (q, k, v), grad)
    expected = textbook(q, k, v, mask, kind == 1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_large_scores_do_not_overflow():
    q, k, v = (x.float() * 100 for x in drawn(1, 2, 20, 20, 16))
    out = blockwise_attention(q, k, v, None, True)
    expected = textbook(q.double(), k.double(), v.double(), None, True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=0.1)
    assert out.isfinite().all()


def test_the_module_takes_blocks_for_short_texts_only(monkeypatch):
    calls = []
    monkeypatch.setattr("retro.modules.attention.blockwise_attention", lambda q, k, v, *_: calls.append(q.shape) or q)
    attention = Attention(16, 2, 8)
    for n in (1, 16, 512, 513):
        attention(torch.randn(1, n, 16), is_causal=True)
    assert [shape[2] for shape in calls] == [16, 512]
    calls.clear()
    Attention(16, 2, 8, num_key_value_heads=1)(torch.randn(1, 32, 16))
    Attention(16, 2, 8, position="relative")(torch.randn(1, 32, 16))
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 32, 16))
    attention.double()(torch.randn(1, 32, 16, dtype=torch.float64))
    assert not calls


def test_blocks_are_the_same_as_the_fused_kernel_in_a_module(monkeypatch):
    attention = Attention(32, 4, 8)
    x, mask = torch.randn(3, 40, 32), a_mask(3, 40, 40)[:, 0]
    x.requires_grad_()
    results = []
    for blocks in (True, False):
        monkeypatch.setattr("retro.modules.attention.suits_blocks", suits_blocks if blocks else lambda *_: False)
        for options in ({"mask": mask}, {"is_causal": True}, {}):
            out = attention(x, **options)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *attention.parameters()))))
    for one, other in zip(results[:3], results[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_blocks_cannot_do_goes_to_the_fused_kernel():
    attention = Attention(16, 2, 8)
    x, weights = torch.randn(2, 20, 16), dict(attention.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(attention, weights, (x,), {"is_causal": True}).square().sum()

    one = torch.func.grad(loss)(weights, x)["q_proj.weight"]
    torch.testing.assert_close(one, torch.autograd.grad(loss(weights, x), attention.q_proj.weight)[0])
    assert attention(x, torch.randn(2, 0, 16)).shape == x.shape  # no keys at all
    q, long = torch.randn(1, 16, 64, 8), torch.randn(1, 16, 4096, 8)
    assert suits_blocks(q, q, q, None) and not suits_blocks(q, long, long, None)


def test_a_default_device_changes_nothing():
    q, k, v = (x.float() for x in drawn(1, 2, 20, 20, 8))
    with torch.device("meta"):
        out = blockwise_attention(q, k, v, None, True)
    torch.testing.assert_close(out, textbook(q, k, v, None, True))
