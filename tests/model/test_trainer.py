"""Hugging Face's Trainer with both models: an update is that of the whole batch, however it is cut; ragged rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from retro import DataCollatorWithNeighbors, retrofit


def make_llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, initializer_range=0.3, **sizes))


@pytest.fixture
def makers(make_model):
    """What is trained, by name: Llama as the control, and whether it reads neighbors."""

    def fitted(form, train_base=False):
        model = retrofit(make_llama(), form=form, chunk_len=4, retrieved_len=8)
        with torch.no_grad():
            for name, parameter in model.form.named_parameters():
                if name.endswith(("gate", "opening")):
                    parameter.fill_(0.5)
        model.base.requires_grad_(train_base)
        return model

    return {
        "llama": (make_llama, False),
        "retro": (make_model, True),
        "retro off": (make_model, False),
        "joint": (lambda: fitted("joint"), True),
        "paper": (lambda: fitted("paper"), True),
        "off, its base trained": (lambda: fitted("pointer", True), False),
    }


NAMES = ["llama", "retro", "retro off", "joint", "paper", "off, its base trained"]


def make_rows(reads: bool, lengths=(12, 12, 12, 12)):
    """Rows of very unequal numbers of labels; the last has none."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 61, (n,), generator=generator)
        labels = ids.clone()
        labels[(12, 3, 8, 0)[i] :] = -100
        row = {"input_ids": ids, "labels": labels}
        if reads:
            row["neighbor_ids"] = torch.randint(3, 61, (n // 4, 1 + i % 2, 8), generator=generator)
        rows.append(row)
    return rows


def make_trainer(model, rows, tmp_path, batch_size=4, steps=1, **options):
    more = {name: options.pop(name) for name in ("compute_loss_func", "data_collator") if name in options}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, **options,
    )  # fmt: skip
    more.setdefault("data_collator", DataCollatorWithNeighbors(4))
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **more)


def update(*given, **options):
    """Loss and gradient norm of one update."""
    trainer = make_trainer(*given, **options)
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_batch(name, makers, tmp_path):
    make, reads = makers[name]
    rows = make_rows(reads)
    whole = update(make(), rows, tmp_path)
    assert update(make(), rows, tmp_path, 1, 4) == pytest.approx(whole, rel=1e-3)
    assert update(make(), rows, tmp_path, 1, 4, compute_loss_func=own_loss) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_label_smoothing_is_that_of_the_logits(name, makers, tmp_path):
    make, reads = makers[name]
    batch = DataCollatorWithNeighbors(4)(make_rows(reads))
    labels = batch.pop("labels")[:, 1:]
    log_p = make().train()(**batch).logits[:, :-1].log_softmax(-1)[labels != -100]
    kept = labels[labels != -100]
    expected = 0.8 * F.nll_loss(log_p, kept) - 0.2 * log_p.mean()
    found = update(make(), make_rows(reads), tmp_path, 2, 2, label_smoothing_factor=0.2)[0]
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_share_of_the_batchs(name, makers):
    """As a Trainer counts the labels of all micro-batches and processes, as a number or a tensor."""
    make, reads = makers[name]
    model, batch = make().eval(), DataCollatorWithNeighbors(4)(make_rows(reads))
    mean, count = model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=4 * count).loss, mean / 4)
    torch.testing.assert_close(model.train()(**batch, num_items_in_batch=4 * int(count)).loss, mean / 4)
    batch["labels"][:] = -100
    assert model(**batch, num_items_in_batch=count).loss == 0


@pytest.mark.parametrize("name", ["retro", "joint"])
def test_ragged_rows_are_padded_with_their_neighbors(name, makers, tmp_path):
    make, reads = makers[name]
    rows, model = make_rows(reads, (14, 9, 3, 12)), make().eval()
    batch = DataCollatorWithNeighbors(4, pad_to_multiple_of=8)(rows)
    logits = model(**batch).logits
    assert logits.shape[1] == 16 and batch["labels"][1, 3:].eq(-100).all()
    for row, found in zip(rows, logits, strict=True):
        alone = {key: value[None] for key, value in row.items() if key != "labels"}
        torch.testing.assert_close(found[: len(row["input_ids"])], model(**alone).logits[0], rtol=1e-4, atol=1e-5)
    assert update(make(), rows, tmp_path, 1, 4)[0] == pytest.approx(model(**batch).loss.item(), rel=1e-3)
    trainer = make_trainer(make(), rows, tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**DataCollatorWithNeighbors(4)(rows)).loss.item())
    assert trainer.predict(rows).predictions.shape == (4, 14, 61)


def test_what_the_collator_refuses():
    collator = DataCollatorWithNeighbors(4)
    with pytest.raises(ValueError, match="row 1 has position_ids, which is not padded here; remove that column"):
        collator([{"input_ids": [1]}, {"input_ids": [1], "position_ids": [0]}])
    with pytest.raises(ValueError, match=r"row 0 has 5 tokens and neighbor_ids \[2, 1, 8\]; give \[l, k, r\] with one"):
        collator([{"input_ids": [1] * 5, "neighbor_ids": torch.zeros(2, 1, 8, dtype=torch.long)}])


@pytest.mark.parametrize("name", ["retro", "joint", "paper", "off, its base trained"])
def test_generate_while_training_with_checkpointing(name, makers):
    make, reads = makers[name]
    model, options = make().eval(), dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    batch = DataCollatorWithNeighbors(4)(make_rows(reads)[:1])
    given = {key: batch[key] for key in ("input_ids", "neighbor_ids", "neighbor_mask") if key in batch}
    expected = model.generate(**given, **options)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**given, **options), expected)
    assert torch.equal(model.train().generate(**given, **options), expected)
    if reads:
        with pytest.raises(ValueError, match="use_cache is true"):
            model(**batch, use_cache=True)
