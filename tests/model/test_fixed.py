"""Decoding with a static cache, by fixed steps: the tokens of the growing cache, and nothing that a GPU is waited for.

That they compile without a break, once, is in tests/training/runs/test_compiled.py.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_cache import VARIANTS
from tests.model.test_generation import ragged
from tests.searches import RandomNeighbors

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
OPTIONS = {"max_new_tokens": 17, "do_sample": False, "eos_token_id": 60, "pad_token_id": 0}


class GrowingNeighbors(RandomNeighbors):
    """One neighbor at first, then as many as are asked for."""

    def __call__(self, queries, num_neighbors):
        return super().__call__(queries, num_neighbors if len(self.asked) > 4 else 1)


def watched(model):
    """What steps of one token read back from the device, and these steps, but for those that bring neighbors."""
    reads, running = [], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in READS:
                reads.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    def before(module, args, given):
        if given["input_ids"].shape[1] == 1 and "neighbor_ids" not in given:
            running.append(Recorded())
            running[-1].__enter__()

    def after(module, args, given, out):
        if given["input_ids"].shape[1] == 1 and "neighbor_ids" not in given:
            running[-1].__exit__(None, None, None)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    return reads, running


@pytest.mark.parametrize("variant", ["plain", "smeared keys, relative", "grouped queries", "chunks of one token"])
def test_fixed_steps_give_the_tokens_of_the_growing_cache(variant, make_model, monkeypatch):
    model, steps = make_model(**VARIANTS[variant]), []
    run = model.model.forward_fixed
    monkeypatch.setattr(model.model, "forward_fixed", lambda ids, step: steps.append(step.found) or run(ids, step))
    prompts = ragged([1, 3, 9], 61)
    grown = model.generate(**prompts, retriever=GrowingNeighbors(61), **OPTIONS)
    fixed = model.generate(**prompts, retriever=GrowingNeighbors(61), cache_implementation="static", **OPTIONS)
    assert torch.equal(fixed, grown)
    assert sum(steps) > 2 and len(steps) > 10


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_a_token_reads_nothing_back(position, cache, make_model):
    """Of steps that bring no neighbors, and of fixed ones of any kind."""
    model = make_model(position=position)
    reads, steps = watched(model)
    model.generate(**ragged([9, 12], 61), retriever=RandomNeighbors(61), cache_implementation=cache, **OPTIONS)
    assert len(steps) >= 8 and len(reads) <= (cache is None)  # once, whether all neighbors of the prompt are real
