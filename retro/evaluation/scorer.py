"""log p of tokens, given the tokens before them and the neighbors of the chunks before them.

It is computed here and nowhere else: bits per byte, leakage, sweeps, tasks, baselines, validation during training and
the gains of a sample are its sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from retro.common.modes import evaluating, hooked
from retro.common.products import fast_products

MAX_TOKENS, MAX_LOGITS, MAX_NEIGHBOR_TOKENS = 2**13, 2**25, 2**17  # of one batch
_SLICE_LOGITS = 2**22  # whose softmax is taken at a time
Ids = Int[np.ndarray, " _"]  # of a text, each of its own length


class TokenScores(NamedTuple):
    """Of some tokens: log p in nats, whether each is the most likely one, and what the output embeddings were given."""

    log_probs: Float32[np.ndarray, " t"]
    greedy: Bool[np.ndarray, " t"]
    states: Float32[np.ndarray, "t d"] | None = None


def score_tokens(
    model: Any,
    texts: Sequence[Ids],
    places: Sequence[Ids],
    rows: Sequence[Int[np.ndarray, "_ k"]] | None = None,
    store: Any = None,
    *,
    batch_size: int | None = None,
    bos: int | None = None,
    states: bool = False,
    logits: bool = True,
    progress: str | None = None,
) -> list[TokenScores]:
    """Score some tokens of each text, in one forward pass over the tokens before the last of them.

    Args:
        model: Any Hugging Face causal LM; with neighbors, one of this library's. It is put into evaluation mode.
        texts: Their tokens; chunks are counted from the start of each.
        places: Of the tokens to score in each text, ascending, 1 or more; there may be none.
        rows: The neighbors of the first whole chunks of each text as rows of `store`, -1 = none. None: no retrieval.
        batch_size: At most so many texts together.
        bos: What stands in the place of each text's first token. None: that token itself.
        states: Whether to give the states, too; a model that reads neighbors may have none.
        logits: False computes the states alone, and scores nothing.
        progress: What a progress bar is called; None shows none.
    """
    nothing = TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))
    scores, chosen = [nothing] * len(texts), [i for i, at in enumerate(places) if len(at)]
    read = {i: texts[i][: places[i][-1]] for i in chosen}
    if bos is not None:
        read = {i: np.concatenate([[bos], text[1:]]) for i, text in read.items()}
    k, m, r = (0, 1, 0) if rows is None else (rows[0].shape[1], model.config.chunk_len, model.config.retrieved_len)
    num_logits = {i: logits * _num_logits(model, rows is not None, len(read[i]), places[i]) for i in chosen}
    with (
        evaluating(model),
        tqdm(total=len(chosen), desc=progress, unit="text", disable=progress is None or None) as bar,
    ):
        for batch in batches(read, num_logits, model.config.get_text_config().vocab_size, k * r / m, batch_size):
            inputs = padded([read[i] for i in batch])
            if rows is not None:
                whole = [rows[i][: len(read[i]) // m] for i in batch]
                inputs |= _neighbors(whole, inputs["input_ids"].shape[1] // m, store, r)
            at = [places[i] for i in batch]
            targets = np.concatenate([texts[i][own] for i, own in zip(batch, at, strict=True)])
            found = score_batch(model, inputs, *flat(at), torch.from_numpy(targets), states, logits)
            for i, one in zip(batch, _split(found, at), strict=True):
                scores[i] = one
            bar.update(len(batch))
    return scores


@torch.no_grad()  # rather than inference_mode: what a model caches may be trained with afterwards
@fast_products()
def score_batch(
    model: Any,
    inputs: dict[str, Tensor],
    lines: Int[Tensor, " t"],
    columns: Int[Tensor, " t"],
    targets: Int[Tensor, " t"],
    states: bool = False,
    logits: bool = True,
) -> TokenScores:
    """Score targets from the logits at (line, column) of a batch, by one forward pass; logits live for these alone, or
    where a form mixes them, from the first column on.

    inputs: As the model takes them: input_ids, attention_mask, neighbor_ids ... The model is in evaluation mode.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    lines, columns, targets = (x.to(model.device) for x in (lines, columns, targets))
    mixes, keep = _mixes_logits(model, "neighbor_ids" in inputs), {}
    if mixes:
        first = int(columns.min()) if len(columns) else 0
        keep, columns = {"logits_to_keep": inputs["input_ids"].shape[1] - first}, columns - first
    with only_at(None if mixes else _head(model), lines, columns, stop=not logits) as given:
        out = model(**inputs, **keep, use_cache=False).logits
    kept = given[0].float().cpu().numpy() if states and given else None
    if not logits:
        return TokenScores(np.zeros(0, np.float32), np.zeros(0, bool), kept)
    out = out[0] if given else out[lines.to(out.device), columns.to(out.device)]
    log_probs, greedy, step = [], [], max(1, _SLICE_LOGITS // out.shape[-1])
    for part, own in zip(out.split(step), targets.to(out.device).split(step), strict=True):
        log_p = part.float().log_softmax(-1)
        log_probs.append(log_p.gather(-1, own[:, None])[:, 0])
        greedy.append(log_p.argmax(-1) == own)
    return TokenScores(torch.cat(log_probs).cpu().numpy(), torch.cat(greedy).cpu().numpy(), kept)


def joined(scores: Sequence[TokenScores]) -> Float64[np.ndarray, " t"]:
    """log p of all tokens, text after text, in the type that sums are taken in."""
    return np.concatenate([one.log_probs for one in scores]).astype(np.float64)


def reads_neighbors(model: Any) -> bool:
    """Whether a causal LM is one of this library's that reads neighbors."""
    return hasattr(model.config, "num_neighbors") and getattr(model.config, "cca_layers", None) != []


class HeadReached(Exception):
    """Ends a forward pass before the output embeddings."""


@contextmanager
def only_at(
    head: nn.Module | None, lines: Int[Tensor, " t"], columns: Int[Tensor, " t"], stop: bool = False
) -> Iterator[list[Float[Tensor, "t d"]]]:
    """Let output embeddings see some positions only: the logits are [1, t, v]. None changes nothing.

    Gives the list that will hold the states they are given; with `stop` nothing is computed after them.
    """
    given: list[Tensor] = []

    def gather(module, args):
        given.append(args[0][lines.to(args[0].device), columns.to(args[0].device)])
        if stop:
            raise HeadReached
        return (given[-1][None], *args[1:])

    with nullcontext() if head is None else hooked(head.register_forward_pre_hook, gather), suppress(HeadReached):
        yield given


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _mixes_logits(model: Any, has_neighbors: bool) -> bool:
    """Whether logits are edited after the output embeddings, position by position."""
    return has_neighbors and getattr(getattr(model, "form", None), "mixes_logits", False)


def _num_logits(model: Any, has_neighbors: bool, length: int, places: Ids) -> int:
    """Positions of a text whose logits are computed."""
    if _mixes_logits(model, has_neighbors):
        return length + 1 - int(places[0])
    return length if _head(model) is None else len(places)


# Batches


def batches(
    texts: dict[int, Ids],
    num_logits: dict[int, int],
    vocab_size: int,
    neighbor_tokens: float = 0.0,
    batch_size: int | None = None,
) -> Iterator[list[int]]:
    """Texts of similar length together, as many as tokens, logits and neighbors leave room for.

    neighbor_tokens: for each token of a text.
    """
    batch, logits = [], 0
    for i in sorted(texts, key=lambda i: len(texts[i])):
        tokens, logits = (len(batch) + 1) * len(texts[i]), logits + num_logits[i] * vocab_size
        limits = ((tokens, MAX_TOKENS), (logits, MAX_LOGITS), (tokens * neighbor_tokens, MAX_NEIGHBOR_TOKENS))
        if batch and (len(batch) == batch_size or any(value > most for value, most in limits)):
            yield batch
            batch, logits = [], num_logits[i] * vocab_size
        batch.append(i)
    if batch:
        yield batch


def padded(texts: Sequence[Ids]) -> dict[str, Int[Tensor, "b n"]]:
    """Texts padded on the right, and where they are."""
    lens = np.asarray([len(text) for text in texts])
    mask = np.arange(lens.max()) < lens[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(texts)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def flat(places: Sequence[Ids]) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
    """Lines and columns of the logits that predict the tokens at places, text after text."""
    assert all(own[0] > 0 for own in places), "nothing predicts a first token"
    lines = np.repeat(np.arange(len(places)), [len(own) for own in places])
    return torch.from_numpy(lines), torch.from_numpy(np.concatenate(places) - 1)


def _neighbors(rows: list[np.ndarray], num_chunks: int, store: Any, retrieved_len: int) -> dict[str, Tensor]:
    """neighbor_ids and neighbor_mask [b, l, k, r], nothing where no chunk has any."""
    if not any((own >= 0).any() for own in rows):
        return {}
    placed = np.full((len(rows), num_chunks, rows[0].shape[1]), -1)
    for place, own in zip(placed, rows, strict=True):
        place[: len(own)] = own
    ids, mask = store.values(placed, retrieved_len)
    return {"neighbor_ids": torch.from_numpy(ids), "neighbor_mask": torch.from_numpy(mask)}


def _split(found: TokenScores, places: Sequence[Ids]) -> Iterator[TokenScores]:
    """The scores of a batch, text after text."""
    ends = np.cumsum([len(own) for own in places])[:-1]
    states = [None] * len(places) if found.states is None else np.split(found.states, ends)
    log_probs, greedy = np.split(found.log_probs, ends), np.split(found.greedy, ends)
    return map(TokenScores, log_probs, greedy, states)
