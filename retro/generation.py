"""Retrieval inside generate(): one search for each chunk as it becomes whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from retro.padding import align_left

if TYPE_CHECKING:
    from retro.retrieval import Neighbors, Retriever


class RetrievalSession:
    """The neighbors of every chunk seen in one call of generate().

    Retrieval is a function of a chunk's tokens alone, so that chunks are remembered by content: rows of a batch and
    beams may be reordered freely, and each chunk is searched once.
    """

    def __init__(self, retriever: Retriever, chunk_len: int, num_neighbors: int):
        self.retriever, self.chunk_len, self.num_neighbors = retriever, chunk_len, num_neighbors
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
            kwargs: As in Hugging Face. With `return_dict_in_generate=True` the result has `neighbors`: for each row,
                the `Neighbors` (sources included) of each of its whole chunks.
        """
        kwargs["use_cache"] = False
        if retriever is None:
            return super().generate(inputs, *args, **kwargs)
        session = RetrievalSession(retriever, self.config.chunk_len, num_neighbors or self.config.num_neighbors)
        out = super().generate(inputs, *args, retrieval=session, **kwargs)
        if not isinstance(out, Tensor):
            prompt = kwargs.get("attention_mask")
            out["neighbors"] = session.neighbors(_real_rows(out.sequences, _whole_mask(out.sequences, prompt)))
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


def _whole_mask(sequences: Tensor, prompt_mask: Tensor | None) -> Tensor | None:
    """The prompt's mask, repeated for several sequences a prompt, with ones for what was generated."""
    if prompt_mask is None:
        return None
    mask = prompt_mask.repeat_interleave(sequences.shape[0] // prompt_mask.shape[0], dim=0)
    return torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
