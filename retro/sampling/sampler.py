"""Sampling with attribution: prompts in, texts with their sources out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float64

from retro.evaluation.scorer import reads_neighbors, score_batch
from retro.model.generation import stacked
from retro.model.padding import pad_left
from retro.sampling.sources import Attribution, attribute
from retro.text.chunks import pad_token_id, tokenize_document

if TYPE_CHECKING:
    from retro.retrieval import Neighbors

MAX_NEW_TOKENS = 128  # by default


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    retriever: Any = None,
    num_neighbors: int | None = None,
    *,
    align: Literal["start", "end"] = "start",
    gains: bool = False,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    **options: Any,
) -> list[Attribution]:
    """Continue prompts and say what each chunk read: one attribution for each text, those of one prompt in a row.

    Arguments:
        retriever: as in the model's `generate`; None samples RETRO[OFF].
        num_neighbors: k; default: the model's.
        align: "start": chunks are counted from the prompt's first token, so that one shorter than a chunk reads nothing
            yet; "end": the prompt is filled up in front until its last token ends a chunk, whose neighbors are then
            read from the first new token on.
        gains: whether to measure each token's loss OFF - ON, by two more forward passes over every text.
        batch_size: prompts that are continued together.
        max_new_tokens: default: 128, or as many as the model's positions leave room for.
        options: as in Hugging Face's `generate`: do_sample, streamer, stop_strings ...

    Raises ValueError for prompts that are empty or longer than the model's positions leave room for, for gains
    without a retriever, and for a retriever beside a model that reads no neighbors.
    """
    if retriever is not None and not reads_neighbors(model):
        raise ValueError(
            "the model reads no neighbors; sample without a store (--no-retrieval), or fit it for them first."
        )
    if gains and retriever is None:
        raise ValueError("gains compare the text with and without neighbors, and there is no retriever; give one.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    rows = prompt_tokens(tokenizer, prompts)
    if align not in ("start", "end"):
        raise ValueError(f"align is {align!r}; choose start or end.")
    if align == "end" and retriever is not None:
        rows = [filled_up(tokenizer, ids, model.config.chunk_len) for ids in rows]
    options["max_new_tokens"] = _num_new_tokens(model, rows, max_new_tokens)
    if retriever is not None:
        options |= {"retriever": retriever, "num_neighbors": num_neighbors}
    batches = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
    return [text for batch in batches for text in _continued(model, tokenizer, batch, gains, options)]


def prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts: those of a document that begins so. Raises ValueError for a prompt without any text."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts, not one text; write [text]")
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        try:
            prompt.encode()
        except (UnicodeEncodeError, AttributeError):
            raise ValueError(f"{which} is no UTF-8 text; give it in UTF-8.") from None
        ids = tokenize_document(tokenizer, prompt).ids.tolist()
        if tokenizer.eos_token_id is not None:
            ids.pop()
        if not prompt or not ids:
            raise ValueError(f"{which} has no tokens; give at least one character.")
        rows.append(ids)
    return rows


def filled_up(tokenizer: Any, ids: list[int], chunk_len: int) -> list[int]:
    """The tokens of a prompt, the last one at the end of a chunk: in front stand eos tokens (pad without an eos), which
    the model sees as text, and queries and what is shown leave out."""
    filler = pad_token_id(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return [filler] * (-len(ids) % chunk_len) + ids


def _num_new_tokens(model: Any, rows: list[list[int]], wanted: int | None) -> int:
    """`wanted`, or by default what the model's positions leave room for; ValueError if that is too little."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    left = MAX_NEW_TOKENS if positions is None else positions - longest
    new = max(1, min(MAX_NEW_TOKENS, left)) if wanted is None else wanted
    if positions is not None and new > left:
        remedy = f"at most {left} new tokens" if left > 0 else "a shorter prompt"
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are more than the {positions} positions that the model "
            f"was made for; give {remedy}."
        )
    return new


def _continued(
    model: Any, tokenizer: Any, rows: list[list[int]], gains: bool, options: dict[str, Any]
) -> Iterator[Attribution]:
    """Continue a batch of prompts by one call of generate()."""
    pad = pad_token_id(tokenizer)
    input_ids, mask = pad_left(rows, pad)
    given = {"tokenizer": tokenizer} if options.get("stop_strings") else {}
    given |= {"attention_mask": mask.to(model.device), "pad_token_id": pad, "return_dict_in_generate": True}
    out = model.generate(input_ids.to(model.device), **given, **options)
    found, eos = out.get("neighbors"), _eos_token_ids(model, options)
    num_samples = len(out.sequences) // len(rows)
    for place, sequence in enumerate(out.sequences.tolist()):
        prompt = rows[place // num_samples]
        tokens = prompt + _until_end(sequence[input_ids.shape[1] :], eos, pad)
        read = None if found is None else found[place]
        measured = token_gains(model, tokens, read) if gains else None
        measure = getattr(options.get("retriever"), "measure", "score")
        yield attribute(tokenizer, tokens, len(prompt), read, model.config.chunk_len, measured, measure)


def _eos_token_ids(model: Any, options: dict[str, Any]) -> set[int]:
    eos = options.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if eos is None else set(np.atleast_1d(eos).tolist())


def _until_end(tokens: list[int], eos: set[int], pad: int) -> list[int]:
    """What was generated, its eos included, without the padding of a row that ended before others."""
    for place, token in enumerate(tokens):
        if token in eos:
            return tokens[: place + 1]
    end = len(tokens)
    while end and tokens[end - 1] == pad:
        end -= 1
    return tokens[:end]


def token_gains(model: Any, token_ids: Sequence[int], found: Sequence[Neighbors | None]) -> list[float | None]:
    """For each token of a text its loss OFF minus its loss ON, in bits; None for the first, which nothing predicts.

    found: what each whole chunk found, one query each; chunks beyond it, and None, have no neighbors.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    num_chunks = len(token_ids) // model.config.chunk_len
    neighbors = _neighbor_tensors(found[:num_chunks], num_chunks, model.device)
    if neighbors is None:
        return [None, *[0.0] * (len(token_ids) - 1)]
    off, on = (_token_bits(model, {"input_ids": ids, **given}) for given in ({}, neighbors))
    return [None, *(off - on).tolist()]


def _token_bits(model: Any, inputs: dict[str, torch.Tensor]) -> Float64[np.ndarray, " t"]:
    """Bits of each token of a text after the first."""
    ids = inputs["input_ids"][0]
    columns = torch.arange(len(ids) - 1)
    found = score_batch(model, inputs, torch.zeros_like(columns), columns, ids[1:])
    return -found.log_probs.astype(np.float64) / math.log(2)


def _neighbor_tensors(
    found: Sequence[Neighbors | None], num_chunks: int, device: Any
) -> dict[str, torch.Tensor] | None:
    """neighbor_ids and neighbor_mask [1, l, k, r] of one text, filled up where k or r differ; None without any."""
    present = [u for u, neighbors in enumerate(found) if neighbors is not None]
    if not present:
        return None
    tensors = {}
    for name, x in zip(("neighbor_ids", "neighbor_mask"), stacked([found[u] for u in present]), strict=True):
        tensors[name] = x.new_zeros(1, num_chunks, *x.shape[1:])
        tensors[name][0, present] = x
        tensors[name] = tensors[name].to(device)
    return tensors
