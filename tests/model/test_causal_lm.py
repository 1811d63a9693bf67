"""RetroForCausalLM as a Hugging Face model: contract, saving, checkpointing, padding, start, refusals."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import retro
from retro.common.records import save_sums
from retro.model import RetroConfig, RetroForCausalLM
from retro.model.config import PRESETS, default_cca_layers

INDUCTION = dict(
    encoder_hidden_size=32,
    num_attention_heads=1,
    encoder_num_attention_heads=1,
    encoder_head_dim=32,
    encoder_shares_embeddings=True,
    smeared_keys=True,
    cca_init="induction",
)
# Table 2 (LM-only) and the parameters of the RETRO of the same size, in millions, embeddings not counted
TABLE = {"172m": (132.1, 172.5), "425m": (368.1, 425.5), "1.5b": (1308.6, 1451.4), "7.5b": (6979.3, 7531.5)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_papers_parameter_counts(preset):
    for expected, overrides in zip(TABLE[preset], ({"cca_layers": []}, {}), strict=True):
        with torch.device("meta"):
            model = RetroForCausalLM(RetroConfig.from_preset(preset, vocab_size=128, **overrides))
        counted = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        assert counted == pytest.approx(expected * 1e6, rel=0.005)


@pytest.mark.parametrize("preset", PRESETS)
def test_modern_presets_are_the_papers_sizes_with_the_induction_start(preset):
    config, paper = (RetroConfig.from_preset(name, vocab_size=128) for name in (f"{preset}-modern", preset))
    assert (config.cca_init, config.position, paper.cca_init, paper.position) == (
        "induction", "rotary", "random", "relative",
    )  # fmt: skip
    same = ("hidden_size", "intermediate_size", "head_dim", "num_hidden_layers", "cca_layers")
    assert all(getattr(config, name) == getattr(paper, name) for name in same)
    assert config.embedding_multiplier == config.hidden_size**0.5 and paper.embedding_multiplier == 1


def test_default_cca_layers():
    assert default_cca_layers(12) == [6, 9, 12]
    assert default_cca_layers(32) == [6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert default_cca_layers(4) == [4]


@pytest.mark.parametrize("overrides", [{}, {"position": "relative"}, INDUCTION, {"cca_layers": []}])
def test_save_and_load_through_auto_classes(overrides, make_model, make_batch, tmp_path):
    model = make_model(**overrides)
    batch = make_batch(model, 10) if model.config.cca_layers else {"input_ids": torch.arange(10)[None]}
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is RetroConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RetroForCausalLM
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_public_names_resolve():
    for name in retro.__all__:
        assert getattr(retro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Retr'"):
        _ = retro.Retr


def test_loss_is_shifted_cross_entropy_over_kept_labels(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    labels = batch["input_ids"].clone()
    labels[0, :5] = -100
    out = model(**batch, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    model.train()
    lean = model(**batch, labels=labels)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, expected)
    assert model(**batch, labels=labels, return_logits=True).logits.shape == (2, 14, 61)
    assert model(**batch, logits_to_keep=3).logits.shape == (2, 3, 61)
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([2, 5])).logits, out.logits[:, [2, 5]])


def test_every_weight_gets_a_gradient(make_model, make_batch):
    for position in ("rotary", "relative"):
        model = make_model(position=position, smeared_keys=True).train()
        batch = make_batch(model, 14)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("documents", [None, [[0] * 8 + [1] * 6, [2] * 14]])
def test_neighbors_that_no_label_sees_are_not_encoded_and_change_nothing(documents, make_model, make_batch):
    """m = 4 and n = 14: E_3 is read from token 11 on, and E_2 by token 7 alone where the document ends there."""
    model = make_model().train()
    batch = make_batch(model, 14) | ({} if documents is None else {"document_ids": torch.tensor(documents)})
    batch["neighbor_mask"][:] = True
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, 8] = batch["labels"][0, 12:] = -100
    seen, results = [], []
    model.model.encoder.register_forward_hook(lambda _, given, out: seen.append(out.shape[1]))
    for all_logits in (True, False):
        model.zero_grad()
        loss = model(**batch, return_logits=all_logits).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert seen == [6, 5 if documents is None else 4]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_neighbor_gives_every_weight_a_gradient(make_model, make_batch):
    """Data-parallel training waits for each."""
    model = make_model().train()
    batch = make_batch(model, 14)
    batch["neighbor_mask"][:] = False
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_retrieval(reentrant, make_model, make_batch):
    model = make_model().train()
    batch = make_batch(model, 14)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[0]["model.encoder.layers.0.attention.q_proj.weight"].abs().sum() > 0


def test_trainer(make_model, make_batch, tmp_path):
    model = make_model()
    batch = make_batch(model, 14)
    rows = [{name: tensor[i] for name, tensor in batch.items()} | {"labels": batch["input_ids"][i]} for i in (0, 1)]
    options = dict(max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    before = Trainer(model, TrainingArguments(tmp_path, **options), eval_dataset=rows).evaluate()["eval_loss"]
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, gradient_checkpointing=True, **options),
        train_dataset=rows,
        eval_dataset=rows,
    )
    encoder = model.model.encoder.layers[0].attention.q_proj.weight.clone()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert not torch.equal(model.model.encoder.layers[0].attention.q_proj.weight, encoder)


def test_what_peft_passes_is_taken(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    nothing = dict(inputs_embeds=None, output_attentions=None, output_hidden_states=None, return_dict=None)
    assert torch.equal(model(**batch, **nothing).logits, model(**batch).logits)


def test_lora(make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    batch = make_batch(model, 14)
    fitted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    fitted(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in fitted.parameters() if p.requires_grad)
    fitted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(again(**batch).logits, fitted.eval()(**batch).logits)


def test_every_block_runs_through_its_forward(make_model, make_batch):
    """FSDP and accelerate's device maps hang their hooks there."""
    model, seen = make_model(), set()
    blocks = {name: m for name, m in model.named_modules() if type(m).__name__ in model._no_split_modules}
    for name, block in blocks.items():
        block.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(**make_batch(model, 14))
    assert seen == set(blocks) and len(blocks) == 5


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_left_padded_rows_equal_rows_alone(position, make_model, make_batch):
    model = make_model(position=position)
    batch = make_batch(model, 14)
    batch["neighbor_mask"][1, 2:] = False  # row 1 has 9 tokens, so 2 whole chunks
    alone = model(batch["input_ids"][1:, 5:], *(batch[f"neighbor_{x}"][1:, :2] for x in ("ids", "mask"))).logits
    batch["attention_mask"] = torch.tensor([[1] * 14, [0] * 5 + [1] * 9])
    padded, states = model(**batch, output_hidden_states=True), model.model(**batch).last_hidden_state
    for logits in (padded.logits, model.lm_head(padded.hidden_states[-1]), model.lm_head(states)):
        torch.testing.assert_close(logits[1:, 5:], alone, rtol=1e-4, atol=1e-4)
    right = {**batch, "input_ids": batch["input_ids"].roll(-5, 1)}
    right["attention_mask"] = torch.tensor([[1] * 9 + [0] * 5] * 2)
    torch.testing.assert_close(model(**right).logits[1:, :9], alone, rtol=1e-4, atol=1e-4)


def test_hidden_states_on_request(make_model):
    model = make_model()
    ids = torch.arange(9)[None]
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1 and model(ids).hidden_states is None
    torch.testing.assert_close(model.lm_head(states[-1]), model(ids).logits)


@pytest.mark.parametrize(
    "overrides", [{}, {"encoder_shares_embeddings": True}, {"tie_word_embeddings": False}, INDUCTION]
)
def test_embeddings_are_resized_everywhere(overrides, make_model, make_batch, tmp_path):
    model = make_model(**overrides)
    batch = make_batch(model, 14)
    before = model(**batch).logits
    model.resize_token_embeddings(64, pad_to_multiple_of=16)
    torch.testing.assert_close(model(**batch).logits[..., :61], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    model.resize_token_embeddings(70)
    batch["input_ids"][0, 0] = batch["neighbor_ids"][0, 0, 0, 0] = 69
    assert model(**batch).logits.shape[-1] == model.config.vocab_size == 70
    model.save_pretrained(tmp_path)
    assert torch.equal(RetroForCausalLM.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    model.resize_token_embeddings(61)
    batch["input_ids"][0, 0] = batch["neighbor_ids"][0, 0, 0, 0] = 5
    assert model(**batch).logits.shape[-1] == 61
    model.set_input_embeddings(torch.nn.Embedding(61, 32))
    model.tie_weights()
    assert model.get_input_embeddings() is model.model.embed_tokens and model(**batch).logits.shape[-1] == 61


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (1, 0)])
def test_no_neighbors_and_no_tokens_of_them_are_retro_off(shape, make_model, make_batch):
    model = make_model()
    ids = make_batch(model, 14)["input_ids"]
    nothing = torch.zeros(2, 3, *shape, dtype=torch.long)
    given = {"neighbor_ids": nothing, "neighbor_mask": nothing.bool()}
    expected = model(ids).logits
    for more in ({}, {"use_cache": True}):
        torch.testing.assert_close(model(ids, **given, **more).logits, expected)
    assert torch.isfinite(model(ids, nothing).logits).all()
    model.train()(ids, nothing[:, :, :0], labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_random_start_is_what_it_says():
    config = RetroConfig(vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    torch.manual_seed(0)
    block = RetroForCausalLM(config).requires_grad_(False).model.layers[3]
    assert block.attention.q_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attention.o_proj.weight.std() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert block.cross_attention.attention.o_proj.weight.std() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert block.feed_forward.down_proj.weight.std() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert (block.attention_norm.weight == 1).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cca_layers": [2, 5]}, "cca_layers has 5; layers are counted from 1 to 3"),
        ({"encoder_cross_attention_layers": [3]}, "encoder_cross_attention_layers has 3"),
        ({"retrieved_len": 3}, "retrieved_len is 3, below chunk_len 4"),
        ({"cca_partial_rotary_factor": 3.0}, "cca_partial_rotary_factor is 3.0; give 0 to 1"),
        ({"cca_partial_rotary_factor": 0.5, "position": "relative"}, "needs position='rotary'"),
        ({"num_neighbors": 0}, "num_neighbors is 0; give a whole number, at least 1"),
        ({"head_dim": 0}, "head_dim is 0; give a whole number, at least 1"),
        ({"encoder_num_layers": -1}, "encoder_num_layers is -1; give a whole number, at least 0"),
        ({"cca_init": "induction"}, "smeared_keys is False; the induction start needs True"),
        ({**INDUCTION, "head_dim": 4}, "num_attention_heads \\* head_dim is 4"),
        ({**INDUCTION, "tie_word_embeddings": False}, "tie_word_embeddings is False; the induction start needs True"),
        ({"embedding_multiplier": 0}, "embedding_multiplier is 0; give a number, above 0"),
        ({"hiden_size": 8}, "hiden_size: unknown model field; did you mean hidden_size?"),
        ({"position": "absolute"}, "position"),
    ],
)
def test_config_refuses(fields, words):
    base = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, chunk_len=4, retrieved_len=8)
    with pytest.raises(Exception, match=words):
        RetroConfig.checked(**{**base, **fields})
    with pytest.raises(ValueError, match="Unknown preset '10b'; choose one of 172m"):
        RetroConfig.from_preset("10b")


def test_forward_refuses(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, 14)
    with pytest.raises(ValueError, match=r"neighbor_ids has shape \[2, 2, 2, 8\]; it must be .* \[2, 3, k, r\]"):
        model(batch["input_ids"], batch["neighbor_ids"][:, :2])
    with pytest.raises(ValueError, match="neighbor_mask is given without neighbor_ids"):
        model(batch["input_ids"], neighbor_mask=batch["neighbor_mask"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions is True, which RETRO does not give"):
        model(batch["input_ids"], output_attentions=True)
    with pytest.raises(ValueError, match="has no CCA layers"):
        make_model(cca_layers=[])(**batch)


def test_a_model_may_be_saved_into_a_folder_that_has_checksums(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    save_sums(tmp_path)
    model = make_model(seed=1)
    model.save_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), RetroForCausalLM.from_pretrained(tmp_path).parameters()))
