"""generate() with retrieval: the same tokens as a hand-written loop, for single, ragged and beam batches."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from retro.attribution import sample_page, sample_text


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
    with pytest.raises(ValueError, match="neighbor_ids is given to generate"):
        model.generate(prompt, neighbor_ids=torch.zeros(1, 1, 2, 16, dtype=torch.long))
    for options in ({"num_neighbors": 2}, {"num_neighbors": 0, "retriever": words_retriever}):
        with pytest.raises(ValueError, match="num_neighbors is .*; it must be at least 1, beside a retriever"):
            model.generate(prompt, **options)


def test_off_is_a_plain_model(model, words_retriever):
    prompt = torch.tensor([PROMPTS[4]])
    off = model.generate(prompt, max_new_tokens=10, do_sample=False)
    on = model.generate(prompt, retriever=words_retriever, max_new_tokens=10, do_sample=False)
    assert not torch.equal(off, on)
    ids = PROMPTS[4]
    with torch.no_grad():
        assert off[0, 25] == model(torch.tensor([ids])).logits[0, -1].argmax()


def test_sample_with_its_sources(model, words_tokenizer, words_retriever):
    prompt = " ".join(f"w{i}" for i in range(12))
    sample = sample_text(model, words_tokenizer, prompt, words_retriever, 2, max_new_tokens=8, do_sample=False)
    assert sample["prompt"] == prompt and sample["chunks"][0]["text"] == " ".join(f"w{i}" for i in range(8))
    neighbor = sample["chunks"][0]["neighbors"][0]
    found = words_retriever([sample["chunks"][0]["text"]], 2)
    assert neighbor["document_id"] == found.sources[0][0].document_id
    assert neighbor["score"] == pytest.approx(float(found.scores[0, 0]), abs=1e-5)
    page = sample_page(sample)
    assert prompt in page and f"{neighbor['title']}, chunk {neighbor['position'] + 1}" in page
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        sample_text(model, words_tokenizer, "", words_retriever, 2)
