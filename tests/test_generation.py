"""generate() with retrieval: the same tokens as a hand-written loop, for single, ragged and beam batches."""

import numpy as np
import pytest
import torch

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


def test_ragged_rows_equal_rows_alone(model, words_retriever):
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    options = dict(retriever=words_retriever, max_new_tokens=12, do_sample=False)
    together = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    for row, found, prompt in zip(together.sequences.tolist(), together["neighbors"], PROMPTS, strict=True):
        alone = model.generate(torch.tensor([prompt]), **options)[0].tolist()
        assert row[longest - len(prompt) :][: len(alone)] == alone
        assert len(found) >= len(alone) // 8


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
