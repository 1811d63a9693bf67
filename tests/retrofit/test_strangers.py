"""A model's folder from a stranger: nothing in it runs, and what it asks for is bounded before memory is taken."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from retro import RetroForCausalLM, RetroModel
from retro.common.files import open_npy
from retro.retrieval.building.tasks import load_tokenizer
from retro.retrieval.embedding.embedder import load_embedder
from retro.retrofit import RetrofitForCausalLM, retrofit
from retro.retrofit.bases import base_tokenizer, open_base
from tests.stand_ins import make_words_tokenizer


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=103, **sizes)).save_pretrained(folder)
    make_words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "stranger")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("load", [open_base, base_tokenizer, load_tokenizer, load_embedder])
def test_code_of_a_folder(folder, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("it asks whether to run the code"))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    classes = {name: "code.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    change(folder / "config.json", model_type="own", auto_map=classes)
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.Own", None]})
    with pytest.raises(ValueError, match="config.json asks for code of its own|comes with code of its own"):
        load(str(folder))


def test_pickled_weights_of_a_retro(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for kind in (RetroForCausalLM, RetroModel, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="pytorch_model.bin holds pickled weights, which could run code"):
            kind.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors is False, but pickled weights"):
        RetroForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


KERNELS = [
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "someone/kernel:forward"},
    {"experts_implementation": "someone/kernel@v1"},
]


@pytest.mark.parametrize("asked", KERNELS, ids=str)
def test_kernels_from_the_hub_are_the_callers_choice(folder, tmp_path, monkeypatch, asked):
    fetched = "transformers.integrations.hub_kernels.get_kernel"
    monkeypatch.setattr(fetched, lambda *args, **options: pytest.fail("a kernel was fetched"))
    retrofit(open_base(str(folder)), form="pointer", chunk_len=4).save_pretrained(tmp_path / "fitted")
    (tmp_path / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    change(folder / "config.json", **asked)
    found = json.loads((tmp_path / "fitted/config.json").read_text())
    change(tmp_path / "fitted/config.json", base_config={**found["base_config"], **asked})
    kind = next(iter(asked)).removeprefix("_")
    for load in (open_base, load_embedder):
        with pytest.raises(ValueError, match=f"asks for {kind} 'someone/kernel.*', which is code from the hub"):
            load(str(folder))
    for place in ("fitted", "adapter"):
        with pytest.raises(ValueError, match=f"asks for {kind} 'someone/kernel.*', which is code from the hub"):
            open_base(str(tmp_path / place))
    if "attn_implementation" in asked:
        assert open_base(str(folder), attn_implementation="sdpa").config._attn_implementation == "sdpa"


LOADS = [open_base, AutoModelForCausalLM.from_pretrained, RetrofitForCausalLM.from_pretrained]


@pytest.mark.parametrize("load", LOADS)
def test_kernels_that_the_caller_names_are_taken(folder, tmp_path, load):
    retrofit(open_base(str(folder)), form="pointer", chunk_len=4).save_pretrained(tmp_path / "fitted")
    with pytest.raises((ImportError, ValueError), match="`kernels` is either not installed"):  # past what refuses them
        load(str(tmp_path / "fitted"), attn_implementation="someone/kernel")


def test_a_kernel_in_the_configuration_of_a_retro(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    change(tmp_path / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(ValueError, match="attn_implementation is 'someone/kernel'; RETRO attends by 'sdpa' only"):
        RetroForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [open_base, load_embedder])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights(folder, load, name):
    if name == "adapter_model.bin":
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "."}))
    else:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"{name} holds pickled weights|no safetensors weights"):
        load(str(folder))


SIZES = [
    {"vocab_size": 10**11},
    {"hidden_size": 1 << 20, "head_dim": 4},
    {"intermediate_size": 1 << 36},
    {"num_hidden_layers": 10**9},
    {"vocab_size": 10**30},
]


@pytest.mark.parametrize("load", [open_base, load_embedder])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_absurd_sizes(folder, load, sizes):
    change(folder / "config.json", **sizes)
    with pytest.raises(ValueError, match=r"config\.json.*(which no model has|asks for [0-9,]+ weights)"):
        load(str(folder))


FORM_SIZES = [{"encoder_num_layers": 10**6}, {"encoder_num_layers": 1, "encoder_intermediate_size": 1 << 36}]


@pytest.mark.parametrize("sizes", FORM_SIZES, ids=str)
def test_absurd_sizes_of_a_form(folder, tmp_path, sizes):
    retrofit(open_base(str(folder)), form="paper", chunk_len=4).save_pretrained(tmp_path / "fitted")
    change(tmp_path / "fitted/config.json", **sizes)
    with pytest.raises(ValueError, match=r"which no model has|asks for [0-9,]+ weights|is 68719476736; give"):
        open_base(str(tmp_path / "fitted"))


def test_names_of_weights(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": "../../outside.safetensors"}}))
    with pytest.raises(ValueError, match="no plain name"):
        open_base(str(folder))


def npy(descr, shape, data=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


ARRAYS = {
    "pickle": npy("|O", "(1,)", pickle.dumps(Bomb())),
    "huge": npy("<f4", f"({1 << 50},)"),
    "wraps to nothing": npy("<f4", f"({1 << 32}, {1 << 32})"),
    "no number": npy("<f4", f"({10**30},)"),
    "negative": npy("<f4", "(-1,)"),
    "nested": npy("<f4", "(" * 90),
    "code": npy("<f4", "__import__('os')"),
    "a pickle alone": pickle.dumps(Bomb()),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", [*ARRAYS, "archive"])
def test_arrays(tmp_path, kind):
    file = tmp_path / "tokens.npy"
    if kind == "archive":
        np.savez(file.open("wb"), x=np.zeros(2))
    else:
        file.write_bytes(ARRAYS[kind])
    with pytest.raises(ValueError, match=r"tokens\.npy cannot be read"):
        open_npy(file)


def test_a_folder_of_ones_own_is_opened(folder):
    assert isinstance(open_base(str(folder)), torch.nn.Module)
