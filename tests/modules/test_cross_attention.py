"""Chunked cross-attention: alignment, distances and the specification's edge cases 1-7."""

import pytest
import torch

from retro.modules.cross_attention import (
    ChunkedCrossAttention,
    attending_chunks,
    cca_positions,
    in_sequence,
    may_read,
    read_chunks,
)
from retro.modules.positions import RelativePositions, apply_rotary, rotary_table

M, R = 4, 8


def cca(**options) -> ChunkedCrossAttention:
    torch.manual_seed(0)
    module = ChunkedCrossAttention(16, 12, M, num_heads=2, head_dim=8, **options)
    return module


def inputs(n: int, b: int = 2, k: int = 2, seed: int = 0):
    torch.manual_seed(seed)
    return torch.randn(b, n, 16), torch.randn(b, n // M, k, R, 12), torch.ones(b, n // M, k, R, dtype=torch.bool)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 10, 11, 16])
def test_attending_chunks_are_the_last_token_and_the_next_m_minus_1(n):
    tokens = torch.arange(n).float()[None, :, None]
    chunks = attending_chunks(tokens + 1, M)[0, :, :, 0]
    for u in range(1, n // M + 1):
        expected = [t + 1 if t < n else 0 for t in range(u * M - 1, u * M - 1 + M)]
        assert chunks[u - 1].tolist() == expected
    restored = in_sequence(attending_chunks(tokens + 1, M), n)[0, :, 0]
    assert restored.tolist() == [0.0] * (M - 1) + [t + 1.0 for t in range(M - 1, n)]


@pytest.mark.parametrize(("m", "r", "k"), [(64, 128, 2), (4, 8, 3), (1, 3, 1), (5, 7, 2)])
def test_distances_match_the_closed_form(m, r, k):
    queries, keys = cca_positions(m, r, k)
    distances = queries[:, None] - keys[None, :]
    for i in range(1, m + 1):
        for j in range(k):
            for i_prime in range(1, r + 1):
                assert distances[i - 1, j * r + i_prime - 1] == i - i_prime + m - 1
    assert (distances.min(), distances.max()) == (m - r, 2 * m - 2)  # for m = 64, r = 128: -64 .. 126


def test_rotary_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    rotated = lambda x, place: apply_rotary(x, *rotary_table(torch.tensor([place]), 8))  # noqa: E731
    logit = lambda a, b: (rotated(q, a) * rotated(k, b)).sum()  # noqa: E731
    torch.testing.assert_close(logit(5, 9), logit(105, 109), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(logit(5, 9), logit(5, 10))


def test_relative_logits_match_the_closed_form_for_every_pair():
    torch.manual_seed(0)
    relative = RelativePositions(10, num_heads=2, head_dim=4)
    torch.nn.init.normal_(relative.position_bias)
    q = torch.randn(3, 2, M, 4)
    queries, keys = cca_positions(M, R, 2)
    logits = relative(q, queries, keys, range(M - R, 2 * M - 1))
    from tests.golden import cosine_vector

    for i in range(M):
        for j in range(2 * R):
            vector = torch.tensor(cosine_vector(i - j % R + M - 1, 10)).float()
            table = (relative.proj.weight @ vector).view(2, 4)
            expected = ((q[:, :, i] + relative.position_bias) * table).sum(-1)
            torch.testing.assert_close(logits[:, :, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_1_first_tokens_are_exactly_the_identity(position):
    h, encoded, mask = inputs(12)
    out = cca(position=position)(h, encoded, mask)
    assert (out[:, : M - 1] == 0).all()
    assert (out[:, M - 1 :] != 0).any(-1).all()


def test_2_last_token_of_a_chunk_reads_its_own_neighbors():
    h, encoded, mask = inputs(12)
    module = cca()
    for u in range(1, 4):
        changed = encoded.clone()
        changed[:, u - 1] += 1
        moved = (module(h, changed, mask) != module(h, encoded, mask)).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [t for t in range(u * M - 1, u * M - 1 + M) if t < 12]


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_3_short_and_ragged_sequences(position, make_model, make_batch):
    model = make_model(position=position)
    short = make_batch(model, M - 1)
    assert torch.equal(model(**short).logits, model(short["input_ids"]).logits)
    h, encoded, mask = inputs(11)  # 2 whole chunks and a tail of 3, which reads E_2
    changed = encoded.clone()
    changed[:, 1] += 1
    module = cca(position=position)
    moved = (module(h, changed, mask) != module(h, encoded, mask)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_4_missing_neighbors(position):
    h, encoded, mask = inputs(12)
    module = cca(position=position)
    mask[:, 0] = False  # all neighbors of C_1 missing: identity for its attending chunk
    mask[:, 1, 1] = False  # one of two neighbors of C_2 missing: as if it were not there
    out = module(h, encoded, mask)
    assert (out[:, M - 1 : 2 * M - 1] == 0).all()
    assert torch.isfinite(out).all()
    alone = module(h, encoded[:, :, :1], mask[:, :, :1])
    torch.testing.assert_close(out[:, 2 * M - 1 : 3 * M - 1], alone[:, 2 * M - 1 : 3 * M - 1])
    poisoned = encoded.clone()
    poisoned[~mask] = 1e4
    torch.testing.assert_close(module(h, poisoned, mask), out)


def test_5_off_skips_cca(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 12)
    off = model(batch["input_ids"]).logits
    all_missing = model(**{**batch, "neighbor_mask": torch.zeros_like(batch["neighbor_mask"])}).logits
    assert torch.equal(off, all_missing)
    assert not torch.allclose(off, model(**batch).logits)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_6_causality_by_gradient(position, make_model, make_batch):
    model = make_model(position=position)
    batch = make_batch(model, 14, b=1)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **{k: v for k, v in batch.items() if k != "input_ids"}).logits
    for t in range(14):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeds, retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert (reach[t + 1 :] == 0).all() and (reach[: t + 1] > 0).all()


def test_6_retrieval_of_a_chunk_first_touches_its_last_token(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    batch["neighbor_mask"][:] = True
    before = model(**batch).logits
    for u in range(1, 4):
        ids = batch["neighbor_ids"].clone()
        ids[:, u - 1] = (ids[:, u - 1] + 1) % model.config.vocab_size
        moved = (model(**{**batch, "neighbor_ids": ids}).logits != before).any(-1).any(0)
        assert not moved[: u * M - 1].any() and moved[u * M - 1]


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_7_packed_documents_are_strangers(position, make_model, make_batch):
    """Documents of 6 and 9 tokens in one sequence: the second begins inside C_2, which belongs to nobody beyond it,
    and reads no E before the end of its first whole chunk, C_3."""
    model = make_model(position=position)
    batch = make_batch(model, 15, b=1)
    batch["neighbor_mask"][:] = True
    batch["document_ids"] = torch.tensor([[0] * 6 + [1] * 9])
    packed = model(**batch).logits
    off = model(batch["input_ids"][:, 6:]).logits
    torch.testing.assert_close(packed[:, 6:11], off[:, :5], rtol=1e-4, atol=1e-4)  # 11 = last token of C_3
    assert not torch.allclose(packed[:, 11], off[:, 5], atol=1e-3)
    ids = batch["neighbor_ids"].clone()
    ids[:, :2] = (ids[:, :2] + 1) % model.config.vocab_size  # E_1 is the first document's, E_2 nobody's beyond it
    moved = (model(**{**batch, "neighbor_ids": ids}).logits != packed).any(-1)[0]
    assert not moved[6:].any() and moved[3:6].all()


def test_7_documents_on_chunk_borders_equal_documents_alone(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 16, b=1)
    batch["document_ids"] = torch.tensor([[7] * 8 + [3] * 8])
    packed = model(**batch).logits
    for part, chunks in ((slice(0, 8), slice(0, 2)), (slice(8, 16), slice(2, 4))):
        alone = model(
            batch["input_ids"][:, part],
            neighbor_ids=batch["neighbor_ids"][:, chunks],
            neighbor_mask=batch["neighbor_mask"][:, chunks],
        ).logits
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-4)


def test_may_read_asks_for_the_whole_chunk_in_the_document():
    mask = torch.ones(1, 3, 1, R, dtype=torch.bool)
    documents = torch.tensor([[0] * 6 + [1] * 8])  # C_2 = tokens 4..7 lies across the border
    assert may_read(mask, M, documents)[0].tolist() == [
        [True, True, True, False],  # tokens 3..6: 6 is in another document than C_1
        [False] * 4,  # tokens 7..10: C_2 belongs to nobody
        [True, True, True, False],  # tokens 11..13, then padding
    ]


def test_chunks_without_a_neighbor_are_left_out():
    mask = torch.ones(2, 3, 2, R, dtype=torch.bool)
    assert read_chunks(mask, M) == (None, None, None)
    mask[0, 1] = False
    mask[1, 2, 1] = False  # one of two neighbors: its chunk stays
    chunks = read_chunks(mask, M)
    assert chunks.index.tolist() == [0, 2, 3, 4, 5] and chunks.readable is None
    assert torch.equal(chunks.mask, mask.flatten(0, 1)[chunks.index])
    x = torch.randn(2, 3, M, 5)
    there = chunks.unpack(chunks.pack(x), 2, 3)
    assert torch.equal(there[1], x[1]) and torch.equal(there[0, ::2], x[0, ::2]) and (there[0, 1] == 0).all()
    nothing = read_chunks(torch.zeros_like(mask), M)
    assert nothing.index.tolist() == [0] and not nothing.readable.any()


def test_keys_one_token_back():
    """With s = 1 the key of token j is made from E(j - 1); the first token of each neighbor has none before it."""
    module = cca(smeared_keys=True)
    torch.nn.init.ones_(module.smear)
    encoded = inputs(8)[1].flatten(0, 1)
    keys = module._keys(encoded)
    assert torch.equal(keys[..., 1:, :], encoded[..., :-1, :]) and (keys[..., 0, :] == 0).all()


def test_batch_rows_do_not_touch(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    rows = [model(**{k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(2)]
    torch.testing.assert_close(model(**batch).logits, torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_neighbor_order_does_not_matter(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14, k=3)
    turned = {k: v.flip(2) if k.startswith("neighbor") else v for k, v in batch.items()}
    torch.testing.assert_close(model(**batch).logits, model(**turned).logits, rtol=1e-4, atol=1e-4)
