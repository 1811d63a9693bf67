"""What Hugging Face's tools ask of a causal LM, asked of a RETRO and of fits alike."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from retro import RetrofitConfig, RetrofitForCausalLM
from retro.retrofit import retrofit
from tests.searches import RandomNeighbors

SIZES = dict(vocab_size=61, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
FIT = dict(chunk_len=4, retrieved_len=8)
GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))
NEIGHBORS = {"neighbor_ids": torch.randint(3, 61, (2, 2, 2, 8), generator=torch.Generator().manual_seed(1))}


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA, eos_token_id=2)).eval()


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=3, n_head=4, eos_token_id=2)).eval()


def fitted(base, **options):
    torch.manual_seed(1)
    model = retrofit(base, **FIT, **options)
    with torch.no_grad():
        for name, weight in model.form.named_parameters():
            if name.endswith(("gate", "opening")):
                weight.fill_(1.0)
    return model.eval()


FITS = {
    "llama, joint": lambda: fitted(make_llama()),
    "gpt2, pointer": lambda: fitted(make_gpt2(), form="pointer"),
    "gpt2, paper's start": lambda: fitted(make_gpt2(), form="paper", start="random"),
}
fits = pytest.mark.parametrize("model", FITS, indirect=True)
every = pytest.mark.parametrize("model", ["retro", *FITS], indirect=True)
reading = pytest.mark.parametrize("neighbors", [{}, NEIGHBORS], ids=["off", "on"])


@pytest.fixture
def model(request, make_model):
    return (
        make_model(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        if request.param == "retro"
        else FITS[request.param]()
    )


def saved(model, folder):
    if hasattr(model, "base"):
        model.base.save_pretrained(folder / "base")
        model.config.base_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "model")
    return folder / "model"


# generate()


@every
@reading
def test_embeddings_in_place_of_tokens(model, neighbors):
    embedded, expected = model.get_input_embeddings()(IDS).detach(), model.generate(IDS, **neighbors, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embedded, **neighbors, **GREEDY), expected[:, 10:])
    assert torch.equal(model.generate(IDS, inputs_embeds=embedded, **neighbors, **GREEDY), expected)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    padded = model.generate(inputs_embeds=embedded, attention_mask=mask, **neighbors, **GREEDY)
    assert torch.equal(padded, model.generate(IDS, attention_mask=mask, **neighbors, **GREEDY)[:, 10:])
    with pytest.raises(ValueError, match="inputs_embeds cannot be searched for; give input_ids, or neighbor_ids"):
        model.generate(inputs_embeds=embedded, retriever=RandomNeighbors(61), **GREEDY)


@every
def test_an_assistant_changes_no_text(model):
    """Nor does what it writes: padding tokens, of which a random model writes many, are text there."""
    other, given = make_llama(), {"inputs": IDS[:1], **GREEDY}
    for target, assistant in ((model, other), (other, model), (model, copy.deepcopy(model))):
        assert torch.equal(target.generate(assistant_model=assistant, **given), target.generate(**given))


@every
@pytest.mark.parametrize("use_cache", [False, True])
def test_what_stands_under_a_mask_is_not_read(use_cache, model):
    ids, mask = NEIGHBORS["neighbor_ids"], torch.ones_like(NEIGHBORS["neighbor_ids"], dtype=torch.bool)
    mask[..., 5:] = False
    given = {"input_ids": IDS, "neighbor_mask": mask, "use_cache": use_cache}
    logits = [model(neighbor_ids=ids.masked_fill(~mask, other), **given).logits for other in (3, -1, 10**6)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@every
@pytest.mark.parametrize("name", ["input_ids", "neighbor_ids", "labels"])
def test_tokens_that_the_model_has_not_are_refused(name, model):
    given = {"input_ids": IDS, "labels": IDS, **NEIGHBORS}
    for wrong in (-1, 61) if name != "labels" else (61,):
        other = given[name].clone()
        other.view(-1)[0] = wrong
        with pytest.raises(ValueError, match=f"^{name} holds {wrong}, and the model has 61 tokens"):
            model(**given | {name: other})


@every
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": True, "neighbor_ids": torch.zeros(1, 0, 2, 8, dtype=torch.long)}]
)
@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"the prompts have shape \[1, 0\]; give a tensor of token ids"),
        (torch.zeros(9, dtype=torch.long), r"have shape \[9\]"),
        ([[3, 4]], "are a list"),
        ({"input_ids": IDS}, "are a dict"),
    ],
)
def test_prompts_that_are_none(prompts, words, options, model):
    with pytest.raises(ValueError, match=words):
        model.generate(prompts, max_new_tokens=2, **options)


def test_positions_of_ones_own_are_refused(make_model):
    model = make_model()
    counted = torch.arange(10)[None]
    options = GREEDY | {"max_new_tokens": 1}
    assert torch.equal(model.generate(IDS, position_ids=counted, **options), model.generate(IDS, **options))
    with pytest.raises(ValueError, match="position_ids is given, but positions are counted"):
        model.generate(IDS, position_ids=counted + 1, **options)


@every
def test_continuous_batching_is_refused_or_the_bases(model):
    texts = [row.tolist() for row in IDS]
    refused = pytest.raises(ValueError, match="continuous batching keeps no neighbors of its rows; use generate")
    if not hasattr(model, "base"):
        with refused:
            model.generate_batch(texts, max_new_tokens=2)
        with refused:
            model.generate(IDS, cache_implementation="paged", max_new_tokens=2)
        return
    with refused:
        model.generate_batch(texts, retriever=RandomNeighbors(61), max_new_tokens=2)
    with refused:
        model.generate(IDS, cache_implementation="paged", **NEIGHBORS, max_new_tokens=2)


# forward()


@every
@reading
def test_a_tuple_on_request(model, neighbors):
    whole = model(IDS, **neighbors, labels=IDS, use_cache=True, output_hidden_states=True)
    loss, logits, cache, states = model(
        IDS, **neighbors, labels=IDS, use_cache=True, output_hidden_states=True, return_dict=False
    )
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits) and len(states) == 4
    model.config.return_dict = False
    assert torch.equal(model(IDS, **neighbors)[0], model(IDS, **neighbors, return_dict=True).logits)


@every
@reading
def test_hidden_states_by_argument_and_by_configuration(model, neighbors):
    """Each row's where it has its tokens: those of a padded row are those of the row alone."""
    assert model(IDS, **neighbors).hidden_states is None
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    states = model(IDS, attention_mask=mask, **neighbors, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    first = {name: x[1:] for name, x in neighbors.items()}
    alone = model(IDS[1:, 2:], **first).hidden_states
    if neighbors or not hasattr(model, "base"):  # without neighbors a base counts padding as positions
        for one, padded in zip(alone, states, strict=True):
            torch.testing.assert_close(padded[1:, 2:], one, rtol=1e-4, atol=1e-5)
    assert len(alone) == len(states) == 4


@fits
@reading
def test_attentions_of_a_fit_are_the_bases(model, neighbors):
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    attentions = model(IDS, attention_mask=mask, **neighbors, output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(2, 4, 10, 10)] * 3
    for weights in attentions:
        torch.testing.assert_close(weights[1, :, 2:, 2:].sum(-1), torch.ones(4, 8))
    assert model.generate(IDS, **neighbors, output_attentions=True, return_dict_in_generate=True, **GREEDY).attentions


def test_attentions_of_a_retro_are_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="output_attentions is True, which RETRO does not give; leave it out"):
        model.generate(IDS, output_attentions=True, return_dict_in_generate=True, **GREEDY)
    for ask in (
        model.set_attn_implementation,
        lambda kind: AutoModelForCausalLM.from_config(model.config, attn_implementation=kind),
    ):
        with pytest.raises(ValueError, match="attn_implementation is 'eager'; RETRO attends by 'sdpa' only"):
            ask("eager")


@fits
@reading
def test_arguments_that_a_base_would_swallow_are_refused(model, neighbors):
    with pytest.raises(ValueError, match="neighbour_ids: unknown argument of forward; did you mean neighbor_ids"):
        model(IDS, neighbour_ids=1, **neighbors)
    with pytest.raises(ValueError, match="neighbour_ids"):
        model.generate(IDS, neighbour_ids=1, **neighbors, **GREEDY)


@every
def test_masks_that_no_chunk_could_be_counted_by_are_refused(model):
    mask = torch.ones_like(IDS)
    mask[1, 4] = 0
    neighbors = NEIGHBORS if hasattr(model, "base") else {}  # without any, a mask is the base's own affair
    with pytest.raises(ValueError, match="attention_mask of row 1 is 0 between real tokens"):
        model(IDS, attention_mask=mask, **neighbors)
    for options in ({}, {"use_cache": False}):
        with pytest.raises(ValueError, match="attention_mask of row 1 is 0 after a real token; pad on the left"):
            model.generate(IDS, attention_mask=mask, **neighbors, **options, **GREEDY)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 7\]; it must be \[2, 10\]"):
        model(IDS, attention_mask=torch.ones(2, 7), **neighbors)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 10, 10\]; give \[b, n\]"):
        model(IDS, attention_mask=torch.ones(2, 1, 10, 10), **neighbors)


@fits
def test_neighbors_with_gaps_are_refused_where_the_base_reads_them(model):
    mask = torch.ones_like(NEIGHBORS["neighbor_ids"], dtype=torch.bool)
    mask[0, 1, 0, 0] = False
    if not model.config.matches:  # an encoder of its own attends to what is there
        ids = NEIGHBORS["neighbor_ids"].clone()
        ids[0, 1, 0, 0] = 5
        assert torch.equal(model(IDS, ids, mask).logits, model(IDS, **NEIGHBORS, neighbor_mask=mask).logits)
        return
    for options in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="neighbor_mask is False before a real token"):
            model(IDS, **NEIGHBORS, neighbor_mask=mask, **options)


@every
@reading
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_labels_that_are_shifted_already(train, model, neighbors):
    model.train(train)
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, :3], labels[1, :4] = 0, -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    given = {"attention_mask": mask, **neighbors}

    def run(**labels):
        torch.manual_seed(0)  # of dropout
        return model(IDS, num_items_in_batch=7, return_logits=return_logits, **labels, **given)

    return_logits = None
    for others in ({}, {"labels": labels.flip(1)}):
        torch.testing.assert_close(run(shift_labels=shifted, **others).loss, run(labels=labels).loss)
    return_logits = None if hasattr(model, "base") and not neighbors else True
    less, shifted[0, -1] = run(shift_labels=shifted), 5
    more, last = run(shift_labels=shifted).loss, less.logits[0, -1].log_softmax(-1)[5]
    torch.testing.assert_close(more, less.loss - last / 7)


@fits
@reading
def test_labels_of_another_length_are_refused(model, neighbors):
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=rf"{name} has shape \[2, 9\], and there are \[2, 10\] tokens"):
            model(IDS, **{name: IDS[:, 1:]}, **neighbors)


@every
@pytest.mark.parametrize("shape", [(2, 2, 0, 8), (2, 2, 2, 0)], ids=["k = 0", "r = 0"])
def test_no_neighbors_at_all_are_none(shape, model):
    nothing, off = {"neighbor_ids": torch.zeros(shape, dtype=torch.long)}, model(IDS, labels=IDS)
    nothing["neighbor_mask"] = nothing["neighbor_ids"].bool()
    torch.testing.assert_close(model(IDS, **nothing).logits, off.logits)
    torch.testing.assert_close(model(IDS, use_cache=True, **nothing).logits, off.logits)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS, labels=IDS, **nothing).loss, model(IDS, labels=IDS).loss, rtol=0.3, atol=0
        )
    model.eval()
    for options in (GREEDY, GREEDY | {"use_cache": False}):
        assert torch.equal(model.generate(IDS, **nothing, **options), model.generate(IDS, **options))


@every
def test_exported_it_is_the_same(model):
    mask = torch.ones_like(IDS)
    given = {"input_ids": IDS, "attention_mask": mask, "use_cache": False, **NEIGHBORS}
    program = torch.export.export(model, (), given)
    given["attention_mask"] = torch.cat([mask[:1], mask[1:].masked_fill(torch.arange(10) < 2, 0)])
    expected = model(**given).logits[:, 2:]
    torch.testing.assert_close(program.module()(**given).logits[:, 2:], expected, rtol=1e-4, atol=1e-5)
    given["attention_mask"][1, 4] = 0
    with pytest.raises(RuntimeError, match="attention_mask is 0 between real tokens"):
        program.module()(**given)


# PEFT


@every
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_of_peft(kind, model):
    """Texts are those of whole runs, other than without, and the virtual tokens get a gradient."""
    peft = pytest.importorskip("peft")
    expected = model.generate(IDS, **GREEDY)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    virtual = [weight for weight in tuned.parameters() if weight.requires_grad][0]
    torch.nn.init.normal_(virtual)
    out = tuned.generate(input_ids=IDS, **GREEDY)
    whole = tuned(input_ids=out[:, :-1], attention_mask=torch.ones_like(out[:, :-1])).logits
    assert torch.equal(out[:, 10:], whole[:, -6:].argmax(-1)) and not torch.equal(out, expected)
    tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    assert virtual.grad.any()


def test_chunks_are_counted_behind_a_prefix(make_model):
    """Of padded rows too, read whole or token by token; what stands in the padding means nothing."""
    model = make_model()

    def prefix(rows):
        cache, drawn = DynamicCache(), torch.Generator().manual_seed(0)
        for layer in range(3):
            cache.update(*(torch.randn(1, 4, 5, 8, generator=drawn).repeat(rows, 1, 1, 1) for _ in "kv"), layer)
        return cache

    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, 5:7] = 0
    whole = model(IDS, attention_mask=mask, past_key_values=prefix(2), **NEIGHBORS)
    assert whole.past_key_values.get_seq_length() == 15
    assert not torch.allclose(whole.logits, model(IDS, **NEIGHBORS).logits, atol=1e-2)
    alone = model(IDS[:1], past_key_values=prefix(1), neighbor_ids=NEIGHBORS["neighbor_ids"][:1])
    torch.testing.assert_close(whole.logits[:1], alone.logits)
    other = IDS.masked_fill(mask[:, 5:] == 0, 7)
    torch.testing.assert_close(
        model(other, attention_mask=mask, past_key_values=prefix(2), **NEIGHBORS).logits[:, 2:], whole.logits[:, 2:]
    )
    cache, pieces = prefix(2), []
    for token in range(10):  # chunks end at tokens 3 and 7, and in the padded row at 5 and 9
        ends = {3: (0, 0), 7: (0, 1), 5: (1, 0), 9: (1, 1)}.get(token)
        given = {}
        if ends is not None:
            given["neighbor_ids"] = NEIGHBORS["neighbor_ids"][:, ends[1] : ends[1] + 1]
        out = model(IDS[:, token : token + 1], attention_mask=mask[:, : token + 6], past_key_values=cache, **given)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 2:], whole.logits[:, 2:], rtol=1e-4, atol=1e-5)


# Loading and configuration


@every
def test_auto_classes_open_it_with_the_options_of_any_model(model, tmp_path):
    folder = saved(model, tmp_path)
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    for options in ({}, {"low_cpu_mem_usage": True}, {"device_map": "auto"}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(loaded) is type(model) and torch.equal(
            loaded(IDS, **NEIGHBORS).logits, model(IDS, **NEIGHBORS).logits
        )
    for name in ("dtype", "torch_dtype"):
        assert AutoModelForCausalLM.from_pretrained(folder, **{name: torch.float64}).dtype == torch.float64
    with torch.device("meta"), pytest.raises((RuntimeError, ValueError), match="meta device"):
        type(model).from_pretrained(folder)
    if hasattr(model, "base"):
        eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert eager.base.config._attn_implementation == "eager" == eager.config._attn_implementation


@every
def test_it_is_made_without_weights_and_takes_them_later(model):
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert all(weight.is_meta for weight in empty.parameters())
    if hasattr(model, "base"):
        empty.load_state_dict(model.state_dict(), assign=True)
        for (name, buffer), empty_one in zip(model.base.named_buffers(), list(empty.base.buffers()), strict=True):
            owner, _, last = name.rpartition(".")
            assert buffer.shape == empty_one.shape
            setattr(empty.base.get_submodule(owner), last, buffer)
        assert torch.equal(empty.eval()(IDS, **NEIGHBORS).logits, model(IDS, **NEIGHBORS).logits)


@every
def test_weights_and_configuration_in_memory_are_enough(model):
    state = model.state_dict()
    again, told = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"] and again.state_dict().keys() == state.keys()
    assert torch.equal(again(IDS, **NEIGHBORS).logits, model(IDS, **NEIGHBORS).logits)


@fits
def test_a_fits_own_base_is_whole_or_refused(model):
    state = model.state_dict()
    name = next(name for name in state if name.startswith("base.") and "norm" in name or ".ln_" in name)
    del state[name]
    with pytest.raises(ValueError, match=f"state_dict lacks the weight {name} of its base; copy the folder again"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)
    with pytest.raises(ValueError, match="no folder is given; give one, or both config and state_dict"):
        type(model).from_pretrained(None, state_dict=state)


@fits
def test_what_comes_from_the_meta_device_gets_its_start(model):
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    empty.to_empty(device="cpu").init_weights()
    assert torch.equal(empty.eval()(IDS, **NEIGHBORS).logits, empty(IDS).logits)  # neighbors change nothing yet
    assert empty(IDS).logits.isfinite().all() and empty(IDS).logits.std() > 0.1


@fits
def test_what_is_set_in_a_fits_configuration_holds_for_its_base(model):
    config = copy.deepcopy(model.config)
    config._attn_implementation, config.vocab_size, config.tie_word_embeddings = "eager", 50, True
    base = type(model)(config).base
    assert base.config is config.base_config is config.get_text_config() and base.config.vocab_size == 50
    assert base.config._attn_implementation == "eager"
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert model.base_model is model.base


@fits
def test_the_sizes_of_a_fit_are_its_bases(model, tmp_path):
    text, config = model.base.config, model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in names:
        assert getattr(config, name) == config.to_dict()[name] == getattr(text, name)
    assert (config.num_key_value_heads, config.head_dim) == (getattr(text, "num_key_value_heads", 4), 8)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 4
    assert RetrofitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="hidden_size is given, but it is the base's, 32; change the base"):
        RetrofitConfig(base_config=text, hidden_size=16)


def test_a_fit_made_from_its_configuration_takes_the_attention(tmp_path):
    config = FITS["llama, joint"]().config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert isinstance(model, RetrofitForCausalLM) and model.base.config._attn_implementation == "eager"
