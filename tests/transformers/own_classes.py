"""transformers' own test classes, over tiny RETROs and fits, with bases alone as the control: `make test-transformers`.

They come with the source distribution of the installed version. It holds the tests of models and of configurations, but
none of its subfolders: the testers of generation and of exports, which are not there, are left out.
"""

import copy
import importlib
import json
import sys
import types
import unittest
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from retro import RetroConfig, RetrofitConfig, RetrofitForCausalLM, RetroForCausalLM, RetroModel
from tests.transformers.cannot import CANNOT

FOLDER = Path("build", f"transformers-{transformers.__version__}", "tests").resolve()
PACKAGE = "transformers_tests"
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {"return_dict": False, "output_hidden_states": True}},
}


def _opened(*names: str) -> list[types.ModuleType]:
    """Modules of the folder, as of a package, with empty classes in the place of what it lacks."""
    (FOLDER / "__init__.py").touch()  # the tester of configurations imports it
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = package
    for name, members in MISSING.items():
        assert not (FOLDER / name.partition(".")[0]).exists(), f"{name} is in {FOLDER}: take it from there"
        for full in (f"{PACKAGE}.{name.partition('.')[0]}", f"{PACKAGE}.{name}"):
            sys.modules.setdefault(full, types.ModuleType(full))
        vars(sys.modules[f"{PACKAGE}.{name}"]).update(members)
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


modeling, configuration = _opened("test_modeling_common", "test_configuration_common")

NAMES = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **NAMES)
CHUNKS = dict(chunk_len=4, retrieved_len=8)
RETRO = dict(**SIZES, **CHUNKS, cca_layers=[2], encoder_hidden_size=16)
BASES = {
    "llama": (transformers.LlamaForCausalLM, dict(**SIZES, intermediate_size=37)),
    "gpt2": (transformers.GPT2LMHeadModel, dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, **NAMES)),
}


class Tester:
    """What transformers asks of a model's tester: a configuration, and inputs with or without neighbors."""

    batch_size, seq_length, is_training = 3, 8, True
    hidden_size, num_hidden_layers, num_attention_heads = (
        SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )

    def __init__(self, kind: type, given: dict, reads: bool):
        self.kind, self.given, self.reads = kind, given, reads

    def get_config(self):
        return self.kind(**copy.deepcopy(self.given))

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, NAMES["vocab_size"], (self.batch_size, self.seq_length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.reads:
            shape = (self.batch_size, self.seq_length // CHUNKS["chunk_len"], 2, CHUNKS["retrieved_len"])
            inputs["neighbor_ids"] = torch.randint(3, NAMES["vocab_size"] // 2, shape, generator=generator)
        return self.get_config(), inputs


modeling.MODEL_MAPPING_NAMES["retro"] = "RetroModel"  # which has no loss


def _cases() -> dict[str, tuple]:
    cases = {f"{base}": ("control", (model,), model.config_class, given) for base, (model, given) in BASES.items()}
    for side in ("off", "on"):
        cases[f"retro_{side}"] = ("retro", (RetroModel, RetroForCausalLM), RetroConfig, RETRO)
        for base, (model, given) in BASES.items():
            for form in ("pointer", "paper", "joint"):
                fit = dict(form=form, **CHUNKS)
                whole = RetrofitConfig(base_config=model.config_class(**given), **fit).to_json_string()
                fit["base_config"] = json.loads(whole)["base_config"]
                cases[f"{base}_{form}_{side}"] = ("fit", (RetrofitForCausalLM,), RetrofitConfig, fit)
    return cases


def _test_config(self):
    tester = configuration.ConfigTester(self, config_class=self.model_tester.kind, **self.model_tester.given)
    tester.run_common_tests()


def _failing(test, match: str, why: str):
    """Fails where the test passes, is left out, or fails in another way than an entry of CANNOT says."""

    def run(self):
        self.subTest = lambda *names, **values: nullcontext()  # which would keep the error to itself
        try:
            test(self)
        except unittest.SkipTest:
            pass
        except Exception as error:
            self.assertRegex(f"{type(error).__name__}: {error}", match)
            pytest.xfail(why)
        self.fail("this test no longer fails: take it out of CANNOT")

    return run


def _made(name: str, group: str, models: tuple[type, ...], config: type, given: dict) -> type:
    reads = name.endswith("_on")
    bases = (modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase)
    members = {
        "has_attentions": group != "retro",  # RETRO attends by one kernel, which gives none
        "all_model_classes": models,
        "setUp": lambda self: setattr(self, "model_tester", Tester(config, given, reads)),
        "test_config": _test_config,
    }
    whole = type(f"Test_{name}", bases, members)
    entries = {test: entry for test, entry in CANNOT[group].items() if entry[0] in ("", *name.split("_"))}
    failing = {test: _failing(getattr(whole, test), *entry[1:]) for test, entry in entries.items()}
    return type(whole.__name__, (whole,), {"__module__": __name__, **failing})


for _name, _case in _cases().items():
    globals()[f"Test_{_name}"] = _made(_name, *_case)
