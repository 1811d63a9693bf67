"""One model, its fits and the base under them in several threads: what one does never shows in another."""

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch

from retro.common.modes import evaluating

MOST = 3  # interruptions of a run
IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(3))


def in_between(modules, run, others):
    """What `run` gives, and what each of `others` gives in its own thread while `run` is about to enter a module."""
    here, found = get_ident(), []

    def interrupt(*_):
        if get_ident() == here and len(found) < MOST:
            with ThreadPoolExecutor(1) as pool:
                found.append([pool.submit(other).result() for other in others])

    handles = [module.register_forward_pre_hook(interrupt) for module in modules]
    with torch.no_grad():
        out = run()
    for handle in handles:
        handle.remove()
    assert found
    return out, found


def check_in_between(modules, ways):
    ways = [torch.no_grad()(way) for way in ways]
    expected = [way() for way in ways]
    for number, (way, alone) in enumerate(zip(ways, expected, strict=True)):
        out, found = in_between(modules[number % 2 :: 2], way, ways)
        assert torch.equal(out, alone)
        for results in found:
            assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(("name", "form"), [("llama", "joint"), ("gpt2", "random")])
def test_a_fit_and_its_base(name, form, make_base, make_fitted, make_neighbors, open_gates):
    base, neighbors = make_base(name), make_neighbors(2, 3)
    model, other = make_fitted(base=base, form=form), make_fitted(base=base, form="pointer")
    for one in (model, other):
        open_gates(one)
    ways = [
        lambda: base(IDS).logits,
        lambda: model(IDS, **neighbors).logits,
        lambda: other(IDS, **neighbors).logits,
        lambda: model(IDS, **neighbors, labels=IDS, return_logits=False).loss,
        lambda: model.generate(IDS, **neighbors, max_new_tokens=2, do_sample=False, pad_token_id=0),
        lambda: base.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0),
    ]
    check_in_between([*model.anatomy.layers(base), base.get_output_embeddings()], ways)


def test_a_base_is_used_while_it_is_fitted(make_base, make_fitted, make_neighbors):
    base, neighbors = make_base(), make_neighbors(2, 3)
    with torch.no_grad():
        alone, expected = base(IDS).logits, make_fitted(base=make_base())(IDS, **neighbors).logits
    fitted, found = in_between(base.model.layers, lambda: make_fitted(base=base), [lambda: base(IDS).logits])
    assert all(torch.equal(logits, alone) for (logits,) in found)
    torch.testing.assert_close(fitted.eval()(IDS, **neighbors).logits, expected)


def test_a_retro(make_model, make_batch):
    model = make_model().eval()
    batch = make_batch(model, 14)
    given = {name: batch[name] for name in ("neighbor_ids", "neighbor_mask")}
    ways = [
        lambda: model(**batch).logits,
        lambda: model(batch["input_ids"]).logits,
        lambda: model.generate(batch["input_ids"], **given, max_new_tokens=2, do_sample=False, pad_token_id=0),
    ]
    check_in_between(model.model.layers, ways)


def test_threads_that_evaluate_a_module_in_training_leave_it_so():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    module[1].eval()

    def run(_):
        for _ in range(200):
            with evaluating(module):
                assert not module[0].training

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert module[0].training and module.training and not module[1].training
