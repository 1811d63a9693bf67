"""Log-probabilities of some tokens of texts of any length, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from retro.common.products import fast_products
from retro.evaluation.baselines.sample import Ids
from retro.evaluation.scorer import MAX_LOGITS, MAX_NEIGHBOR_TOKENS

MAX_TOKENS = 2**13  # of one batch
Values = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # rows to ids and mask [.., r]


def log_likelihoods(
    reader: Any, texts: Sequence[Ids], places: Sequence[Ids], progress: str | None = None, hidden: bool = False
) -> tuple[Float[np.ndarray, " t"], Int[np.ndarray, " t"], Float[np.ndarray, "t d"] | None]:
    """log p of the tokens at `places` (1 or more) of each text by a plain causal LM, and which tokens they are.

    Args:
        progress: What a progress bar is called; None shows none.
        hidden: Whether to give, too, what the output embeddings were given for each of them.
    """
    log_p, found, states = _empty(places), _empty(places), [None] * len(texts)
    for batch in _batches(texts, places, _vocab_size(reader), progress=progress):
        ids, mask = padded([texts[i] for i in batch])
        rows, columns = _flat(places, batch)
        with torch.inference_mode(), fast_products(), before_head(reader, rows, columns - 1) as given:
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
            logits = reader(**_to(inputs, reader), use_cache=False).logits[0]
        targets = ids[rows, columns]
        _spread(log_p, _of_targets(logits, targets), places, batch)
        _spread(found, targets, places, batch)
        if hidden:
            _spread(states, given[0].float().cpu().numpy(), places, batch)
    joined = np.concatenate(states) if hidden else None
    return np.concatenate(log_p), np.concatenate(found), joined


def hidden_states(
    reader: Any, texts: Sequence[Ids], places: Sequence[Ids], progress: str | None = None
) -> Float[np.ndarray, "t d"]:
    """What the output embeddings are given for predicting the tokens at `places`; no logits are computed."""
    states = [None] * len(texts)
    for batch in _batches(texts, places, vocab_size=1, progress=progress):
        ids, mask = padded([texts[i] for i in batch])
        rows, columns = _flat(places, batch)
        with torch.inference_mode(), fast_products(), before_head(reader, rows, columns - 1, stop=True) as given:
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
            reader(**_to(inputs, reader), use_cache=False)
        _spread(states, given[0].float().cpu().numpy(), places, batch)
    return np.concatenate(states)


def log_likelihoods_with_neighbors(
    model: Any,
    texts: Sequence[Ids],
    places: Sequence[Ids],
    rows: Sequence[Int[np.ndarray, "_ k"]] | None,
    values: Values,
    progress: str | None = None,
) -> tuple[Float[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """The same of a model that reads neighbors.

    Args:
        rows: The neighbors of the whole chunks of each text (-1 = none); None is RETRO[OFF].
        values: Gives their tokens, see Store.values.
    """
    log_p, found, m = _empty(places), _empty(places), model.config.chunk_len
    read = 0 if rows is None else rows[0].shape[1] * model.config.retrieved_len
    for batch in _batches(texts, texts, _vocab_size(model), read / m, progress):  # every token has logits
        ids, mask = padded([texts[i] for i in batch])
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
        if rows is not None:
            given = np.full((len(batch), ids.shape[1] // m, rows[0].shape[1]), -1)
            for place, i in enumerate(batch):
                given[place, : len(rows[i])] = rows[i]
            inputs["neighbor_ids"], inputs["neighbor_mask"] = map(torch.from_numpy, values(given))
        at, columns = _flat(places, batch)
        with torch.inference_mode(), fast_products():
            logits = model(**_to(inputs, model)).logits[at, columns - 1]
        targets = ids[at, columns]
        _spread(log_p, _of_targets(logits, targets), places, batch)
        _spread(found, targets, places, batch)
    return np.concatenate(log_p), np.concatenate(found)


class _HeadReached(Exception):
    pass


@contextmanager
def before_head(
    reader: Any, rows: Int[np.ndarray, " t"], columns: Int[np.ndarray, " t"], stop: bool = False
) -> Iterator[list[Float[Tensor, "t d"]]]:
    """Let the output embeddings see some positions only: the logits are [1, t, v].

    Gives the list that will hold the hidden states; with `stop` nothing is computed after them.
    """
    given: list[Tensor] = []

    def gather(module, args):
        given.append(args[0][rows, columns])
        if stop:
            raise _HeadReached
        return (given[-1][None], *args[1:])

    handle = reader.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield given
    except _HeadReached:
        pass
    finally:
        handle.remove()


def padded(texts: Sequence[Ids]) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Texts padded on the right, and where they are."""
    lens = np.asarray([len(text) for text in texts])
    mask = np.arange(lens.max()) < lens[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(texts)
    return ids, mask


def _batches(
    texts: Sequence[Ids],
    places: Sequence[Ids],
    vocab_size: int,
    neighbor_tokens: float = 0.0,
    progress: str | None = None,
) -> Iterator[list[int]]:
    """Texts of similar length together, as many as tokens, logits and neighbors leave room for."""
    batches, batch, logits = [], [], 0
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        tokens = (len(batch) + 1) * len(texts[i])
        logits += len(places[i]) * vocab_size
        if batch and (tokens > MAX_TOKENS or logits > MAX_LOGITS or tokens * neighbor_tokens > MAX_NEIGHBOR_TOKENS):
            batches.append(batch)
            batch, logits = [], len(places[i]) * vocab_size
        batch.append(i)
    batches.append(batch)
    yield from tqdm(batches, desc=progress, unit="batch", disable=progress is None)


def _flat(places: Sequence[Ids], batch: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the places of a batch, text after text."""
    rows = np.repeat(np.arange(len(batch)), [len(places[i]) for i in batch])
    return rows, np.concatenate([places[i] for i in batch])


def _of_targets(logits: Float[Tensor, "t v"], targets: Int[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, torch.from_numpy(targets).to(log_p.device)[:, None])[:, 0].double().cpu().numpy()


def _spread(out: list, values: np.ndarray, places: Sequence[Ids], batch: list[int]) -> None:
    """Values of a batch back to its texts."""
    parts = np.split(values, np.cumsum([len(places[i]) for i in batch])[:-1])
    for i, part in zip(batch, parts, strict=True):
        out[i] = part


def _empty(places: Sequence[Ids]) -> list:
    return [None] * len(places)


def _to(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _vocab_size(model: Any) -> int:
    return model.config.get_text_config().vocab_size
