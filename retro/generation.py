"""Retrieval inside generate(): one search for each chunk as it becomes whole."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from retro.padding import align_left

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from retro.retrieval import Neighbors, Retriever


class RetrievalSession:
    """The neighbors of every chunk seen in one call of generate().

    Retrieval is a function of a chunk's tokens alone, so that chunks are remembered by content: rows of a batch and
    beams may be reordered freely, and each chunk is searched once.
    """

    def __init__(self, retriever: Retriever, chunk_len: int, num_neighbors: int):
        self.retriever, self.chunk_len, self.num_neighbors = retriever, chunk_len, num_neighbors
        self.prompt_mask: Tensor | None = None  # of the prompts as generate() repeats them, one row a beam or sample
        self._found: dict[bytes, Neighbors] = {}

    def neighbors(self, rows: Sequence[np.ndarray]) -> list[list[Neighbors]]:
        """For each row of tokens, the neighbors of each of its whole chunks (one query, [1, k], each)."""
        chunks = [self._chunks(row) for row in rows]
        new = {chunk.tobytes(): chunk for row in chunks for chunk in row if chunk.tobytes() not in self._found}
        if new:
            found = self.retriever(np.stack(list(new.values())), num_neighbors=self.num_neighbors)
            self._found.update((key, found[i : i + 1]) for i, key in enumerate(new))
        return [[self._found[chunk.tobytes()] for chunk in row] for row in chunks]

    def _chunks(self, row: np.ndarray) -> np.ndarray:
        num_chunks = len(row) // self.chunk_len
        whole = row[: num_chunks * self.chunk_len].astype(np.int64)
        return whole.reshape(num_chunks, self.chunk_len)

    def tensors(self, input_ids: Int[Tensor, "b n"], attention_mask: Tensor | None) -> dict[str, Tensor]:
        """neighbor_ids and neighbor_mask [b, l, k, r] of a batch; chunks that a shorter row lacks are masked."""
        if self.prompt_mask is None:
            self.prompt_mask = attention_mask
        found = self.neighbors(_real_rows(input_ids, attention_mask))
        num_chunks = input_ids.shape[1] // self.chunk_len
        if num_chunks == 0 or not any(found):
            return {}
        k, r = next(row for row in found if row)[0].tokens.shape[1:]
        ids = np.zeros((len(found), num_chunks, k, r), dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for b, row in enumerate(found):
            for u, neighbors in enumerate(row):
                ids[b, u], mask[b, u] = neighbors.tokens[0], neighbors.mask[0]
        device = input_ids.device
        return {
            "neighbor_ids": torch.from_numpy(ids).to(device),
            "neighbor_mask": torch.from_numpy(mask).to(device),
        }


def _real_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[np.ndarray]:
    """The real tokens of each row, left padding removed."""
    if attention_mask is None:
        return list(input_ids.cpu().numpy())
    aligned = align_left(input_ids, attention_mask).cpu().numpy()
    return [row[:length] for row, length in zip(aligned, attention_mask.sum(-1).tolist(), strict=True)]


class RetrievalGeneration:
    """generate() with `retriever=`. Mixed into a causal LM that takes neighbor_ids and neighbor_mask.

    Every step runs the whole sequence; no key / value cache is kept yet.
    """

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        retriever: Retriever | None = None,
        num_neighbors: int | None = None,
        **kwargs,
    ) -> Any:
        """Hugging Face's generate(), with retrieval at the end of every chunk.

        Args:
            inputs: Prompt tokens [b, n], left-padded where `attention_mask` says so; chunks are counted from each
                row's first real token.
            retriever: Where neighbors come from; None samples RETRO[OFF].
            num_neighbors: k; default `config.num_neighbors`.
            kwargs: As in Hugging Face, but `use_cache` changes nothing. With `return_dict_in_generate=True` the result
                has `neighbors`: for each row, the `Neighbors` (sources included) of each of its whole chunks.

        Raises ValueError for neighbors given by hand, and for `num_neighbors` below 1 or without a retriever.
        """
        _check_neighbors(retriever, num_neighbors, kwargs)
        if generation_config is None:
            kwargs["use_cache"] = False
        else:
            kwargs.pop("use_cache", None)
            generation_config = copy(generation_config)
            generation_config.use_cache = False
        if retriever is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        session = RetrievalSession(retriever, self.config.chunk_len, num_neighbors or self.config.num_neighbors)
        out = super().generate(inputs, generation_config, *args, retrieval=session, **kwargs)
        if not isinstance(out, Tensor):
            mask = _whole_mask(out.sequences, session.prompt_mask)
            out["neighbors"] = session.neighbors(_real_rows(out.sequences, mask))
        return out

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        retrieval: RetrievalSession | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> dict[str, Any]:
        """The whole sequence so far and the neighbors of its whole chunks."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}
        if retrieval is not None:
            inputs |= retrieval.tensors(input_ids, attention_mask)
        return inputs


def _check_neighbors(retriever: Retriever | None, num_neighbors: int | None, kwargs: dict[str, Any]) -> None:
    """Refuse what generate() would otherwise ignore."""
    for name in ("neighbor_ids", "neighbor_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given to generate(), which searches each new chunk; give a retriever instead.")
    if num_neighbors is not None and (retriever is None or num_neighbors < 1):
        raise ValueError(f"num_neighbors is {num_neighbors}; it must be at least 1, beside a retriever.")


def _whole_mask(sequences: Tensor, prompt_mask: Tensor | None) -> Tensor | None:
    """The mask of each sequence's prompt, with ones for what was generated.

    `prompt_mask` has p rows a prompt (beams, samples), `sequences` q <= p: row s belongs to prompt s // q.
    """
    if prompt_mask is None:
        return None
    num_rows = sequences.shape[0]
    rows = torch.arange(num_rows, device=prompt_mask.device) * prompt_mask.shape[0] // num_rows
    return torch.nn.functional.pad(prompt_mask[rows], (0, sequences.shape[1] - prompt_mask.shape[1]), value=1)
