"""What a GPU runs, as far as a CPU can tell; more of it in training/runs/test_compiled.py."""

import pytest
import torch
import torch.nn.functional as F

import retro.model.causal_lm


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_a_training_step_reads_no_value(position, make_model, make_batch, monkeypatch):
    """Tensors on "meta" have none."""
    monkeypatch.setattr(
        retro.model.causal_lm, "linear_cross_entropy", lambda h, w, labels: F.cross_entropy(h @ w.T, labels)
    )
    model = make_model(position=position).train().to("meta")
    batch = make_batch(model, 20)
    ids = batch["input_ids"]
    batch |= {"labels": ids, "document_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    batch = {name: x.to("meta") for name, x in batch.items()}
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
