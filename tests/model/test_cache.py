"""A cached run, in any pieces, gives what the whole run gives; and what the cache refuses."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from retro.model import RetroCache
from retro.model.cache import GrowingLayer

VARIANTS = {
    "plain": {},
    "relative": {"position": "relative"},
    "smeared keys": {"smeared_keys": True},
    "smeared keys, relative": {"smeared_keys": True, "position": "relative"},
    "part of CCA turned": {"cca_partial_rotary_factor": 0.5},
    "nothing of CCA turned": {"cca_partial_rotary_factor": 0.0, "encoder_shares_embeddings": True},
    "grouped queries": {"num_key_value_heads": 2, "position": "relative"},
    "chunks of one token": {"chunk_len": 1},
    "chunks of seven": {"chunk_len": 7, "cca_layers": [1, 3]},
    "unconditioned encoder": {"encoder_cross_attention_layers": []},
    "scaled embeddings": {"embedding_multiplier": 5.5, "encoder_shares_embeddings": True},
}


def left_padded(batch: dict[str, Tensor], padding: list[int]) -> dict[str, Tensor]:
    n = batch["input_ids"].shape[1]
    return batch | {"attention_mask": (torch.arange(n) >= torch.tensor(padding)[:, None]).long()}


def new_neighbors(cache: RetroCache, batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Of the neighbors of whole texts those of the chunks that the next tokens make whole, from chunks by hand."""
    m, (b, _, k, r) = cache.chunk_len, batch["neighbor_ids"].shape
    places = []
    for row in range(b):
        padding = int((batch["attention_mask"][row] == 0).sum())
        before, after = (max(columns - padding, 0) // m for columns in (cache.length, cache.length + length))
        places.append(range(before, after))
    width = max(len(chunks) for chunks in places)
    ids, mask = torch.zeros(b, width, k, r, dtype=torch.long), torch.zeros(b, width, k, r, dtype=torch.bool)
    for row, chunks in enumerate(places):
        for place, chunk in enumerate(chunks):
            ids[row, place], mask[row, place] = batch["neighbor_ids"][row, chunk], batch["neighbor_mask"][row, chunk]
    return {"neighbor_ids": ids, "neighbor_mask": mask}


@torch.no_grad()
def in_pieces(model, batch: dict[str, Tensor], pieces: list[int], cache: RetroCache) -> Tensor:
    """Logits of a text that is given piece by piece."""
    logits, start = [], cache.length
    for length in pieces:
        stop = start + length
        mask = batch["attention_mask"][:, :stop] if "attention_mask" in batch else None
        given = new_neighbors(cache, {"attention_mask": torch.ones_like(batch["input_ids"])} | batch, length)
        ids = batch["input_ids"][:, start:stop]
        out = model(ids, **given, attention_mask=mask, past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


def random_pieces(n: int, longest: int, generator: torch.Generator) -> list[int]:
    pieces = []
    while sum(pieces) < n:
        pieces.append(min(int(torch.randint(1, longest + 1, (), generator=generator)), n - sum(pieces)))
    return pieces


def assert_same(cached: Tensor, whole: Tensor, mask: Tensor | None = None) -> None:
    real = slice(None) if mask is None else mask.bool()
    scale = whole.abs().max()
    torch.testing.assert_close(cached[real] / scale, whole[real] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_are_those_of_the_whole_run(variant, make_model, make_batch):
    model = make_model(**VARIANTS[variant])
    generator = torch.Generator().manual_seed(len(variant))
    for seed, (n, longest) in enumerate([(3, 2), (13, 1), (21, 9), (30, 30), (17, 4)]):
        batch = make_batch(model, n, b=3, k=seed % 3 + 1, seed=seed)
        padding = [0, 0, 0] if seed % 2 else [0, n // 3, n - 1]
        batch = left_padded(batch, padding)
        with torch.no_grad():
            whole = model(**batch).logits
        cached = in_pieces(model, batch, random_pieces(n, longest, generator), RetroCache(model.config.chunk_len))
        assert_same(cached, whole, batch["attention_mask"])


@pytest.mark.parametrize("start", [1, 2, 3, 4, 5, 7, 8, 9])
def test_every_prompt_length_around_a_border(start, make_model, make_batch):
    """A prompt, then one token at a time; then all borders at other places of the batch's rows."""
    model = make_model()
    batch = make_batch(model, 18, b=3)
    with torch.no_grad():
        whole = model(**batch).logits
    assert_same(in_pieces(model, batch, [start] + [1] * (18 - start), RetroCache(4)), whole)
    batch = left_padded(batch, [0, 1, 2])
    with torch.no_grad():
        whole = model(**batch).logits
    cached = in_pieces(model, batch, [start] + [1] * (18 - start), RetroCache(4))
    assert_same(cached, whole, batch["attention_mask"])


def test_what_only_an_earlier_chunk_of_a_prompt_reads(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 10, b=1)
    batch["neighbor_mask"][:, 0], batch["neighbor_mask"][:, 1] = True, False
    with torch.no_grad():
        whole = model(**batch).logits
    assert_same(in_pieces(model, batch, [9, 1], RetroCache(4)), whole)


def test_k_and_r_may_change_from_call_to_call(make_model, make_batch):
    """As if the fewer neighbors had been filled up with missing ones."""
    model = make_model()
    few, many = make_batch(model, 16, k=1), make_batch(model, 16, k=3, seed=1)
    wide = {name: torch.zeros_like(x) for name, x in many.items() if name != "input_ids"}
    for name, x in wide.items():
        x[:, :2, :1, :5] = few[name][:, :2, :, :5]
        x[:, 2:] = many[name][:, 2:]
    ids, cache = few["input_ids"], RetroCache(4)
    with torch.no_grad():
        whole = model(ids, **wide).logits
        parts = [slice(0, 9), slice(9, 10), slice(10, 12), slice(12, 16)]
        given = [
            {name: few[name][:, :2, :, :5] for name in wide},
            {},
            {name: many[name][:, 2:3] for name in wide},
            {name: many[name][:, 3:] for name in wide},
        ]
        cached = [model(ids[:, at], past_key_values=cache, **x).logits for at, x in zip(parts, given, strict=True)]
    assert_same(torch.cat(cached, dim=1), whole)


def test_retrieval_is_switched_off_and_on_between_calls(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 16)
    batch["neighbor_mask"][:, 1] = False  # as if chunk 2 had none
    with torch.no_grad():
        whole, cache, logits = model(**batch).logits, RetroCache(4), []
        for t in range(16):
            given = new_neighbors(cache, batch | {"attention_mask": torch.ones(2, 16)}, 1) if t != 7 else {}
            logits.append(model(batch["input_ids"][:, t : t + 1], **given, past_key_values=cache).logits)
    assert_same(torch.cat(logits, dim=1), whole)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_other_caches_of_self_attention(kind, make_model, make_batch):
    model = make_model()
    batch = left_padded(make_batch(model, 15), [0, 6])
    with torch.no_grad():
        whole = model(**batch).logits
    inner = (
        StaticCache(config=model.config, max_cache_len=20) if kind == "static" else DynamicCache(config=model.config)
    )
    assert_same(in_pieces(model, batch, [5, 1, 4, 1, 1, 3], RetroCache(4, inner)), whole, batch["attention_mask"])


def test_rows_are_chosen_and_repeated(make_model, make_batch):
    """Beam search reorders, samples repeat: each row goes on as the row it came from would have."""
    model = make_model()
    batch = left_padded(make_batch(model, 16, b=3), [0, 1, 6])
    order = torch.tensor([2, 0, 0])
    rows = {name: x[order] for name, x in batch.items()}
    with torch.no_grad():
        whole = model(**rows).logits
    for change, chosen in {
        "reorder_cache": order,
        "batch_select_indices": order,
    }.items():
        cache = RetroCache(4)
        in_pieces(model, {name: x[:, :10] if x.ndim == 2 else x for name, x in batch.items()}, [7, 1, 2], cache)
        getattr(cache, change)(chosen)
        assert_same(in_pieces(model, rows, [1, 1, 3, 1], cache), whole[:, 10:])
    cache = RetroCache(4)
    in_pieces(model, batch, [9], cache)
    cache.batch_repeat_interleave(2)
    twice = {name: x.repeat_interleave(2, 0) for name, x in batch.items()}
    with torch.no_grad():
        whole = model(**twice).logits
    assert_same(in_pieces(model, twice, [1, 6], cache), whole[:, 9:])


def test_a_copied_cache_is_a_fork(make_model, make_batch):
    model = make_model()
    batch, other = make_batch(model, 14), make_batch(model, 14, seed=1)
    other = {
        name: torch.cat([x[:, : 9 if x.ndim == 2 else 2], other[name][:, 9 if x.ndim == 2 else 2 :]], 1)
        for name, x in batch.items()
    }
    cache = RetroCache(4)
    in_pieces(model, batch, [6, 1, 1, 1], cache)
    fork = copy.deepcopy(cache)
    with torch.no_grad():
        for text, held in ((batch, cache), (other, fork)):
            assert_same(in_pieces(model, text, [1] * 5, held), model(**text).logits[:, 9:])


def test_tokens_taken_back(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    with torch.no_grad():
        whole = model(**batch).logits
    cache = RetroCache(4)
    in_pieces(model, batch, [11], cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 9
    assert_same(in_pieces(model, batch, [1, 4], cache), whole[:, 9:])
    with pytest.raises(
        ValueError, match="3 tokens cannot be taken back: in row 0 they reach across the end of a chunk"
    ):
        cache.crop(-3)


def test_tokens_taken_back_across_a_chunk_without_neighbors(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    ids, cache = batch["input_ids"], RetroCache(4)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :11], past_key_values=cache)
        cache.crop(-5)
        assert_same(model(ids[:, 6:8], past_key_values=cache).logits, whole[:, 6:8])
        cache.crop(-1)
        with pytest.raises(ValueError, match="taken back across the start of a chunk, which can no longer be encoded"):
            given = {name: batch[name][:, 1:2] for name in ("neighbor_ids", "neighbor_mask")}
            model(ids[:, 7:8], **given, past_key_values=cache)


def test_a_reset_cache_is_a_new_one(make_model, make_batch):
    model = make_model(position="relative")
    batch, cache = make_batch(model, 11), RetroCache(4)
    first = in_pieces(model, batch, [5, 1, 5], cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.rows
    assert torch.equal(in_pieces(model, batch, [5, 1, 5], cache), first)


def test_growing_layers_hold_what_dynamic_ones_do():
    growing, dynamic = Cache(layer_class_to_replicate=GrowingLayer), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        new = torch.randn(2, 2, 1 + step % 3, 4, generator=generator)
        for layer in (0, 1):
            held = [cache.update(new + layer, new - layer, layer) for cache in (growing, dynamic)]
            assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
        if step % 20 == 19:
            for cache in (growing, dynamic):
                cache.reorder_cache(torch.tensor([1, 1]) if step % 40 == 19 else torch.tensor([0, 0]))
                cache.crop(-2)
    buffer = growing.layers[0].keys.untyped_storage().data_ptr()
    growing.update(new[:, :, :1], new[:, :, :1], 0)
    growing.update(new[:, :, :1], new[:, :, :1], 0)
    kept = growing.layers[0].keys.untyped_storage().data_ptr()
    growing.update(new[:, :, :1], new[:, :, :1], 0)
    assert growing.layers[0].keys.untyped_storage().data_ptr() == kept != buffer


def test_use_cache_and_gradients(make_model, make_batch):
    """The cache keeps no gradients, and what is computed beside it has them."""
    model = make_model()
    batch = make_batch(model, 10)
    out = model(**batch, use_cache=True, labels=batch["input_ids"])
    expected = model(**batch, labels=batch["input_ids"])
    assert isinstance(out.past_key_values, RetroCache) and out.past_key_values.get_seq_length() == 10
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    names, weights = zip(*model.named_parameters(), strict=True)
    for name, *pair in zip(
        names, *(torch.autograd.grad(x.loss, weights, allow_unused=True) for x in (out, expected)), strict=True
    ):
        if pair[1] is not None:
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5, msg=name)


def test_generation_looks_at_the_prompts_mask_alone(make_model, make_batch, monkeypatch):
    """A look costs a GPU's time; but a mask that somebody else gives is looked at."""
    model, looks, look = make_model(pad_token_id=0), [], RetroCache._padding
    monkeypatch.setattr(RetroCache, "_padding", lambda *args: looks.append(args) or look(*args))
    ids, mask = make_batch(model, 10)["input_ids"], torch.ones(2, 15, dtype=torch.long)
    mask[0, :3] = 0
    options = dict(max_new_tokens=5, eos_token_id=-1, do_sample=False, return_dict_in_generate=True)
    cache = model.generate(ids, attention_mask=mask[:, :10], **options).past_key_values
    assert len(looks) == 2 and cache.length == 14
    mask[1, 12] = 0
    with pytest.raises(ValueError, match="attention_mask of row 1 is 0 after a real token"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_what_a_cached_run_refuses(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 10)
    ids = batch["input_ids"]

    def refused(words: str, **given):
        with pytest.raises(ValueError, match=words):
            model(**{"input_ids": ids, "past_key_values": RetroCache(4), **given})

    neighbors = {name: batch[name][:, :1] for name in ("neighbor_ids", "neighbor_mask")}
    refused(
        r"neighbor_ids has shape \[2, 1, 2, 8\]; with a cache it must be \[b, l, k, r\] = \[2, 2, k, r\]", **neighbors
    )
    refused("neighbor_mask is given without neighbor_ids", neighbor_mask=batch["neighbor_mask"])
    refused("document_ids is given with a cache", document_ids=torch.zeros_like(ids))
    refused(r"attention_mask has shape \[2, 9\]; with a cache it must be \[2, 10\]", attention_mask=ids[:, 1:] * 0 + 1)
    hole = torch.ones_like(ids)
    hole[1, 4] = 0
    refused("attention_mask of row 1 is 0 after a real token; pad on the left", attention_mask=hole)
    refused(r"attention_mask has shape \[2, 1, 10, 10\]; give \[b, n\]", attention_mask=torch.ones(2, 1, 10, 10))
    used = model(ids, use_cache=True).past_key_values
    refused("the cache holds 2 rows, and 1 are given", input_ids=ids[:1], past_key_values=used)
    one = torch.ones(2, 11, dtype=torch.long)
    one[0, 10] = 0
    refused("row 0 is 0 after a real token", input_ids=ids[:, :1], past_key_values=used, attention_mask=one)
    model.train().gradient_checkpointing_enable()
    refused("use_cache is true with gradient checkpointing")
