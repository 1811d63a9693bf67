"""RetrofitConfig: defaults for bases of any depth, what is kept, and a sentence for each field that is refused."""

import pytest
import torch
from transformers import LlamaConfig

from retro.retrofit import RetrofitConfig, RetrofitForCausalLM
from retro.retrofit.config import POSITIVE, chosen_layers
from tests.retrofit.conftest import FORMS, forms

IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))


def make(num_layers: int = 30, **options) -> RetrofitConfig:
    base = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=num_layers)
    return RetrofitConfig(base_config=base, **options)


def sizes(config: RetrofitConfig) -> list:
    names = ("intermediate_size", "num_attention_heads", "head_dim", "cross_attention_layers")
    return [getattr(config, f"encoder_{name}") for name in names]


@pytest.mark.parametrize(
    ("num_layers", "key_layer", "reading", "random"),
    [
        (1, 1, [1], [1]),
        (2, 1, [2], [1]),
        (6, 1, [5, 6], [3, 6]),
        (12, 2, [10, 11, 12], [6, 9, 12]),
        (30, 6, [24, 27, 30], [6, 9, 12, 15, 18, 21, 24, 27, 30]),
    ],
)
def test_defaults_by_depth(num_layers, key_layer, reading, random):
    pointer = make(num_layers, form="pointer")
    assert (pointer.key_layer, pointer.key_lags, pointer.cca_layers) == (key_layer, 10, None)
    assert make(num_layers).form == "joint"
    for form in ("paper", "joint"):
        config = make(num_layers, form=form)
        assert (config.start, config.key_layer, config.key_lags) == ("reading", key_layer, 10)
        assert (config.cca_layers, config.encoder_hidden_size) == (reading, 576)
        assert config.encoder_num_layers == 0 and sizes(config) == [None, None, None, None]
        assert sizes(make(num_layers, form=form, encoder_num_layers=3)) == [2304, 9, 64, [1]]
    config = make(num_layers, form="paper", start="random")
    assert (config.key_layer, config.key_lags, config.cca_layers) == (None, None, random)
    assert config.encoder_num_layers == 2 and sizes(config) == [2304, 9, 64, [1]]


def test_default_lags_are_fewer_than_the_tokens_of_a_chunk():
    for form in ("pointer", "paper", "joint"):
        assert [make(form=form, chunk_len=m).key_lags for m in (1, 4, 11, 32)] == [0, 3, 10, 10]
        assert make(form=form, key_lags=0).key_lags == 0


def test_chosen_layers():
    assert chosen_layers("middle", 30, "reading") == [15] and chosen_layers("middle", 3, "random") == [2]
    assert chosen_layers([3, 1, 3], 3, "reading") == [1, 3]


OPTIONS = {
    "pointer": {"key_layer": 3, "key_lags": 1},
    "paper": {
        "key_layer": 2,
        "cca_layers": "middle",
        "encoder_num_layers": 2,
        "encoder_cross_attention_layers": (2, 1),
    },
    "random": {"cca_layers": [3], "gate": "channel", "encoder_shares_embeddings": False, "encoder_hidden_size": 24},
    "joint": {"key_lags": 2, "cca_layers": [3, 1], "encoder_intermediate_size": 20, "initializer_range": 0.1},
}


@forms
def test_a_configuration_survives(form, make_base, tmp_path):
    fields = FORMS[form] | OPTIONS[form]
    config = RetrofitConfig(base_config=make_base().config, chunk_len=4, retrieved_len=8, **fields)
    config.save_pretrained(tmp_path)
    names = [name for name in RetrofitConfig.__annotations__ if name != "base_config"]
    for again in (RetrofitConfig.from_dict(config.to_dict()), RetrofitConfig.from_pretrained(tmp_path)):
        assert type(again.base_config) is LlamaConfig and again.base_config.to_dict() == config.base_config.to_dict()
        for name in names:
            assert _plain(getattr(again, name)) == _plain(getattr(config, name)), name


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


@forms
def test_options_survive_in_a_model(form, make_fitted, make_neighbors, open_gates, tmp_path):
    model = make_fitted(form=form, **OPTIONS[form])
    inputs = {"input_ids": IDS, **make_neighbors(2, 3)}
    assert torch.equal(model(**inputs).logits, model(IDS).logits)
    open_gates(model)
    assert not torch.equal(model(**inputs).logits, model(IDS).logits)
    model.save_pretrained(tmp_path)
    loaded = RetrofitForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


PAPER = {
    "start": "random",
    "cca_layers": [2],
    "encoder_num_layers": 3,
    "encoder_intermediate_size": 8,
    "encoder_num_attention_heads": 2,
    "encoder_head_dim": 8,
    "encoder_cross_attention_layers": [2],
    "initializer_range": 0.1,
    "encoder_hidden_size": 16,
}
RANDOM_START = {"encoder_shares_embeddings": False, "gate": "channel"}
MATCHING = {"key_layer": 2, "key_lags": 1}
REFUSED = [
    ("pointer", PAPER | RANDOM_START, "but form is 'pointer'; it belongs to form='paper'"),
    ("paper", RANDOM_START, "but start is 'reading'; it belongs to start='random'"),
    ("joint", RANDOM_START, "but form is 'joint'; it belongs to form='paper' with start='random'"),
    ("joint", {"start": "random"}, "start is 'random', but form is 'joint'; it belongs to form='paper'"),
    ("random", MATCHING, "but start is 'random'; it belongs to start='reading'"),
    ("random", dict.fromkeys(POSITIVE, 0), "is 0; give a "),
    ("pointer paper joint", {"chunk_len": -4, "retrieved_len": 0, "rms_norm_eps": -1.0}, "; give a "),
    ("paper random joint", {"encoder_num_layers": -1}, "encoder_num_layers is -1; give a whole number, at least 0"),
    ("pointer paper joint", {"retrieved_len": 65}, "retrieved_len is 65, but the base, .*, has 64 positions; give 64"),
    ("pointer paper joint", {"key_layer": 4}, "key_layer has 4; layers are counted from 1 to 3"),
    ("pointer paper joint", {"key_layer": 0}, "key_layer has 0; layers are counted from 1 to 3"),
    ("pointer paper joint", {"key_lags": 4}, "key_lags is 4; it must be 0 or more, and less than chunk_len 4"),
    ("pointer paper joint", {"key_lags": -1}, "key_lags is -1; it must be 0 or more"),
    ("paper random joint", {"cca_layers": [4]}, "cca_layers has 4; layers are counted from 1 to 3"),
    ("paper random joint", {"cca_layers": []}, "cca_layers is empty, .* name a layer"),
    ("paper random joint", {"cca_layers": "last"}, "cca_layers is 'last'; give layers from 1 to 3, or 'middle'"),
    ("paper random joint", {"encoder_cross_attention_layers": [2]}, "has 2; layers are counted from 1 to 1"),
    ("paper joint", {"encoder_hidden_size": 24}, "is 24, but start is 'reading', which needs the base's 16; leave it"),
    ("paper", {"start": "now"}, "start"),
    ("random", {"gate": "wide"}, "gate"),
    ("pointer joint", {"retrieved_len": 2}, "retrieved_len is 2, below chunk_len 4"),
    ("new", {}, "form is 'new'; choose one of pointer, paper, joint"),
]
CASES = [
    (form, {name: x}, words)
    for kinds, given, words in REFUSED
    for form in kinds.split()
    for name, x in (given or {"chunk_len": 4}).items()
]


def test_the_random_start_reads_neighbors_longer_than_the_bases_positions(make_fitted):
    model = make_fitted("gpt2", form="random", retrieved_len=80, encoder_num_layers=0)
    assert model(IDS, torch.randint(0, 64, (2, 3, 2, 80))).logits.shape == (2, 14, 64)


def test_sizes_of_encoder_layers_that_are_not_there_are_refused(make_fitted):
    idle = {"encoder_head_dim": 8, "encoder_cross_attention_layers": [1], "initializer_range": 0.1}
    for name, value in idle.items():
        with pytest.raises(
            ValueError, match=f"{name} is .*, but the encoder has no layers; it needs encoder_num_layers"
        ):
            make_fitted(form="joint", encoder_num_layers=0, **{name: value})


@pytest.mark.parametrize(("form", "options", "words"), CASES, ids=str)
def test_each_refused_field_has_its_sentence(form, options, words, make_fitted):
    with pytest.raises(ValueError, match=words) as refusal:
        make_fitted(form=form, **options)
    assert form == "new" or all(name in str(refusal.value) for name in options)
