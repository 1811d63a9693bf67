"""The learning rate in closed form, the length of a run, the refusals, and the packaged configurations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retro.model import RetroForCausalLM
from retro.common.settings import find_config, load_settings
from retro.training.pretrain import model_config
from retro.training.settings import FREE_FIELDS, TrainSettings, learning_rate


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"output": "o", "store": "s", "max_steps": 100, **changes})


def test_learning_rate_at_the_marks():
    s = settings(lr=2e-4, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(0, 100, s) == 1e-7
    assert learning_rate(5, 100, s) == pytest.approx((1e-7 + 2e-4) / 2)
    assert learning_rate(10, 100, s) == 2e-4
    assert learning_rate(55, 100, s) == pytest.approx((2e-4 + 2e-5) / 2), "the middle of the cosine"
    assert learning_rate(100, 100, s) == pytest.approx(2e-5)
    assert learning_rate(500, 100, s) == pytest.approx(2e-5)


@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 200), st.floats(1e-6, 1), st.floats(0, 1))
def test_learning_rate_in_closed_form(step, num_steps, warmup, top, ratio):
    got = learning_rate(step, num_steps, settings(lr=top, warmup_steps=warmup, min_lr_ratio=ratio))
    if step < warmup:
        assert got == pytest.approx(1e-7 + (top - 1e-7) * step / warmup)
    elif warmup < num_steps and step <= num_steps:
        angle = math.pi * (step - warmup) / (num_steps - warmup)
        assert got == pytest.approx(top * (ratio + (1 - ratio) * (1 + math.cos(angle)) / 2))
    assert 0 <= got <= max(top, 1e-7) * (1 + 1e-12)


def test_the_length_of_a_run_in_tokens():
    s = settings(max_steps=None, max_tokens=1000, window_len=10, batch_size=3, gradient_accumulation_steps=2)
    assert s.num_steps(world_size=1) == 17  # 60 tokens a step
    assert s.num_steps(world_size=2) == 9
    assert settings(max_steps=7).num_steps(world_size=2) == 7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(max_tokens=5), ["max_steps is 100", "max_tokens 5", "give one"]),
        (dict(max_steps=None), ["max_steps is None", "give one"]),
        (dict(retrieval=False, random_neighbors=True), ["random_neighbors", "retrieval"]),
        (dict(batch_size=0), ["batch_size is 0", "at least 1"]),
        (dict(lr=float("nan")), ["lr is nan"]),
        (dict(eval_windows=0), ["eval_windows is 0"]),
        (dict(drop_neighbors=1.0), ["drop_neighbors is 1.0", "below 1"]),
        (dict(drop_neighbors=-0.1), ["drop_neighbors is -0.1"]),
        (dict(lr_width=0), ["lr_width is 0", "at least 1"]),
        (dict(seed=2**32), ["seed is 4294967296", "below 2^32"]),
        (dict(warmup_steps=-1), ["warmup_steps is -1", "at least 0"]),
    ],
)
def test_refusals(changes, named):
    with pytest.raises(ValueError) as error:
        settings(**changes)
    assert all(part in str(error.value) for part in named), error.value


def test_packaged_configurations_load():
    files = sorted(find_config("train_small").parent.glob("train_*.yaml"))
    assert len(files) >= 2
    for file in files:
        assert load_settings(TrainSettings, file, ["output=o", "store=s"]).retrieval


@pytest.mark.parametrize("file", sorted(find_config("train_small").parent.glob("train_*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_makes_a_model(file, words_store):
    with torch.device("meta"):
        model = RetroForCausalLM(model_config(load_settings(TrainSettings, file, ["output=o", "store=s"]), words_store))
    assert model.config.cca_layers
    modern = "induction" if "modern" in file.stem or file.stem in ("train_small", "train_medium") else "random"
    assert model.config.cca_init == modern


def test_the_paper_recipe():
    s = load_settings(TrainSettings, find_config("train_172m"), ["output=o", "store=s"])
    assert s.windows_per_step(1) == 256 and s.window_len == 2048
    assert (s.lr, s.min_lr_ratio, s.warmup_steps, s.weight_decay) == (2e-4, 0.1, 750, 0.1)
    assert s.num_steps(1) == pytest.approx(419.4e9 / (256 * 2048), abs=1)


def test_free_fields_are_fields():
    assert set(FREE_FIELDS) <= set(TrainSettings.__dataclass_fields__)
