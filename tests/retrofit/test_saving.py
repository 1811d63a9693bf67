"""What a fitted folder holds: nothing that was changed is lost, and another base is not taken for the one of before."""

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import retro
from retro.common.records import save_sums
from retro.retrofit import RetrofitForCausalLM, loading, open_base, retrofit
from retro.retrofit.fingerprint import differing_kind, fingerprint

IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(3))
LORA = dict(r=2, init_lora_weights=False)


@pytest.fixture
def place(tmp_path, make_base):
    """place(name): the folder of a tiny base."""

    def make(name="llama", folder="base", **changes):
        make_base(name, **changes).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return make


@pytest.fixture
def make_open(make_fitted, open_gates):
    """A fitted base whose gates are open."""

    def make(base, form="joint"):
        model = make_fitted(base=base, form=form)
        open_gates(model)
        return model.eval()

    return make


@pytest.fixture
def check_again(make_neighbors, tmp_path):
    """check_again(model): saved and loaded it is the same with and without neighbors; gives the files' weights."""

    def check(model, **options):
        model.eval().save_pretrained(tmp_path / "fitted")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", **options)
        neighbors = make_neighbors(2, 3)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(again(IDS, **neighbors).logits, model(IDS, **neighbors).logits)
        assert not torch.equal(again(IDS, **neighbors).logits, model(IDS).logits)
        assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]
        return load_file(tmp_path / "fitted" / "model.safetensors")

    return check


def lora_of(base):
    import peft

    names = ["c_attn"] if base.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    return peft.LoraConfig(target_modules=names, **LORA)


def trained(model):
    model.base.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model


def merged(model):
    import peft

    config = lora_of(model.base)
    config.target_modules = rf"base\..*\.({'|'.join(config.target_modules)})"
    return peft.get_peft_model(model, config).merge_and_unload()


def one_value(model):
    with torch.no_grad():
        model.base.get_input_embeddings().weight[7, 3] += 0.01
    return model


def resized(model):
    model.resize_token_embeddings(70, pad_to_multiple_of=8)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [trained, merged, one_value, resized])
def test_a_base_that_was_changed_is_written(change, name, place, make_open, check_again, caplog):
    pytest.importorskip("peft")
    model = change(make_open(place(name)))
    with caplog.at_level(logging.WARNING, "retro"):
        assert any(weight.startswith("base.") for weight in check_again(model))
    assert "the base is not what a name gives" in caplog.text
    assert model.config.vocab_size == model.base.config.vocab_size == (72 if change is resized else 64)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_without_a_place_is_written(name, make_base, make_open, check_again):
    assert "base.lm_head.weight" in check_again(make_open(make_base(name))) or name == "gpt2"


def test_a_base_in_memory_is_named_if_its_place_gives_it(place, make_open, check_again):
    opened = AutoModelForCausalLM.from_pretrained(place())
    kept = check_again(make_open(opened))
    assert all(name.startswith("form.") for name in kept)
    with torch.no_grad():
        opened.model.norm.weight[2] += 1e-3  # before it is fitted
    assert "base.model.norm.weight" in check_again(make_open(opened))


def test_a_base_in_another_type_is_still_the_one(place, make_open, check_again):
    model = make_open(place())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert all(name.startswith("form.") for name in check_again(model))


@pytest.mark.parametrize("way", ["around", "inside", "inside, in memory"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_of_the_base_are_kept(name, way, place, make_base, make_open, check_again):
    peft = pytest.importorskip("peft")
    opened = make_base(name) if way == "inside, in memory" else AutoModelForCausalLM.from_pretrained(place(name))
    if way == "around":
        opened = peft.get_peft_model(opened, lora_of(opened))
    model = make_open(opened)
    if way != "around":
        model.base.add_adapter(lora_of(opened))
    kept = check_again(model)
    assert any("lora_A" in weight for weight in kept)
    assert any(w.startswith("base.") and "lora" not in w for w in kept) == (way == "inside, in memory")
    left = copy.deepcopy(model).load_state_dict(kept, strict=False)  # as a Trainer that goes on does
    assert not left.unexpected_keys and not any("lora" in weight for weight in left.missing_keys)


def test_an_adapter_is_merged_where_it_is(place, make_open, check_again):
    peft = pytest.importorskip("peft")
    opened = AutoModelForCausalLM.from_pretrained(place())
    model = make_open(peft.get_peft_model(opened, lora_of(opened)))
    expected = model(IDS).logits
    model.base = model.base.merge_and_unload()
    torch.testing.assert_close(model(IDS).logits, expected)
    assert "base.lm_head.weight" in check_again(model)


def test_a_base_that_is_given_takes_the_adapter_of_the_folder(place, make_open, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_open(place())
    model.base.add_adapter(lora_of(model.base))
    model.save_pretrained(tmp_path / "fitted")
    for around in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base = peft.get_peft_model(base, lora_of(base)) if around else base
        again = RetrofitForCausalLM.from_pretrained(tmp_path / "fitted", base=base)
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_output_embeddings_that_were_untied_and_what_generate_does_are_kept(place, make_open, check_again, tmp_path):
    model = make_open(place("gpt2"))
    model.set_output_embeddings(torch.nn.Linear(16, 64, bias=False))
    model.generation_config.max_new_tokens = 7
    assert "base.lm_head.weight" in check_again(model)
    assert RetrofitForCausalLM.from_pretrained(tmp_path / "fitted").generation_config.max_new_tokens == 7


def test_the_folder_of_the_base_is_not_overwritten(place, make_open):
    base = place()
    with pytest.raises(ValueError, match="base is the folder of the base, which would be overwritten; save to another"):
        make_open(base).save_pretrained(base)
    assert AutoModelForCausalLM.from_pretrained(base).config.model_type == "llama"
    with pytest.raises(ValueError, match="variant is 'fp16', and a fitted folder has one file format; leave it out"):
        make_open(base).save_pretrained(base.parent / "fitted", variant="fp16")
    assert not (base.parent / "fitted").exists()
    with pytest.raises(ValueError, match="base is a RetrofitForCausalLM, which reads neighbors already; give a plain"):
        retrofit(make_open(base))


def test_adapters_that_could_not_be_loaded_are_refused(place, make_open, tmp_path):
    peft = pytest.importorskip("peft")

    def refused(words, model):
        with pytest.raises(ValueError, match=words):
            model.save_pretrained(tmp_path / "fitted")
        assert not (tmp_path / "fitted").exists()

    model = make_open(place())
    peft.get_peft_model(model, peft.LoraConfig(target_modules=r"base\..*q_proj"))
    refused("adapters lie around the fitted model; save the PEFT model", model)
    model = make_open(tmp_path / "base")
    for name in ("one", "two"):
        model.base.add_adapter(lora_of(model.base), name)
    refused(r"the base carries the adapters one \(LORA\), two \(LORA\); a fitted folder holds one", model)
    around = peft.get_peft_model(make_open(tmp_path / "base").base, lora_of(model.base))
    model = make_open(around)
    around.merge_adapter()
    refused("the base's adapter is merged, but still there", model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_another_base_under_the_same_name_is_refused(dtype, place, make_fitted, make_base, tmp_path):
    make_fitted(base=place()).save_pretrained(tmp_path / "fitted")
    assert RetrofitForCausalLM.from_pretrained(tmp_path / "fitted", dtype=dtype).base.dtype == dtype or torch.float32
    place(seed=5)
    with pytest.raises(ValueError, match=r"base .*base has other weights \(embeddings\) than the one that was fitted"):
        RetrofitForCausalLM.from_pretrained(tmp_path / "fitted", dtype=dtype)
    with pytest.raises(ValueError, match="has other weights"):
        RetrofitForCausalLM.from_pretrained(tmp_path / "fitted", base=make_base(seed=5))


def test_a_base_whose_configuration_was_changed_is_told(place, make_fitted, tmp_path, caplog):
    base = place()
    make_fitted(base=base).save_pretrained(tmp_path / "fitted")
    file = base / "config.json"
    for changes, told in (({"use_cache": False, "eos_token_id": 5}, 0), ({"rms_norm_eps": 0.5}, 1)):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        RetrofitForCausalLM.from_pretrained(tmp_path / "fitted")
        assert [record.name for record in caplog.records].count("retro.retrofit.loading") == told
    assert "base has rms_norm_eps 0.5, the one that was fitted 1e-06; unless that is meant, give that" in caplog.text


def test_a_base_that_is_offloaded_is_refused(place, tmp_path):
    pytest.importorskip("accelerate")
    options = {"device_map": "auto", "max_memory": {"cpu": "30KB"}, "offload_folder": str(tmp_path / "disk")}
    base = AutoModelForCausalLM.from_pretrained(place(), **options)
    with pytest.raises(ValueError, match="are offloaded, which a fit cannot read from; give more memory"):
        retrofit(base, chunk_len=4, retrieved_len=8)


def test_what_was_moved_together_is_found(place, make_fitted, words_tokenizer, tmp_path):
    (tmp_path / "here").mkdir()
    base = place(folder="here/models/base")
    make_fitted(base=base).save_pretrained(tmp_path / "here" / "runs" / "one" / "fitted")
    shutil.move(tmp_path / "here", tmp_path / "there")
    fitted = tmp_path / "there" / "runs" / "one" / "fitted"
    found = RetrofitForCausalLM.from_pretrained(fitted)
    assert found.base.name_or_path == str(tmp_path / "there" / "models" / "base")
    shutil.move(tmp_path / "there" / "models", tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"fitted names the base .*/here/models/base, which is not there; put it beside"
    ):
        RetrofitForCausalLM.from_pretrained(fitted)
    assert RetrofitForCausalLM.from_pretrained(fitted, base=tmp_path / "elsewhere" / "base") is not None
    loaded = retro.load(fitted, base=tmp_path / "elsewhere" / "base", tokenizer=words_tokenizer, device="cpu")
    assert type(loaded.model) is RetrofitForCausalLM
    with pytest.raises(ValueError, match="base is for a RETRO-fitted model that is loaded here, and .*base'. is none"):
        retro.load(tmp_path / "elsewhere" / "base", base=fitted, tokenizer=words_tokenizer)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantized_base_is_quantized_again(bits, place, make_fitted, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    given = {"quantization_config": BitsAndBytesConfig(**{bits: True})}
    base = AutoModelForCausalLM.from_pretrained(place(hidden_size=64, intermediate_size=64), **given)
    model = make_fitted(base=base, form="pointer").eval()
    model.save_pretrained(tmp_path / "fitted")
    again = RetrofitForCausalLM.from_pretrained(tmp_path / "fitted")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert len(set(again.config.base_fingerprint) - {"packed"}) == 2
        model.base.model.norm.weight += 0.1
    with pytest.raises(ValueError, match="the base is quantized, and not as .*base gives it; save it alone"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_an_adapter_merged_into_few_bits_is_noticed(bits, place, make_fitted, tmp_path):
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    given = {"quantization_config": BitsAndBytesConfig(**{bits: True})}
    base = AutoModelForCausalLM.from_pretrained(place(hidden_size=64, intermediate_size=64), **given)
    model = make_fitted(base=base, form="pointer").eval()
    model.base.add_adapter(lora_of(base))
    model.save_pretrained(tmp_path / "fitted")
    again = RetrofitForCausalLM.from_pretrained(tmp_path / "fitted")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    merged = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **given), lora_of(base)
    ).merge_and_unload()
    with pytest.raises(ValueError, match="the base is quantized, and not as .*base gives it"):
        make_fitted(base=merged, form="pointer").save_pretrained(tmp_path / "merged")


def test_embeddings_of_a_fit_are_resized_and_set(make_fitted, make_neighbors):
    """Those of the base, and the encoder's own."""
    model, neighbors = make_fitted("gpt2", form="random", encoder_shares_embeddings=False).eval(), make_neighbors(2, 3)
    before, ids = model(IDS, **neighbors).logits, IDS.clone()
    model.resize_token_embeddings(70, pad_to_multiple_of=16)
    torch.testing.assert_close(model(IDS, **neighbors).logits[..., :64], before)
    ids[0, 0] = neighbors["neighbor_ids"][0, 0, 0, 0] = 79
    assert (
        model(ids, **neighbors).logits.shape[-1] == model.config.vocab_size == len(model.form.encoder_embedding.weight)
    )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.set_input_embeddings(torch.nn.Embedding(80, 16))
    model.set_output_embeddings(torch.nn.Linear(16, 80))
    assert model.base.transformer.wte.weight.std() > 0.5
    loss = model(ids, **neighbors, labels=ids, return_logits=False).loss
    torch.testing.assert_close(loss, model(ids, **neighbors, labels=ids).loss)


def test_fingerprints(make_base):
    """The same numbers wherever weights lie and in whatever order; rounding is told from another base."""
    base = make_base(hidden_size=32)
    found, other = fingerprint(base), fingerprint(make_base(hidden_size=32, seed=1))
    turned = dict(reversed(base.state_dict().items()))
    assert set(found) == {"embeddings", "vectors", "matrices"}
    assert differing_kind(found, fingerprint(base, turned), exact=True) is None
    rounded = fingerprint(copy.deepcopy(base).bfloat16())
    assert differing_kind(found, rounded, exact=False) is None and differing_kind(found, rounded, exact=True)
    assert differing_kind(found, other, exact=False) == "embeddings"
    assert fingerprint(copy.deepcopy(base).to("meta")) == {}
    config = retro.RetrofitConfig(base_config=base.config, base_fingerprint=found, chunk_len=4, retrieved_len=8)
    assert config.base_fingerprint == found
    assert retrofit(base, form="pointer", chunk_len=4, retrieved_len=8).config.base_fingerprint is None


def test_a_fit_may_be_saved_into_a_folder_that_has_checksums(place, make_open, check_again, tmp_path):
    model = make_open(place("gpt2"))
    model.save_pretrained(tmp_path / "fitted")
    save_sums(tmp_path / "fitted")
    model.set_output_embeddings(torch.nn.Linear(16, 64, bias=False))
    assert "base.lm_head.weight" in check_again(model)


def test_a_revision_and_a_subfolder_are_the_folders_and_not_the_bases(place, make_open, tmp_path, monkeypatch):
    model = make_open(open_base(place()))
    model.save_pretrained(tmp_path / "fitted")
    for kind in (AutoModelForCausalLM, RetrofitForCausalLM):
        again = kind.from_pretrained(tmp_path, subfolder="fitted")
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    config, opened = tmp_path / "fitted/config.json", []
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_revision": "of the base"}))
    monkeypatch.setattr(loading, "open_base", lambda place, **options: opened.append(options) or model.base)
    for given in ({}, {"revision": "of the folder"}):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", **given)
    assert [options["revision"] for options in opened] == ["of the base"] * 2
    with pytest.raises(ValueError, match="use_safetensors is False, but pickled weights, .*, are not read"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", use_safetensors=False)
