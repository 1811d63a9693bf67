"""Values that make no sense are refused in one sentence that names field, value and remedy."""

import math
import os
import socket
from functools import partial

import pytest

from retro.common.files import load_json, read_text
from retro.common.settings import load_settings, read_yaml
from retro.evaluation.settings import BaselineSettings, ReaderSettings, ScoringSettings
from retro.evaluation.tasks.files import read_records
from retro.model import RetroConfig
from retro.planning import PlanSettings
from retro.retrieval.building.settings import BuildSettings
from retro.retrieval.filters.hits import QueryFilters
from retro.retrieval.remote.limits import RetrievalLimits
from retro.retrofit import RetrofitConfig
from retro.sampling.settings import DecodingSettings
from retro.serve.limits import GenerationLimits
from retro.text.corpus import expand_inputs
from retro.training.settings import TrainSettings

train = partial(TrainSettings, store="s", output="o", max_steps=3)
build = partial(BuildSettings, "s", ["a.txt"], "t")
plan = partial(PlanSettings, ["a.txt"], "t")
draw = partial(DecodingSettings, do_sample=True)
fit, retro = RetrofitConfig.checked, RetroConfig.checked
NAN, INF = math.nan, math.inf
WRONG = {
    train: {
        "min_lr_ratio": [2, -0.1, NAN], "window_len": [0, 64_000_000, True, 1.5], "lr": [0, NAN, INF, "x"],
        "store": ["", " ", "a\0b", "a\ud800"], "output": [""], "betas": [(1, 0.9), (0.9,), 3], "seed": [-1, 2**32],
        "batch_size": [0, -1, True], "drop_neighbors": [1, -0.1, NAN], "optimizer": ["sgd"], "retrieval": [1],
        "lr_ratios": [{"a": -1}, {"a": NAN}, [1]], "max_steps": [10**30, 10**5000], "num_neighbors": [0, 10**9],
        "weight_decay": [-1, INF], "warmup_steps": [-1, True], "keep_checkpoints": [0], "tracker": [""],
    },
    build: {
        "chunk_len": [0, 65536, True], "workers": [0, 10**9], "recall": [0, 1.5, NAN], "embedder": [""],
        "shard_chunks": [0], "max_length": [-3], "batch_size": [0, True], "min_chars": [0, -1], "quality": [[""], "x"],
        "executor": ["threads"], "subsample": [(NAN, 1), (0.5, 1.5)], "key_dtype": ["int8"], "on_bad": ["x"],
    },
    plan: {"tokens": [0, NAN, INF], "tflops": [0, True], "model": [""]},
    draw: {
        "max_new_tokens": [0, -1], "top_k": [-1], "top_p": [0, 1.1, NAN], "temperature": [0, INF, True],
        "stop_strings": [[""], "x"], "seed": [True, -1], "num_beams": [0, 10**9], "num_return_sequences": [0],
    },
    ScoringSettings: {"stride": [0, -1], "window_len": [64_000_000, True], "seed": [-1], "cache": [""]},
    ReaderSettings: {"align": ["x"], "num_neighbors": [-1, 10**9], "max_len": [0], "batch_size": [True]},
    BaselineSettings: {
        "knn_weights": [(1,), (NAN,)], "knn_ks": [(0,)], "temperature": [0, NAN], "knn_temperatures": [(0,)],
        "num_neighbors": [(), (0,)], "windows_per_document": [-1], "stride": [0], "oracle_candidates": [0],
    },
    GenerationLimits: {"max_batch": [0, True, 1.5], "max_seconds": [0, NAN, INF]},
    RetrievalLimits: {"max_queries": [0, True], "grace_seconds": [NAN, -1.0]},
    QueryFilters: {"min_date": [""], "quality": [[""]]},
    retro: {
        "hidden_size": [0, -8, True, 10**12], "cca_layers": [[6, 6], [True], [0]], "rope_theta": [NAN, 0],
        "rms_norm_eps": [INF], "cca_partial_rotary_factor": [NAN, 2], "num_neighbors": [10**9],
        "encoder_num_layers": [-1], "encoder_cross_attention_layers": [[1, 1]], "vocab_size": [0, 2**40],
    },
    fit: {"chunk_len": [0, True], "initializer_range": [NAN], "encoder_num_layers": [-1], "num_neighbors": [10**9]},
}  # fmt: skip


@pytest.mark.parametrize("settings", WRONG, ids=lambda one: getattr(getattr(one, "func", one), "__qualname__", "?"))
def test_a_value_out_of_range_is_named_with_the_remedy(settings):
    for field, values in WRONG[settings].items():
        for value in values:
            with pytest.raises(ValueError) as error:
                settings(**{field: value})
            said = str(error.value)
            assert field in said and "\n" not in said and len(said) < 250, (field, value, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "line 2: not YAML (seed is given twice"),
        ("model: {a: 1, a: 2}", "a is given twice"),
        ("seed: 010", "010 is no decimal number"),
        ("seed: 0o10", "'0o10' is no decimal number"),
        ("seed: 08", "'08' is no decimal number"),
        ("seed: 0x10", "0x10 is no decimal number"),
        ("seed: 1:30", "1:30 is no decimal number"),
        ("model: {hidden_size: 0o10}", "'0o10' is no decimal number"),
        ("model: {2: 1}", "a name is no text"),
        ("model: &x {a: 1}\nlr_ratios: *x", "*x is an alias"),
        ("model: " + "[" * 9000 + "]" * 9000, "nested more than 20 deep"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("store: a\0b", "not YAML"),
    ],
)
def test_yaml_that_is_read_as_something_else_is_refused(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_settings(TrainSettings, tmp_path / "a.yaml", ["store=s", "output=o", "max_steps=3"])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["seed=010", "seed=0x10", "lr=01", "model.hidden_size=010"])
def test_an_override_that_looks_octal_is_refused(override):
    with pytest.raises(ValueError, match="is no decimal number"):
        load_settings(TrainSettings, None, ["store=s", "output=010", "max_steps=3", override])


READERS = {"text": read_text, "json": load_json, "yaml": read_yaml, "records": lambda path: list(read_records(path))}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_file_that_is_none_or_no_text_is_named(tmp_path, read):
    """Pipes and sockets would never end; what is nested too deep or no UTF-8 is no file of ours."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name in ("pipe.jsonl", "s.jsonl", "bytes.jsonl", *["deep.jsonl"] * (read is not read_text)):
        with pytest.raises(ValueError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["", "a\0b", "/dev/zero", "{}/pipe.jsonl", "{}"])
def test_an_input_that_is_no_file_is_refused(tmp_path, given):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="no name|is a pipe, a socket or a device"):
        expand_inputs([given.format(tmp_path)])
