"""The recipe: a tiny base over a tiny store, stopped and gone on with, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.retrofit.conftest import FORMS, forms
from tests.stand_ins import make_words_tokenizer
from tests.training.runs.conftest import stores  # noqa: F401


@pytest.fixture
def base_folder(tmp_path, make_base):
    folder = tmp_path / "base"
    make_base("llama", vocab_size=len(make_words_tokenizer(60))).save_pretrained(folder)
    make_words_tokenizer(60).save_pretrained(folder)
    return folder


@pytest.fixture
def make_settings(stores, tmp_path, base_folder):  # noqa: F811
    from retro.training.settings import RetrofitSettings

    def make(output: str = "run", form: str = "pointer", **changes):
        model = FORMS[form] | {"retrieved_len": 16}
        values = dict(
            output=str(tmp_path / output), base=str(base_folder), store=str(stores["train"]),
            valid_store=str(stores["valid"]), model=model, window_len=32,
            batch_size=2, max_steps=6, lr=1e-2, warmup_steps=2, eval_every=3, save_every=3, log_every=2,
        )  # fmt: skip
        return RetrofitSettings(**{**values, **changes})

    return make


def metrics(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@forms
def test_only_what_is_new_is_trained_and_kept(form, make_settings, tmp_path, capsys):
    from retro.retrofit import RetrofitForCausalLM
    from retro.training.loop import fit
    from retro.training.retrofit import prepare_run

    run = prepare_run(make_settings(form=form))
    assert "trainable%" in capsys.readouterr().out
    before = {n: p.clone() for n, p in run.state.model.base.named_parameters()}
    assert fit(run)
    assert all(torch.equal(p, before[n]) for n, p in run.state.model.base.named_parameters())
    for file in (tmp_path / "run").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert all(name.startswith("form.") for name in list(opened.keys())), file
    scores = [line for line in metrics(tmp_path / "run") if "bits_per_byte_on" in line]
    assert scores[0]["bits_per_byte_off"] == scores[-1]["bits_per_byte_off"] != scores[-1]["bits_per_byte_on"]
    loaded = RetrofitForCausalLM.from_pretrained(tmp_path / "run")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, run.state.model.get_parameter(name)), name


@forms
def test_a_run_in_two_parts_is_one_run(form, make_settings, tmp_path, monkeypatch):
    from retro.training import loop
    from retro.training.retrofit import prepare_run

    assert loop.fit(prepare_run(make_settings("whole", form)))
    cut = prepare_run(make_settings("cut", form))
    monkeypatch.setattr(loop, "finish", lambda run: None)
    cut.num_steps = 3
    assert loop.fit(cut)
    monkeypatch.undo()
    rest = prepare_run(make_settings("cut", form))
    assert rest.state.step == 3 and loop.fit(rest)
    whole = RunWeights(tmp_path / "whole")
    assert whole == RunWeights(tmp_path / "cut")


def test_a_compiled_fit_is_the_fit(make_settings, tmp_path, monkeypatch):
    from retro.training import compiling
    from retro.training.loop import fit
    from retro.training.retrofit import prepare_run

    monkeypatch.setattr(compiling, "BACKEND", "eager")  # no test waits for a compiler
    stats = torch._dynamo.utils.counters["stats"]
    for name in ("plain", "compiled", "compiled and checkpointed"):
        given = dict(compile=name != "plain", gradient_checkpointing=name == "compiled and checkpointed")
        stats.clear()
        assert fit(prepare_run(make_settings(name, "joint", max_steps=3, drop_neighbors=0.3, **given)))
        assert (stats["unique_graphs"] > 0) == given["compile"]
        assert RunWeights(tmp_path / name) == RunWeights(tmp_path / "plain")


class RunWeights:
    def __init__(self, folder):
        from safetensors.torch import load_file

        self.weights = load_file(folder / "model.safetensors")

    def __eq__(self, other):
        return self.weights.keys() == other.weights.keys() and all(
            torch.allclose(w, other.weights[n], atol=1e-3) for n, w in self.weights.items()
        )


RATES = {
    "pointer": {"form.matching.query.weight": 1, "form.gate.opening": 100, "form.gate.hidden": 1, "form.gate.bias": 30},
    "paper": {"form.cca.3.gate": 30, "form.cca.2.matching.key.bias": 0.3, "form.encoder.layers.0.": 0.3},
    "random": {"form.cca.3.gate": 30, "form.cca.2.norm.weight": 0.3, "form.encoder.layers.0.": 0.3},
}
RATES["joint"] = {
    name.replace("form", f"form.{part}"): rate for part in ("pointer", "paper") for name, rate in RATES[part].items()
}


@forms
def test_weights_learn_at_the_rates_of_their_form_unless_told_otherwise(form, make_fitted, make_settings):
    from retro.training.optimizer import make_optimizer

    model = make_fitted(form=form)
    for given, expected in ((None, RATES[form]), ({}, dict.fromkeys(RATES[form], 1)), ({"gate": 2}, {"gate": 2})):
        groups = make_optimizer(model, make_settings(lr_ratios=given)).param_groups
        rates = {id(p): group["lr_ratio"] for group in groups for p in group["params"]}
        for part, rate in expected.items():
            found = {rates[id(p)] for name, p in model.named_parameters() if part in name and id(p) in rates}
            assert found == {rate}, part


def test_the_start_is_of_text_from_all_over_the_store(stores, monkeypatch):  # noqa: F811
    from retro.retrieval import Store
    from retro.training import retrofit

    store = Store.open(stores["train"])
    rows = store.live_rows(np.arange(store.num_live_chunks))
    chunks = [chunk[:n].tolist() for chunk, n in zip(store.chunks(rows), store.chunk_lens(rows), strict=True)]
    text, windows = sum(chunks, []), -(-len(chunks) // 8)
    assert len(text) < store.num_live_chunks * store.chunk_len  # some chunks are padded
    whole = retrofit.start_text(store)
    assert whole.shape[1] == 64 and whole.flatten().tolist() == text[: len(text) // 64 * 64]
    monkeypatch.setattr(retrofit, "START_TOKENS", 3 * 64)
    some = retrofit.start_text(store)
    expected = sum((chunk for i in (0, windows // 3, 2 * windows // 3) for chunk in chunks[8 * i : 8 * i + 8]), [])
    assert len(some) == 2 and some.flatten().tolist() == expected[:128]
    with monkeypatch.context() as patched:
        patched.setitem(vars(store), "bos_token_id", 7)
        begun = retrofit.start_text(store)
    assert (begun[:, 0] == 7).all() and torch.equal(begun[:, 1:], some[:, 1:])
    monkeypatch.setattr(retrofit, "START_CHUNKS", 10_000)
    assert retrofit.start_text(store).tolist() == [text]


def test_refusals(make_settings, stores, make_base, tmp_path):  # noqa: F811
    from retro.training.retrofit import prepare_run

    with pytest.raises(ValueError, match="retrieval is false, so that nothing would be trained"):
        make_settings(retrieval=False)
    with pytest.raises(ValueError, match="has 64 tokens, the base .* 63; build a store with the base's tokenizer"):
        prepare_run(make_settings(store=str(stores["other"]), valid_store=None))
    with pytest.raises(ValueError, match="layers: unknown model field"):
        prepare_run(make_settings(model={"layers": 3}))
    with pytest.raises(ValueError, match="window_len: 72 is more than the 64 positions of the model; give 64 or fewer"):
        prepare_run(make_settings(window_len=72))
    with pytest.raises(ValueError, match="model.chunk_len: 4 is not the store's 8; leave it out"):
        prepare_run(make_settings(model={"chunk_len": 4}))
    make_words_tokenizer(59).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="another tokenizer than that of the base"):
        prepare_run(make_settings())
