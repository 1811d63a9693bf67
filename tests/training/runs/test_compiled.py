"""A compiled model is the model. Here, since torch.compile cannot trace the checks of shapes of the other tests."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

from retro.common.settings import find_config, read_yaml
from retro.evaluation.copying import copying_text
from retro.model import RetroConfig, RetroForCausalLM
from retro.modules import Attention, attention, kernels
from retro.modules.cross_attention import ChunkedCrossAttention
from retro.retrofit import retrofit
from tests.model.test_generation import ragged
from tests.searches import RandomNeighbors


@torch.no_grad()
def test_the_recipes_model_compiled():
    torch.manual_seed(0)
    fields = read_yaml(find_config("train_small", "train"))["model"]
    model = RetroForCausalLM(RetroConfig(vocab_size=500, **fields)).eval()
    ids, neighbors, _ = copying_text(model.config)
    compiled = torch.compile(model, backend="aot_eager")
    for given in ((ids, neighbors), (ids,)):
        torch.testing.assert_close(compiled(*given).logits, model(*given).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def fresh_graphs():
    """What the tests before have compiled does not count against the limit of recompilations."""
    torch._dynamo.reset()


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_batches_share_one_graph(position, make_model, make_batch):
    """Neighbors missing here and there or everywhere, documents and padding that end elsewhere."""
    model = make_model(position=position).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for seed in range(3):
        batch = make_batch(model, 20, seed=seed)
        if seed == 2:
            batch["neighbor_mask"][:] = False
        ids = batch["input_ids"]
        batch["labels"] = ids.masked_fill(ids % 5 == 0, -100)
        batch["attention_mask"] = (torch.arange(20) >= torch.tensor([[0], [seed]])).long()
        batch["document_ids"] = torch.tensor([[0] * 7 + [1] * (12 - seed) + [2] * (1 + seed), [5] * 20])
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            loss = compiled(**batch).loss
        torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12 + [2], [5] * 20])


def documents(module, x, _):
    is_flex = attention.uses_flex(x, 8)
    mask = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None]).tril()
    return module(x, mask=kernels.query_blocks(x, DOCUMENTS, 8) if is_flex else mask, distances=range(20))


def encoder(module, x, some):
    return module(x, mask=some[:, None])


def causal(module, x, _):
    is_flex = attention.uses_flex(x, 8)
    return module(x, mask=kernels.query_blocks(x, None, 8)) if is_flex else module(x, is_causal=True)


def chunked(module, x, some):
    encoded = x.unflatten(1, (2, 10))[:, :, None, :8].expand(2, 2, 2, 8, 24)
    return module(x[:, :8], encoded, some[:, :8].expand(2, 2, 2, 8) & torch.tensor([True, False])[:, None, None])


@pytest.mark.parametrize(
    ("position", "run"),
    [
        ("rotary", documents),
        ("relative", documents),
        ("relative", causal),
        ("relative", encoder),
        ("relative", chunked),
    ],
)
def test_flex_attention_is_the_attention(position, run, monkeypatch):
    """FlexAttention refuses gradients on CPUs, but has them; not, though, when it is checkpointed with backend eager."""
    torch.manual_seed(0)
    form = dict(num_heads=4, head_dim=8, num_key_value_heads=2, position=position)
    module = ChunkedCrossAttention(24, 24, 4, **form) if run is chunked else Attention(24, **form)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, some, weighting = torch.randn(2, 20, 24, requires_grad=True), torch.rand(2, 20) > 0.3, torch.randn(2, 20, 24)
    results = []
    for is_flex in (False, True):
        monkeypatch.setattr(attention, "uses_flex", lambda *_, flex=is_flex: flex)
        monkeypatch.setattr(kernels, "checkpoint", lambda function, *given, **_: function(*given))
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        ran = torch.compile(run, backend="eager", fullgraph=True) if is_flex else run
        out = ran(module, x, some)
        given = [x, *module.parameters()]
        results.append([out, *torch.autograd.grad((out * weighting[:, : out.shape[1]]).sum(), given)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_relative_logits_are_not_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(attention, "uses_flex", lambda *_: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    kept = []

    def note(graph, _):
        kept.extend(x.meta["val"].shape for x in graph.graph.output_node().args[0] if "val" in getattr(x, "meta", ()))
        return graph.forward

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    module, x = Attention(8, 2, 4, position="relative"), torch.randn(1, 64, 8, requires_grad=True)
    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert kept and max(shape.numel() for shape in kept) < 2 * 64 * 64


GREEDY = {"do_sample": False, "eos_token_id": 60, "pad_token_id": 0}


def through(backend):
    """Options of generate() that compile its fixed steps here too."""
    config = CompileConfig(backend=backend, mode="default", fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, **GREEDY}


def check_fixed_steps(model, backend):
    """One graph for tokens, another for those that bring neighbors, whichever text they are of."""
    torch._dynamo.utils.counters.clear()
    for seed in (0, 1):
        given = dict(**ragged([5, 9, 10], 61, seed), retriever=RandomNeighbors(61), max_new_tokens=18)
        assert torch.equal(model.generate(**given, **through(backend)), model.generate(**given, **GREEDY))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(("position", "backend"), [("rotary", "aot_eager"), ("relative", "eager")])
def test_fixed_steps_compile_once(position, backend):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, cca_layers=[2])
    config = RetroConfig(**sizes, chunk_len=4, retrieved_len=8, encoder_num_layers=1, position=position)
    check_fixed_steps(RetroForCausalLM(config).eval(), backend)


@pytest.mark.parametrize(("name", "form", "backend"), [("llama", "joint", "aot_eager"), ("gpt2", "paper", "eager")])
def test_fixed_steps_of_fits_compile_once(name, form, backend):
    """And the base's own, beside others that run at the same time."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    options = {"start": "random"} if form == "paper" else {}
    model = retrofit(base, form=form, chunk_len=4, retrieved_len=8, cca_layers=[2], encoder_num_layers=1, **options)
    for parameter in model.form.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    check_fixed_steps(model.eval(), backend)
    prompts = ragged([5, 9, 10], 61)
    given = dict(**prompts, retriever=RandomNeighbors(61), max_new_tokens=8)
    ways = [
        lambda: base(prompts["input_ids"]).logits,
        lambda: base.generate(**prompts, max_new_tokens=4, **through(backend)),
        lambda: model.generate(**given, **through(backend)),
        lambda: model.generate(**given, **GREEDY),
    ]
    expected = [base(prompts["input_ids"]).logits, base.generate(**prompts, max_new_tokens=4, **GREEDY)]
    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(torch.no_grad()(way)) for way in ways]]
    assert all(map(torch.equal, found[:2], expected)) and torch.equal(*found[2:])
