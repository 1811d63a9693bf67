"""generate() with retrieval: the same tokens as a hand-written loop, for single, ragged and beam batches."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from retro.model import RetrievalError, RetroCache
from tests.searches import Failing, RandomNeighbors
from tests.waiting import FOREVER


@pytest.fixture
def model(words_tokenizer, make_model):
    return make_model(vocab_size=len(words_tokenizer), chunk_len=8, retrieved_len=16, eos_token_id=1, pad_token_id=0)


def by_hand(model, retriever, ids: list[int], steps: int) -> list[int]:
    """Greedy decoding, everything anew at each step."""
    ids = list(ids)
    for _ in range(steps):
        whole = len(ids) // 8
        neighbors = {}
        if whole:
            found = retriever(np.array(ids[: whole * 8]).reshape(whole, 8), 2)
            neighbors = {
                f"neighbor_{n}": torch.from_numpy(getattr(found, a))[None]
                for n, a in (("ids", "tokens"), ("mask", "mask"))
            }
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), **neighbors).logits[0, -1].argmax().item())
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


PROMPTS = [[5], list(range(5, 12)), list(range(5, 13)), list(range(5, 14)), list(range(5, 30))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_equals_a_loop_by_hand(prompt, model, words_retriever):
    out = model.generate(torch.tensor([prompt]), retriever=words_retriever, max_new_tokens=20, do_sample=False)
    assert out[0].tolist() == by_hand(model, words_retriever, prompt, 20)


def sources_of(tokens: list[int], retriever) -> list:
    """The rows of the store that each whole chunk of a sequence finds."""
    return [retriever([tokens[i : i + 8]], 2).ids.tolist() for i in range(0, len(tokens) - 7, 8)]


def test_ragged_rows_equal_rows_alone(model, words_retriever):
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    options = dict(retriever=words_retriever, max_new_tokens=12, do_sample=False)
    together = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    for row, found, prompt in zip(together.sequences.tolist(), together["neighbors"], PROMPTS, strict=True):
        alone = model.generate(torch.tensor([prompt]), **options)[0].tolist()
        assert row[longest - len(prompt) :][: len(alone)] == alone
        assert [n.ids.tolist() for n in found[: len(alone) // 8]] == sources_of(alone, words_retriever)


def test_each_chunk_is_searched_once(model, words_retriever):
    calls = []

    def counting(queries, **options):
        calls.extend(np.asarray(queries).tolist())
        return words_retriever(queries, **options)

    model.generate(torch.tensor([PROMPTS[4]]), retriever=counting, max_new_tokens=20, do_sample=False, eos_token_id=-1)
    assert len(calls) == (25 + 19) // 8 == len({tuple(call) for call in calls})


def test_beams_and_several_sequences(model, words_retriever):
    options = dict(retriever=words_retriever, max_new_tokens=10, return_dict_in_generate=True)
    beams = model.generate(torch.tensor([PROMPTS[3]]), num_beams=3, num_return_sequences=2, do_sample=False, **options)
    assert beams.sequences.shape[0] == 2 == len(beams["neighbors"])
    torch.manual_seed(0)
    sampled = model.generate(torch.tensor([PROMPTS[3]]), num_return_sequences=3, do_sample=True, **options)
    assert len(sampled["neighbors"]) == 3


@pytest.mark.parametrize("given", [True, False], ids=["mask given", "mask found from the padding"])
def test_the_sources_of_padded_prompts_are_those_read(given, model, words_retriever):
    """Beams and their returned sequences differ in number; chunks are counted from each prompt's first real token."""
    ids = torch.tensor([[0] * 7 + PROMPTS[2] + PROMPTS[1], PROMPTS[4][:22]])
    mask = {"attention_mask": (ids != 0).long()} if given else {}
    options = dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=4, eos_token_id=-1)
    out = model.generate(ids, retriever=words_retriever, return_dict_in_generate=True, **mask, **options)
    for row, found in zip(out.sequences.tolist(), out["neighbors"], strict=True):
        tokens = row[7:] if row[0] == 0 else row
        assert [n.ids.tolist() for n in found] == sources_of(tokens, words_retriever)


@pytest.mark.filterwarnings("error:.*generation_config")
def test_a_generation_config_is_taken_and_left_as_it_was(model, words_retriever):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0)
    ids = torch.tensor([PROMPTS[3]])
    expected = model.generate(ids, retriever=words_retriever, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    for out in (
        model.generate(ids, config, retriever=words_retriever),
        model.generate(input_ids=ids, generation_config=config, retriever=words_retriever),
        model.generate(ids, retriever=words_retriever, max_new_tokens=5, use_cache=True, eos_token_id=-1),
    ):
        assert torch.equal(out, expected)
    assert config.use_cache is True


def test_refuses_what_it_would_ignore(model, words_retriever):
    prompt = torch.tensor([PROMPTS[3]])
    on = {"retriever": words_retriever}
    for options in ({"num_neighbors": 2}, {"num_neighbors": 0, **on}):
        with pytest.raises(ValueError, match="num_neighbors is .*; it must be at least 1, beside a retriever"):
            model.generate(prompt, **options)
    for options, words in (
        ({"neighbor_mask": torch.ones(1, 1, 2, 16, dtype=torch.bool)}, "neighbor_mask is given without neighbor_ids"),
        ({"neighbor_ids": torch.zeros(1, 2, 16)}, r"neighbor_ids has shape \[1, 2, 16\]; it must be \[b, l, k, r\]"),
        ({"lookahead": 2}, "lookahead is 2; it must be from 0 to chunk_len - 1 = 7, with a retriever"),
        ({"lookahead": 8, **on}, "lookahead is 8; it must be from 0 to chunk_len - 1 = 7, with a retriever"),
        ({"on_retrieval_error": "off"}, "on_retrieval_error is 'off'; give 'raise' or 'off', with a retriever"),
        ({"on_retrieval_error": "stop", **on}, "on_retrieval_error is 'stop'; give 'raise' or 'off'"),
        ({"prompt_lookup_num_tokens": 3, **on}, "assisted generation takes tokens back, and with them neighbors"),
        ({"document_ids": prompt}, "document_ids"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(prompt, max_new_tokens=3, **options)


def test_a_plain_model_refuses_neighbors(make_model, words_retriever):
    with pytest.raises(ValueError, match="neighbors are asked for, but this model has no CCA layers"):
        make_model(cca_layers=[]).generate(torch.tensor([PROMPTS[3]]), retriever=words_retriever)


def test_off_is_a_plain_model(model, words_retriever):
    prompt = torch.tensor([PROMPTS[4]])
    off = model.generate(prompt, max_new_tokens=10, do_sample=False)
    on = model.generate(prompt, retriever=words_retriever, max_new_tokens=10, do_sample=False)
    assert not torch.equal(off, on)
    ids = PROMPTS[4]
    with torch.no_grad():
        assert off[0, 25] == model(torch.tensor([ids])).logits[0, -1].argmax()


# The cached run against the whole run at every step, which `use_cache=False` is


RAGGED = [1, 3, 7, 8, 9, 16, 21]
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, some returned": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
    "sampled beams": {"num_beams": 2, "do_sample": True, "temperature": 2.0},
    "looking ahead": {"lookahead": 3},
    "looking ahead with beams": {"lookahead": 7, "num_beams": 3},
    "three neighbors": {"num_neighbors": 3},
}
CACHES = {"growing": {}, "static": {"cache_implementation": "static"}, "prompt in pieces": {"prefill_chunk_size": 5}}


def ragged(lens: list[int], vocab_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lens)
    ids = torch.randint(3, vocab_size, (len(lens), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lens)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def outcome(model, seed: int = 0, **options):
    torch.manual_seed(seed)
    return model.generate(**{"max_new_tokens": 19, "do_sample": False, "return_dict_in_generate": True, **options})


def ids_of(neighbors: list[list]) -> list[list]:
    return [[one.ids.tolist() for one in row] for row in neighbors]


@pytest.mark.parametrize(
    ("way", "cache"),
    [(way, "growing") for way in WAYS]
    + [(way, cache) for way in ("greedy", "looking ahead with beams") for cache in ("static", "prompt in pieces")],
)
def test_cached_equals_whole(way, cache, model, words_tokenizer):
    vocab_size = len(words_tokenizer)
    prompts, search = ragged(RAGGED, vocab_size), RandomNeighbors(vocab_size, 16)
    options = {"retriever": search, **WAYS[way]}
    whole = outcome(model, **prompts, **options, use_cache=False)
    cached = outcome(model, **prompts, **options, **CACHES[cache])
    assert torch.equal(cached.sequences, whole.sequences)
    assert ids_of(cached["neighbors"]) == ids_of(whole["neighbors"])


@pytest.mark.parametrize("way", ["greedy", "beams", "looking ahead", "three neighbors"])
def test_each_row_is_as_if_alone(way, model, words_tokenizer):
    vocab_size = len(words_tokenizer)
    prompts, search = ragged(RAGGED, vocab_size), RandomNeighbors(vocab_size, 16)
    together = outcome(model, **prompts, retriever=search, **WAYS[way])
    for i, length in enumerate(RAGGED):
        alone = outcome(model, input_ids=prompts["input_ids"][i : i + 1, -length:], retriever=search, **WAYS[way])
        expected = alone.sequences[0].tolist()
        assert together.sequences[i].tolist()[max(RAGGED) - length :][: len(expected)] == expected
        count = len(alone["neighbors"][0])
        assert ids_of(together["neighbors"])[i][:count] == ids_of(alone["neighbors"])[0]


def test_off_is_cached_too(model, words_tokenizer):
    prompts = ragged(RAGGED, len(words_tokenizer))
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        if "prompt_lookup_num_tokens" in options:
            prompts = {"input_ids": prompts["input_ids"][-1:].repeat(1, 2)}
        uncached = {name: x for name, x in options.items() if name == "num_beams"}
        whole = outcome(model, **prompts, **uncached, use_cache=False)
        assert torch.equal(outcome(model, **prompts, **options).sequences, whole.sequences)


def test_a_token_is_one_step_and_a_chunk_one_search_and_one_encoding(model, words_tokenizer):
    search, steps, encoded = RandomNeighbors(len(words_tokenizer), 16), [], []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: steps.append((args[0], tuple(args[1].shape[:2]))))
    model.model.encoder.register_forward_pre_hook(lambda m, args: encoded.append(tuple(args[0].shape[:2])))
    model.generate(
        torch.tensor([PROMPTS[4][:20]] * 2), retriever=search, max_new_tokens=13, eos_token_id=-1, use_cache=True
    )
    lengths = [shape for step, shape in steps if step == "extend"]
    assert lengths == [(2, 20)] + [(2, 1)] * 12
    assert encoded[0] == (4, 1) and len(encoded) == 3  # two chunks of two rows at once, then 24 and 32
    assert len(search.asked) == len(set(search.asked))


def test_streamer_and_stopping_criteria(model, words_tokenizer):
    from transformers import StoppingCriteria

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 18)

    streamer, search = Streamer(), RandomNeighbors(len(words_tokenizer), 16)
    out = model.generate(
        torch.tensor([PROMPTS[3]]),
        retriever=search,
        streamer=streamer,
        stopping_criteria=[Stop()],
        max_new_tokens=50,
        eos_token_id=-1,
    )
    assert out.shape[1] == 18 and streamer.ended and streamer.tokens == out[0].tolist()


def test_neighbors_given_beforehand(model, words_tokenizer):
    """They are read as if searched; chunks beyond them have none; beams and samples share those of their prompt."""
    vocab_size = len(words_tokenizer)
    prompts, search = ragged([9, 17], vocab_size), RandomNeighbors(vocab_size, 16)
    generator = torch.Generator().manual_seed(1)
    given = {
        "neighbor_ids": torch.randint(3, vocab_size, (2, 3, 2, 16), generator=generator),
        "neighbor_mask": torch.rand(2, 3, 2, 1, generator=generator).gt(0.3).expand(2, 3, 2, 16),
    }
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}):
        uncached = {name: x for name, x in options.items() if name != "cache_implementation"}
        whole = outcome(model, **prompts, **given, **uncached, use_cache=False)
        cached = outcome(model, **prompts, **given, **options)
        assert torch.equal(cached.sequences, whole.sequences) and "neighbors" not in cached
    tokens = outcome(model, **prompts, **given, eos_token_id=-1).sequences[:1, 8:]  # the first row: 9 + 19 tokens
    ids, mask = torch.zeros(1, 3, 2, 16, dtype=torch.long), torch.zeros(1, 3, 2, 16, dtype=torch.bool)
    ids[:, :3], mask[:, :3] = given["neighbor_ids"][:1], given["neighbor_mask"][:1]
    with torch.no_grad():
        for t in range(9, 28):
            known = {"neighbor_ids": ids[:, : t // 8], "neighbor_mask": mask[:, : t // 8]}
            assert model(tokens[:, :t], **known).logits[0, -1].argmax() == tokens[0, t]
    few = {name: x[:, :1] for name, x in given.items()}
    missing = {"neighbor_ids": given["neighbor_ids"], "neighbor_mask": given["neighbor_mask"].clone()}
    missing["neighbor_mask"][:, 1:] = False
    assert torch.equal(outcome(model, **prompts, **few).sequences, outcome(model, **prompts, **missing).sequences)
    with pytest.raises(ValueError, match="neighbor_ids has 2 rows, and there are 1 prompts"):
        model.generate(torch.tensor([PROMPTS[3]]), **given)
    with pytest.raises(ValueError, match="a retriever and neighbor_ids are both given"):
        model.generate(**prompts, **given, retriever=search)


def test_going_on_from_a_cache(model, words_tokenizer):
    """Another call with the whole text so far: retrieval may be on, off or with another k in each."""
    search = RandomNeighbors(len(words_tokenizer), 16)
    options = dict(eos_token_id=-1, max_new_tokens=11)
    prompt = torch.tensor([PROMPTS[3]])
    once = outcome(model, input_ids=prompt, retriever=search, **options | {"max_new_tokens": 22})
    first = outcome(model, input_ids=prompt, retriever=search, **options)
    second = outcome(
        model, input_ids=first.sequences, retriever=search, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(second.sequences, once.sequences)
    assert ids_of(second["neighbors"]) == ids_of(once["neighbors"])
    off = outcome(model, input_ids=second.sequences, past_key_values=second.past_key_values, **options)
    on = outcome(
        model,
        input_ids=off.sequences,
        past_key_values=off.past_key_values,
        retriever=search,
        num_neighbors=1,
        **options,
    )
    text = on.sequences
    chunks = text[0, :48].view(6, 8).tolist()
    found = [search([chunk], k) for chunk, k in zip(chunks, [2, 2, 2, 2, 2, 1], strict=True)]
    ids, mask = torch.zeros(1, 6, 2, 16, dtype=torch.long), torch.zeros(1, 6, 2, 16, dtype=torch.bool)
    for u, one in enumerate(found):
        k = one.tokens.shape[1]
        ids[0, u, :k], mask[0, u, :k] = torch.from_numpy(one.tokens[0]), torch.from_numpy(one.mask[0])
    mask[0, 3:5] = False  # became whole while retrieval was off
    with torch.no_grad():
        for t in range(42, 53):
            assert model(text[:, :t], ids[:, : t // 8], mask[:, : t // 8]).logits[0, -1].argmax() == text[0, t]
    with pytest.raises(
        ValueError, match="attention_mask has 43 columns and input_ids 1; with neighbors give the whole"
    ):
        model.generate(text[:, :1], attention_mask=torch.ones(1, 43), retriever=search, past_key_values=RetroCache(8))


# When a search fails


def test_a_failing_retriever_stops_with_its_reason(model, words_tokenizer):
    vocab_size = len(words_tokenizer)
    prompts = ragged([21, 9], vocab_size)
    second = tuple(prompts["input_ids"][1, -9:-1].tolist())
    search = Failing(lambda query: query == second, vocab_size, 16)
    with pytest.raises(RetrievalError, match="retrieval for chunk 1 of row 1 failed: the index is away") as error:
        model.generate(**prompts, retriever=search, max_new_tokens=4)
    assert isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_what_nothing_read_may_fail(lookahead, model, words_tokenizer):
    """The chunk that the very last token ends is searched for `neighbors` only: the text is not lost for it."""
    first = tuple(PROMPTS[3][:8])
    search = Failing(lambda query: query != first, len(words_tokenizer), 16)
    given = dict(retriever=search, lookahead=lookahead, max_new_tokens=7, eos_token_id=-1)
    out = outcome(model, input_ids=torch.tensor([PROMPTS[3]]), **given)
    assert [bool(one.mask.any()) for one in out["neighbors"][0]] == [True, False]


def test_a_cache_of_other_chunks_is_refused(model):
    cache = RetroCache(model.config.chunk_len + 1)
    with pytest.raises(ValueError, match="and the model's chunk_len is"):
        model(torch.tensor([PROMPTS[3]]), past_key_values=cache)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_or_goes_on_without_neighbors(lookahead, model, words_tokenizer, caplog):
    """Only chunks whose own search fails go without; said once."""
    vocab_size = len(words_tokenizer)
    prompts = ragged([21, 9], vocab_size)
    search = Failing(lambda query: sum(query) % 2 == 0, vocab_size, 16)
    options = dict(retriever=search, on_retrieval_error="off", lookahead=lookahead, eos_token_id=-1)
    with caplog.at_level("WARNING", logger="retro.model.generation"):
        out = outcome(model, **prompts, **options)
    assert len([r for r in caplog.records if r.name == "retro.model.generation"]) == 1
    whole = outcome(model, **prompts, **options, use_cache=False)
    assert torch.equal(out.sequences, whole.sequences)
    lost = [bool((one.ids == -1).all() and not one.mask.any()) for row in out["neighbors"] for one in row]
    assert True in lost and False in lost
    if not lookahead:
        chunks = [
            row[i : i + 8] for row, pad in zip(out.sequences.tolist(), (0, 12), strict=True) for i in range(pad, 33, 8)
        ]
        assert [sum(chunk) % 2 == 0 for chunk in chunks] <= lost


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda found: None, "the retriever gave a NoneType; it must give Neighbors"),
        (lambda found: found[:0], r"the retriever gave tokens \[0, 2, 16\].*here with q = 1"),
        (
            lambda found: replace(found, tokens=found.tokens + 1000),
            "and the model has 103; is its store made with another",
        ),
    ],
)
def test_what_a_retriever_may_not_give(gives, words, model, words_tokenizer):
    search = RandomNeighbors(len(words_tokenizer), 16)
    with pytest.raises(RetrievalError, match=words):
        model.generate(torch.tensor([PROMPTS[3]]), retriever=lambda q, num_neighbors: gives(search(q, num_neighbors)))


def test_a_retriever_that_is_none(model):
    with pytest.raises(ValueError, match=r"^retriever is 'store', which cannot be called; give the retriever of retro"):
        model.generate(torch.tensor([PROMPTS[3]]), retriever="store")


def test_neighbors_of_other_numbers_and_lengths(model, words_tokenizer):
    """A callable may give fewer, or shorter ones, in some calls."""
    search = RandomNeighbors(len(words_tokenizer), 16)

    def uneven(queries, num_neighbors):
        k, r = (1, 9) if int(np.sum(queries)) % 2 else (num_neighbors, 16)
        found = search(queries, num_neighbors)
        cut = {name: getattr(found, name)[:, :k] for name in ("ids", "scores")}
        return replace(found, tokens=found.tokens[:, :k, :r], mask=found.mask[:, :k, :r], **cut)

    prompts = ragged([9], len(words_tokenizer))
    whole = outcome(model, **prompts, retriever=uneven, use_cache=False, eos_token_id=-1, max_new_tokens=40)
    assert torch.equal(
        outcome(model, **prompts, retriever=uneven, eos_token_id=-1, max_new_tokens=40).sequences, whole.sequences
    )


# Looking ahead


@pytest.mark.parametrize("lookahead", [1, 3, 7])
def test_queries_are_known_so_many_tokens_before_the_end(lookahead, model, words_tokenizer):
    search = RandomNeighbors(len(words_tokenizer), 16)
    prompt = torch.tensor([PROMPTS[4][:12]])
    out = outcome(model, input_ids=prompt, retriever=search, lookahead=lookahead, eos_token_id=-1)
    tokens = out.sequences[0].tolist()  # 12 + 19: chunks end at 8 (in the prompt), 16, 24
    expected = [tokens[:8]] + [tokens[end - lookahead - 8 : end - lookahead] for end in (16, 24)]
    assert [list(query) for query in search.asked][:3] == expected  # the next search may have been started
    assert ids_of(out["neighbors"])[0] == [search([query], 2).ids.tolist() for query in expected]


def test_the_first_query_may_be_short(model, words_tokenizer):
    search = RandomNeighbors(len(words_tokenizer), 16)
    out = model.generate(torch.tensor([[5], [6]]), retriever=search, lookahead=3, max_new_tokens=9, eos_token_id=-1)
    assert [list(query) for query in search.asked] == out[:, :5].tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_the_search_runs_beside_decoding_and_no_thread_stays(fails, model, words_tokenizer):
    """The tokens after the query are decoded while the search is still under way."""
    steps, search, overlapped, under_way = [], RandomNeighbors(len(words_tokenizer), 16), [], []
    decoded = threading.Event()

    def count(module, args):
        if args[0] == "extend":
            steps.append(1)
            if len(steps) == 1 + 6:
                decoded.set()

    model.model.layers[0].register_forward_pre_hook(count)

    def slow(queries, num_neighbors):
        assert not under_way, "one at a time"
        under_way.append(1)
        if search.asked:  # chunk 2 of 9 + 12 tokens: the prompt, then token 13 starts the search, token 16 needs it
            overlapped.append(decoded.wait(FOREVER))
        under_way.clear()
        if fails and search.asked:
            raise ConnectionError("away")
        return search(queries, num_neighbors)

    options = dict(retriever=slow, lookahead=3, max_new_tokens=12, eos_token_id=-1)
    if fails:
        with pytest.raises(RetrievalError, match="chunk 2 of row 0 failed: away"):
            model.generate(torch.tensor([PROMPTS[3]]), **options)
    else:
        model.generate(torch.tensor([PROMPTS[3]]), **options)
    assert overlapped[0]
    assert not [t for t in threading.enumerate() if t.name.startswith("retro-retrieval")]
    if not fails:
        assert all(name.startswith("retro-retrieval") for name in search.threads)


def test_without_looking_ahead_there_is_no_thread(model, words_tokenizer):
    search = RandomNeighbors(len(words_tokenizer), 16)
    model.generate(torch.tensor([PROMPTS[3]]), retriever=search, max_new_tokens=12)
    assert search.threads == {threading.current_thread().name}
