"""What must hold for every architecture: OFF and step 0 are the base, causality, gradients, saving."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retro.evaluation.scorer import score_tokens
from retro.retrofit import RetrofitForCausalLM
from retro.retrofit.anatomy import first_tensor, with_first
from tests.retrofit.conftest import ARCHITECTURES, forms, most_forms

names = pytest.mark.parametrize("name", ARCHITECTURES)
IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def fitted(name, form, make_fitted):
    return make_fitted(name, form=form)


@forms
@names
def test_off_is_the_base_and_so_is_step_0(name, form, make_base, make_fitted, make_neighbors, open_gates):
    untouched = make_base(name)
    model = make_fitted(name, base=copy.deepcopy(untouched), form=form)
    neighbors = make_neighbors(2, 3)
    expected = untouched(IDS)
    assert torch.equal(model(IDS, **neighbors).logits, expected.logits)  # step 0
    open_gates(model)
    assert not torch.equal(model(IDS, **neighbors).logits, expected.logits)
    off = model(IDS)
    assert torch.equal(off.logits, expected.logits)
    first, second = untouched(IDS[:, :9], use_cache=True), model(IDS[:, :9], use_cache=True)
    assert torch.equal(first.logits, second.logits)
    if first.get("past_key_values") is not None:
        steps = [
            one(IDS[:, 9:10], past_key_values=out.past_key_values, use_cache=True).logits
            for one, out in ((untouched, first), (model, second))
        ]
        assert torch.equal(*steps)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS[:, :6], **settings), untouched.generate(IDS[:, :6], **settings))


@pytest.mark.parametrize("form", ["paper"])
@names
def test_the_place_is_the_one_named(name, fitted):
    """A shift of what the writer gives shifts the stream by `scale`: inside the layer, or where it ends."""
    base, kind = fitted.base, ARCHITECTURES[name][2]
    for number, writer in fitted.anatomy.writers.items():
        assert writer.kind == kind
        layer = fitted.anatomy.layer(base, number)
        part, seen = layer.get_submodule(writer.name), []

        def given(module, args, kwargs, seen=seen):
            seen.extend(t.reshape(2, 14, -1) for t in (*args, *kwargs.values()) if _is_stream(t))

        def left(module, args, out, seen=seen):
            seen.append(first_tensor(out))

        watching = [child.register_forward_pre_hook(given, with_kwargs=True) for child in layer.children()]
        watching.append(layer.register_forward_hook(left))
        base(IDS)
        before, shift = list(seen), 0.01 * torch.randn(16)
        seen.clear()
        watching.append(part.register_forward_hook(lambda m, a, out, by=shift: with_first(out, first_tensor(out) + by)))
        base(IDS)
        moved = [after - was for was, after in zip(before, seen, strict=True) if after.shape == was.shape]
        moved = moved[:-1] if kind == "between" and name != "opt_post_norm" else moved
        assert any(torch.allclose(m, writer.scale * shift.expand_as(m), atol=1e-5) for m in moved), writer
        for handle in watching:
            handle.remove()


def _is_stream(value) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 2 * 14 * 16 and value.is_floating_point()


@most_forms
@names
def test_nothing_sees_what_comes_later(name, fitted, make_neighbors, open_gates):
    open_gates(fitted)
    neighbors = make_neighbors(2, 3)
    before = fitted(IDS, **neighbors).logits
    for t in (3, 6, 11, 13):
        ids = IDS.clone()
        ids[:, t] = (ids[:, t] + 5) % 61 + 3
        torch.testing.assert_close(fitted(ids, **neighbors).logits[:, :t], before[:, :t], rtol=1e-4, atol=1e-5)
    for u in range(3):
        moved = {**neighbors, "neighbor_ids": neighbors["neighbor_ids"].clone()}
        moved["neighbor_ids"][:, u] = (moved["neighbor_ids"][:, u] + 7) % 64
        after, start = fitted(IDS, **moved).logits, u * 4 + 3
        torch.testing.assert_close(after[:, :start], before[:, :start], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after[:, start], before[:, start], rtol=1e-4, atol=1e-5)


@most_forms
@names
def test_gradients_reach_every_new_weight_and_none_of_the_base(name, form, fitted, make_neighbors):
    """By step 2; by step 3 what stands before a map that is 0 at first, behind a gate that is shut."""
    model = fitted.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.form.parameters()}
    optimizer, neighbors, reached = torch.optim.AdamW(trained, lr=1e-2), make_neighbors(2, 3), set()
    for step in range(1, 3 if form == "random" else 4):
        optimizer.zero_grad()
        model(IDS, **neighbors, labels=IDS).loss.backward()
        if step == 1:
            gates = [p for n, p in model.form.named_parameters() if n.endswith(("gate", "opening"))]
            assert gates and all(gate.grad.abs().sum() > 0 for gate in gates)
        reached |= {n for n, p in model.form.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    assert reached == {n for n, _ in model.form.named_parameters()}
    assert all(p.grad is None for p in model.base.parameters())


@most_forms
@names
def test_save_and_load(name, form, make_base, make_fitted, make_neighbors, open_gates, tmp_path):
    base = make_base(name)
    base.save_pretrained(tmp_path / "base")
    model = make_fitted(name, base=str(tmp_path / "base"), form=form)
    open_gates(model)
    model.save_pretrained(tmp_path / "fitted")
    inputs = {"input_ids": IDS, **make_neighbors(2, 3)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    assert type(loaded) is RetrofitForCausalLM and not loaded.training
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    from safetensors import safe_open

    with safe_open(tmp_path / "fitted" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"form.{name}" for name, _ in model.form.named_parameters()}
    assert [f.name for f in (tmp_path / "fitted").glob("*.safetensors")] == ["model.safetensors"]


@most_forms
@names
def test_packed_documents_are_apart(name, fitted, make_neighbors, open_gates):
    open_gates(fitted)
    neighbors = make_neighbors(2, 3)
    documents = torch.tensor([[5] * 8 + [9] * 6] * 2)
    if name in ("bloom", "lfm2"):
        with pytest.raises(ValueError, match=f"{type(fitted.base).__name__} cannot keep them apart"):
            fitted(IDS, **neighbors, document_ids=documents)
        return
    packed = fitted(IDS, **neighbors, document_ids=documents).logits
    first = fitted(IDS[:, :8], **{k: v[:, :2] for k, v in neighbors.items()}).logits
    torch.testing.assert_close(packed[:, :8], first, rtol=1e-4, atol=1e-5)
    if fitted._packing_way != "mask":  # which leaves absolute positions as they are
        second = fitted(IDS[:, 8:], **{k: v[:, 2:] for k, v in neighbors.items()}).logits
        torch.testing.assert_close(packed[:, 8:], second, rtol=1e-4, atol=1e-5)
    other = torch.cat([IDS[:, :8].flip(1), IDS[:, 8:]], dim=1)
    moved = fitted(other, **neighbors, document_ids=documents).logits
    torch.testing.assert_close(moved[:, 8:], packed[:, 8:], rtol=1e-4, atol=1e-5)
    off = fitted(IDS, document_ids=documents).logits
    torch.testing.assert_close(off[:, :8], fitted(IDS[:, :8]).logits, rtol=1e-4, atol=1e-5)


class Values:
    """A store of which only the values are read: row i is the i-th of some neighbors."""

    def __init__(self, neighbor_ids, neighbor_mask):
        self.ids, self.mask = (x.flatten(0, 2).numpy() for x in (neighbor_ids, neighbor_mask))

    def values(self, rows, retrieved_len):
        return self.ids[rows], self.mask[rows] & (rows >= 0)[..., None]


@names
def test_scores_of_some_tokens_are_those_of_all_logits(name, make_base, make_fitted, make_neighbors, open_gates):
    """The output embeddings see no other positions than those asked for, in rows of several lengths."""
    base, neighbors = make_base(name), make_neighbors(2, 3)
    texts, places = [IDS[0].numpy(), IDS[1, :11].numpy()], [np.array([1, 6, 13]), np.array([9, 10])]
    rows = [np.arange(6).reshape(3, 2), np.arange(6, 12).reshape(3, 2)]
    fitted = make_fitted(name, copy.deepcopy(base))
    open_gates(fitted)
    for model, given in ((base, {}), (fitted, neighbors)):
        found = score_tokens(model, texts, places, rows if given else None, Values(**neighbors))
        for i, (text, at, scores) in enumerate(zip(texts, places, found, strict=True)):
            own = {key: x[i : i + 1, : len(text) // 4] for key, x in given.items()}
            with torch.no_grad():
                log_p = model(torch.from_numpy(text)[None], **own).logits[0, at - 1].double().log_softmax(-1)
            np.testing.assert_allclose(scores.log_probs, log_p[range(len(at)), text[at]].numpy(), atol=2e-5)
            assert (scores.greedy == (log_p.argmax(-1).numpy() == text[at])).all()
