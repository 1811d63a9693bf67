"""Bases that a user has adapted or compressed: PEFT, 8 and 4 bits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from retro import retrofit
from retro.retrofit import RetrofitForCausalLM
from tests.retrofit.conftest import FORMS, forms

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
FIT = dict(chunk_len=8, retrieved_len=16)


def make_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randint(3, 64, shape, generator=generator)  # noqa: E731
    return {"input_ids": draw(2, 32), "neighbor_ids": draw(2, 4, 2, 16)}


def missing_gradients(model, batch):
    """Trained weights without a gradient after three steps away from the start."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    return [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def config(peft, **options):
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


@forms
def test_a_base_with_adapters_is_fitted(form, batch):
    peft = pytest.importorskip("peft")
    base = peft.get_peft_model(make_base(), config(peft, task_type="CAUSAL_LM")).eval()
    expected = base(batch["input_ids"]).logits
    assert not torch.equal(expected, make_base()(batch["input_ids"]).logits)
    model = retrofit(base, **FORMS[form], **FIT).eval()
    assert torch.equal(model(batch["input_ids"]).logits, expected)
    torch.testing.assert_close(model(**batch).logits, expected)
    assert missing_gradients(model.train(), batch) == []
    assert torch.equal(model.eval()(batch["input_ids"]).logits, expected)


@forms
def test_adapters_of_the_base_are_trained_beside_the_form(form, batch):
    peft = pytest.importorskip("peft")
    model = retrofit(make_base(), **FORMS[form], **FIT)
    before = model.trainable_share()[0]
    model.base.add_adapter(config(peft))
    assert model.trainable_share()[0] > before
    assert missing_gradients(model.train(), batch) == []


@forms
def test_peft_around_a_fitted_model(form, batch, tmp_path):
    peft = pytest.importorskip("peft")
    model = retrofit(make_base(), **FORMS[form], **FIT)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r"base\..*\.(q_proj|v_proj)", task_type="CAUSAL_LM", r=4)
    ).train()
    assert set(missing_gradients(adapted, batch)) == set()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(retrofit(make_base(), **FORMS[form], **FIT), tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, adapted.eval()(**batch).logits)


@forms
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_base_in_few_bits(form, bits, batch, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_base().save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(**{bits: True})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)
    with torch.no_grad():  # the kernels of bitsandbytes differ with and without gradients
        expected = base(batch["input_ids"]).logits
        model = retrofit(base, **FORMS[form], **FIT).eval()
        assert torch.equal(model(batch["input_ids"]).logits, expected)
        torch.testing.assert_close(model(**batch).logits, expected)
    assert missing_gradients(model.train(), batch) == []
    model.save_pretrained(tmp_path / "fitted")
    again = RetrofitForCausalLM.from_pretrained(
        tmp_path / "fitted", base=tmp_path / "base", quantization_config=quantized
    )
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


class PackedHead(torch.nn.Module):
    """Output embeddings that are no parameter, as GPTQ and AWQ hold theirs."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("qweight", weight.detach().clone())

    def forward(self, x):
        return x @ self.qweight.T


@forms
def test_output_embeddings_that_are_packed(form, batch):
    base = make_base()
    expected = base(batch["input_ids"]).logits
    base.lm_head = PackedHead(base.lm_head.weight)
    model = retrofit(base, **FORMS[form], **FIT).eval()
    torch.testing.assert_close(model(**batch).logits, expected)
    assert missing_gradients(model.train(), batch) == []
