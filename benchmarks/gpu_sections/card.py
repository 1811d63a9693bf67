"""Sections `product` and `agreement`: what the card can do, and whether it computes what the CPU computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from generation import random_search
from gpu_sections.bench import Bench, Figures
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from retro.model import RetroConfig, RetroForCausalLM
from retro.retrofit import retrofit

ALLOWED = 1e-4  # of the largest value: float32 on both sides has 1e-6, a product in TF32 1e-3


def product(bench: Bench) -> None:
    """The rates that bound everything else: of square products, and of a copy, bytes read and written."""
    size, name = bench.pick(8192, 256), torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    bench.case(f"bfloat16 product of {size}, {name}", lambda: {"rate": _rate(bench, size, torch.bfloat16)})
    bench.case(f"float32 product of {size}, {name}", lambda: {"float32_rate": _rate(bench, size, torch.float32)})
    bench.case("copy", lambda: {"bandwidth": _bandwidth(bench)})


def _rate(bench: Bench, size: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, size, size, device=bench.device, dtype=dtype)
    return 2 * size**3 / bench.seconds(lambda: a @ b, rounds=20, warm_up=5, at_most=3.0)


def _bandwidth(bench: Bench) -> float:
    source = torch.randn(bench.pick(1 << 30, 1 << 20), device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), rounds=20, warm_up=5, at_most=3.0)


# Agreement


def agreement(bench: Bench) -> None:
    """Float32 models of random weights on the CPU and on the card: logits, gradients, greedy text; then compiled.

    What is given has missing and short neighbors; documents are packed, or a row is padded on the left. A difference
    is the largest one over the largest value; one above the allowed is an error.
    """
    pairs = {}
    for position in ("rotary", "relative"):
        model = _model(bench, position)
        pairs[position] = model, copy.deepcopy(model).to(bench.device)
        for kind, given in _inputs(bench, model.config).items():
            bench.case(f"{position}, {kind}: logits", partial(_logits, *pairs[position], given))
            bench.case(f"{position}, {kind}: gradients", partial(_gradients, *pairs[position], given))
        bench.case(f"{position}, RETRO[ON]: text", partial(_texts, bench, *pairs[position], retriever=random_search))
        bench.case(f"{position}, RETRO[OFF]: text", partial(_texts, bench, *pairs[position]))
    bench.case("fitted Llama: text", lambda: _texts(bench, *_fitted(bench), retriever=random_search))
    for position, (model, there) in bench.pick(pairs, {}).items():
        there.compile(**bench.compiler)
        given = _inputs(bench, model.config)["packed documents"]
        bench.case(f"{position}, packed documents, compiled: gradients", partial(_gradients, model, there, given))


def _fitted(bench: Bench) -> tuple[nn.Module, nn.Module]:
    """A Llama with the pointer, its gate open, here and there."""
    model = retrofit(tiny_llama(), form="pointer")
    with torch.no_grad():
        model.form.gate.opening.fill_(1.0)
    return model, copy.deepcopy(model).to(bench.device)


def tiny_llama() -> nn.Module:
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, pad_token_id=0, **sizes)).eval()


def _model(bench: Bench, position: str) -> nn.Module:
    d, cca_layers = bench.pick((256, [2, 4]), (64, [2]))
    sizes = dict(hidden_size=d, num_attention_heads=d // 32, num_hidden_layers=max(cca_layers), cca_layers=cca_layers)
    config = RetroConfig(vocab_size=8192, encoder_num_layers=1, position=position, pad_token_id=0, **sizes)
    return RetroForCausalLM(config).eval()


def _inputs(bench: Bench, config: Any) -> dict[str, dict[str, Tensor]]:
    """Two rows of some chunks, with their neighbors."""
    chunks, m = bench.pick(8, 3), config.chunk_len
    ids = torch.randint(3, config.vocab_size, (2, chunks * m))
    neighbors = torch.randint(3, config.vocab_size, (2, chunks, 2, config.retrieved_len))
    lens = torch.randint(1, config.retrieved_len + 1, neighbors.shape[:3])
    lens[:, 1, 1] = 0  # one missing
    lens[1, 0] = 0  # a chunk without
    found = {"neighbor_ids": neighbors, "neighbor_mask": torch.arange(config.retrieved_len) < lens[..., None]}
    positions = torch.arange(chunks * m).expand(ids.shape)
    padded = torch.ones_like(ids)
    padded[1, :m] = 0
    return {
        "whole rows": {"input_ids": ids, **found},
        "packed documents": {"input_ids": ids, **found, "document_ids": positions // (2 * m + 5)},
        "padded rows": {"input_ids": ids, **found, "attention_mask": padded},
        "RETRO[OFF]": {"input_ids": ids},
    }


def _moved(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in given.items()}


@torch.no_grad()
def _logits(model: nn.Module, there: nn.Module, given: dict[str, Tensor]) -> Figures:
    """Of the real tokens."""
    logits = [one(**_moved(given, one)).logits.cpu() for one in (model, there)]
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    return _compared(*(found[real] for found in logits))


def _gradients(model: nn.Module, there: nn.Module, given: dict[str, Tensor]) -> Figures:
    """The worst of all weights, each over its own largest value, or a thousandth of all weights' where it is less."""
    labels = given["input_ids"]
    if "attention_mask" in given:
        labels = labels.masked_fill(~given["attention_mask"].bool(), -100)
    found = []
    for one in (model, there):
        one.train().zero_grad()
        one(**_moved({**given, "labels": labels}, one)).loss.backward()
        found.append({name: p.grad.cpu() for name, p in one.named_parameters() if p.grad is not None})
        one.eval()
    if found[0].keys() != found[1].keys():
        raise ValueError(f"gradients of {sorted(found[0].keys() ^ found[1].keys())} are on one side only")
    least = max(float(gradient.abs().max()) for gradient in found[0].values()) / 1000
    compared = [_compared(found[0][name], found[1][name], least) for name in found[0]]
    return max(compared, key=lambda it: it["difference"])


def _compared(here: Tensor, there: Tensor, least: float = 0.0) -> Figures:
    difference = float((here - there).abs().max()) / max(float(here.abs().max()), least)
    if not difference <= ALLOWED:
        raise ValueError(f"the difference is {difference:.2g} of the largest value, above {ALLOWED:g}")
    return {"difference": difference}


def _texts(bench: Bench, model: nn.Module, there: nn.Module, **options: Callable) -> Figures:
    """Greedy continuations of two prompts across the end of a chunk, token for token."""
    prompts, new = torch.randint(3, 8192, (2, 100)), bench.pick(72, 30)
    settings = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, **options)
    here = model.generate(prompts, **settings)
    other = there.generate(prompts.to(bench.device), **settings).cpu()
    if not torch.equal(here, other):
        column = int((here != other).any(0).nonzero()[0])
        raise ValueError(f"the texts differ from token {column - prompts.shape[1] + 1} of {new} on")
    return {"equal_tokens": here[:, prompts.shape[1] :].numel()}
