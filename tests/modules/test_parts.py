"""Attention, feed-forward and loss against torch's own, and their refusals."""

import pytest
import torch
import torch.nn.functional as F

from retro.modules import Attention, FeedForward, linear_cross_entropy
from retro.modules.norm import RMSNorm


def test_attention_at_position_zero_is_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3, 4), torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    mask = torch.rand(2, 1, 7) > 0.3
    mask[:, :, 0] = True
    nowhere = dict(query_positions=torch.zeros(5, dtype=torch.long), key_positions=torch.zeros(7, dtype=torch.long))
    expected = theirs(x, context, context, key_padding_mask=~mask[:, 0], need_weights=False)[0]
    torch.testing.assert_close(ours(x, keys=context, mask=mask, **nowhere), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_grouped_queries_equal_repeated_heads(position):
    torch.manual_seed(0)
    grouped, full = Attention(12, 4, 4, 2, position=position), Attention(12, 4, 4, position=position)
    full.load_state_dict(
        grouped.state_dict()
        | {
            f"{name}.weight": getattr(grouped, name).weight.view(2, 1, 4, 12).expand(2, 2, 4, 12).reshape(16, 12)
            for name in ("k_proj", "v_proj")
        }
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(grouped(x, is_causal=True), full(x, is_causal=True), rtol=1e-4, atol=1e-5)


def test_nothing_to_attend_is_finite_with_finite_gradients():
    attention = Attention(8, 2, 4, position="relative")
    x = torch.randn(1, 3, 8, requires_grad=True)
    out = attention(x, mask=torch.zeros(1, 1, 3, dtype=torch.bool))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(num_heads=4, head_dim=4, num_key_value_heads=3), "does not divide"),
        (dict(num_heads=4, head_dim=3), "even head size"),
        (dict(num_heads=4, head_dim=4, position="absolute"), "choose one of rotary, relative"),
    ],
)
def test_attention_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        Attention(16, **arguments)


def test_feed_forward_forms():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    plain, gated = FeedForward(8, 16, "relu"), FeedForward(8, 16, "silu", gated=True)
    torch.testing.assert_close(plain(x), F.relu(x @ plain.up_proj.weight.T) @ plain.down_proj.weight.T)
    inner = F.silu(x @ gated.gate_proj.weight.T) * (x @ gated.up_proj.weight.T)
    torch.testing.assert_close(gated(x), inner @ gated.down_proj.weight.T)
    with pytest.raises(ValueError, match="hidden_act is 'tanh'"):
        FeedForward(8, 16, "tanh")


@pytest.mark.parametrize("slice_tokens", [1, 4, 7, 100])
def test_linear_cross_entropy_equals_torch(slice_tokens):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(0, 11, (9,))
    labels[2:4] = -100
    expected = F.cross_entropy(hidden @ weight.T, labels)
    loss = linear_cross_entropy(hidden, weight, labels, slice_tokens)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, [hidden, weight]),
        torch.autograd.grad(3 * expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_without_labels_is_zero():
    hidden = torch.randn(4, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 6), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


def test_linear_cross_entropy_under_autocast():
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(0, 11, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels), rtol=2e-2, atol=2e-2)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 4, 12)])
def test_rms_norm_equals_torch(shape):
    torch.manual_seed(0)
    ours, theirs = RMSNorm(12, eps=1e-3), torch.nn.RMSNorm(12, eps=1e-3)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.uniform_(0.5, 2.0))
    x, weighting = torch.randn(shape, requires_grad=True), torch.randn(shape)
    results = []
    for norm in (ours, theirs):
        out = norm(x)
        results.append([out, *torch.autograd.grad((out * weighting).sum(), [x, norm.weight])])
    assert "FewPasses" in str(results[0][0].grad_fn)
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_rms_norm_leaves_other_types_to_torch():
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    norm = RMSNorm(8, eps=1e-6).bfloat16()
    assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-6))


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_documents_by_their_lengths_attend_as_by_a_mask(position):
    torch.manual_seed(0)
    attention = Attention(12, 2, 6, position=position)
    x = torch.randn(2, 9, 12, requires_grad=True)
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 1 + [3] * 6 + [4] * 2])
    mask = (ids[:, :, None] == ids[:, None, :]).tril()
    results = []
    for given in (dict(mask=mask), dict(is_causal=True, lengths=(4, 5, 1, 6, 2))):
        out = attention(x, **given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, attention.k_proj.weight])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
