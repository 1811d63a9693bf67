"""Decoding of fits with a static cache: see tests/model/test_fixed.py; that it compiles is in training/runs."""

import pytest
import torch

from tests.model.test_fixed import GrowingNeighbors, watched
from tests.model.test_generation import ragged
from tests.retrofit.conftest import forms

OPTIONS = {"max_new_tokens": 17, "do_sample": False, "eos_token_id": 60, "pad_token_id": 0}


@forms
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fixed_steps_give_the_tokens_of_the_growing_cache(name, form, make_fitted, open_gates, monkeypatch):
    """Rows that complete their chunks at other times, the first neighbors that come, and larger ones."""
    model, steps = make_fitted(name, form=form), []
    open_gates(model)
    run, prompts = model._forward_fixed, ragged([1, 3, 9], 61)
    monkeypatch.setattr(model, "_forward_fixed", lambda inputs, step: steps.append(step.found) or run(inputs, step))
    grown = model.generate(**prompts, retriever=GrowingNeighbors(61), **OPTIONS)
    assert not steps
    reads, _ = watched(model)
    fixed = model.generate(**prompts, retriever=GrowingNeighbors(61), cache_implementation="static", **OPTIONS)
    assert torch.equal(fixed, grown)
    assert sum(steps) > 2 and len(steps) > 10 and not reads


def test_states_of_fixed_steps(make_fitted, open_gates):
    model = make_fitted(form="joint")
    open_gates(model)
    wanted = dict(return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    grown, fixed = (
        model.generate(
            **ragged([5, 7], 61), retriever=GrowingNeighbors(61), cache_implementation=cache, **wanted, **OPTIONS
        )
        for cache in (None, "static")
    )
    for name in ("logits", "hidden_states"):
        torch.testing.assert_close(fixed[name][1:], grown[name][1:], rtol=1e-4, atol=1e-4)


def test_a_prompt_whose_last_chunk_has_no_neighbors(make_fitted, open_gates, make_neighbors):
    """While an earlier one has some, which none of the logits that are kept reads."""
    model, given = make_fitted(form="pointer"), make_neighbors(1, 2)
    open_gates(model)
    given["neighbor_mask"][:, 1] = False
    ids = torch.arange(3, 12)[None]
    texts = [model.generate(ids, **given, use_cache=cached, **OPTIONS) for cached in (True, False)]
    assert torch.equal(*texts)
