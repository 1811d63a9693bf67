"""Section `generation`: milliseconds per token of ours, fitted and not, and of transformers' Llama of equal size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contestants import llama_config, ours
from generation import random_search
from gpu_sections.bench import Bench, Figures
from gpu_sections.training import D896, TINY
from torch import nn
from transformers import LlamaForCausalLM

from retro.retrofit import retrofit

PROMPT, NEW = 448, 97  # what is generated ends a chunk twice
BATCHES = (1, 16)
NAMES = ("RETRO[ON]", "RETRO[OFF]", "Llama", "Llama fitted, ON")
FORMS = ("paper", "pointer")  # beside the usual fit, which is both


def generation(bench: Bench) -> None:
    """Greedy, in bfloat16, neighbors from a search that costs nothing; the prompt's own run is taken off.

    `of bound`: what a token takes where nothing counts but reading, once each, the weights that it passes through and
    the keys and values kept of the text and of two neighbors, as a share of the time. With a static cache transformers
    compiles the step.
    """
    for name in (*(f"{name}, static cache" for name in NAMES), *NAMES):
        for batch in BATCHES:
            bench.case(f"{name}, batch {batch}", partial(per_token, bench, name, batch))
    for form in FORMS:
        name = f"Llama fitted by the {form}, ON, static cache"
        bench.case(f"{name}, batch {BATCHES[0]}", partial(per_token, bench, name, BATCHES[0]))


def made(bench: Bench, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in bfloat16, and what its generate() is given."""
    shape = replace(bench.pick(D896, TINY), n=1024)
    with torch.device(bench.device):
        model = ours(shape)[0] if name.startswith("RETRO") else LlamaForCausalLM(llama_config(shape))
    if "fitted" in name:
        model = retrofit(model, form=next((form for form in FORMS if form in name), "joint"))
    options: dict[str, Any] = {"retriever": random_search} if "ON" in name else {}
    if "static" in name:
        options["cache_implementation"] = "static"
    return model.to(bench.device, torch.bfloat16).eval(), options


def per_token(bench: Bench, name: str, batch: int) -> Figures:
    """Seconds of a step that gives every row of the batch a token."""
    model, options = made(bench, name)
    start, new = bench.pick((PROMPT, NEW), (60, 9))
    prompts = torch.randint(3, model.config.vocab_size, (batch, start), device=bench.device)
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None, **options)
    run = lambda tokens: model.generate(prompts, max_new_tokens=tokens, **settings)  # noqa: E731
    first = bench.once(lambda: run(new))
    whole = bench.seconds(lambda: run(new), rounds=3, warm_up=1, at_most=8.0)
    prompt = bench.seconds(lambda: run(1), rounds=3, warm_up=1)
    seconds = (whole - prompt) / (new - 1)
    bound = bytes_read(model, batch, start + new // 2, reads="retriever" in options) / bench.found["bandwidth"]
    return {
        "seconds": seconds,
        "tokens_per_second": batch / seconds,
        "share_of_bound": bound / seconds,
        "prompt_seconds": prompt,
        "first_seconds": first,
    }


def bytes_read(model: nn.Module, batch: int, length: int, reads: bool) -> int:
    """By a step in the middle of the text: of weights, and of keys and values.

    The encoder, which runs once a chunk, is left out; of a fitted model, all but the base.
    """
    base = getattr(model, "base", model)
    config, idle = base.config, ("encoder.", "encoder_embedding.", *(() if reads else ("cross_attention",)))
    weights = {id(p): p for name, p in base.named_parameters() if not any(part in name for part in idle)}
    if base.get_input_embeddings().weight is not base.get_output_embeddings().weight:
        del weights[id(base.get_input_embeddings().weight)]  # of which a step takes a row
    held = config.num_hidden_layers * length
    if reads and base is model:
        held += len(config.cca_layers) * 2 * config.retrieved_len
    of_token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return sum(p.nbytes for p in weights.values()) + batch * held * of_token
