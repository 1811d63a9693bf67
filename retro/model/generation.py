"""Retrieval inside generate(): one search for each chunk as it is completed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from retro.model.cache import RetroCache
from retro.model.fixed import FixedStep
from retro.model.padding import check_prompts
from retro.model.step import CachedStep, CompletedChunk

if TYPE_CHECKING:
    from transformers import CompileConfig, GenerationConfig

    from retro.retrieval.neighbors import Neighbors

logger = logging.getLogger(__name__)
OnError = Literal["raise", "off"]
# what generate() takes here and Hugging Face's does not
OPTIONS = {
    "retriever": None,
    "num_neighbors": None,
    "neighbor_ids": None,
    "neighbor_mask": None,
    "lookahead": 0,
    "on_retrieval_error": "raise",
}


class RetrievalError(ValueError):
    """A search failed; `__cause__` says why."""


class RetrievalSession:
    """The searches of one call of generate().

    A query is a function of a row's tokens alone, and what it found is remembered by content: rows of a batch and beams
    may be reordered freely, and each query is searched once. Searches run one at a time, with `lookahead` in a thread
    that ends with the session.

    lookahead: The query of a chunk that is generated is not the chunk but the last m tokens that are known `lookahead`
        tokens before its end, so that it is searched while these are decoded (Jiang et al. 2024, PipeRAG). The query of
        a chunk of the prompt is the chunk.
    """

    def __init__(
        self,
        retriever: Callable[..., Neighbors],
        chunk_len: int,
        num_neighbors: int,
        retrieved_len: int,
        vocab_size: int,
        lookahead: int = 0,
        on_error: OnError = "raise",
    ):
        self.retriever, self.chunk_len, self.num_neighbors = retriever, chunk_len, num_neighbors
        self.retrieved_len, self.vocab_size = retrieved_len, vocab_size
        self.lookahead, self.on_error = lookahead, on_error
        self.padding: list[int] = []
        self.prompt_lens: list[int] = []
        self._found: dict[bytes, Neighbors | RetrievalError | Future] = {}
        self._warned = False
        self._thread = ThreadPoolExecutor(1, "retro-retrieval") if lookahead else None

    def __enter__(self) -> RetrievalSession:
        return self

    def __exit__(self, *error) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def of_step(
        self, cache: RetroCache, step: CachedStep, input_ids: Int[Tensor, "b s"], is_prompt: bool
    ) -> tuple[Int[Tensor, "c k r"], Bool[Tensor, "c k r"]] | None:
        """The neighbors of the chunks that the step completes; None if there is no such chunk."""
        if is_prompt:
            self.padding, self.prompt_lens = cache.padding, [max(first + step.length, 0) for first in step.first]
        ahead = self._chunks_ahead(step, is_prompt)
        if not step.completed and not ahead:
            return None
        tokens = cache.tokens(step, input_ids)
        found = self._search([self._query(tokens, *chunk[:2]) for chunk in step.completed], step.completed)
        self._start([self._query(tokens, *chunk[:2]) for chunk in ahead], ahead)
        return stacked(found) if found else None

    def of_sequences(self, sequences: Int[Tensor, "q n"]) -> list[list[Neighbors]]:
        """For each row that generate() returned, the neighbors of its whole chunks.

        Prompts may have been repeated p times (beams, samples) and q <= p rows of each returned, in order.
        """
        ids, found = sequences.cpu().numpy(), []
        for row, tokens in enumerate(ids):
            source = row * len(self.padding) // len(ids)
            real = tokens[self.padding[source] :]
            chunks = [CompletedChunk(source, number, 0) for number in range(1, len(real) // self.chunk_len + 1)]
            queries = [self._query(lambda _, i, j, real=real: real[i:j], *chunk[:2]) for chunk in chunks]
            found.append(self._search(queries, chunks, is_read=False))
        return found

    def _query(self, tokens: Callable[[int, int, int], np.ndarray], row: int, number: int) -> np.ndarray:
        """The tokens that a chunk is searched by; `tokens(row, start, stop)` gives those of a row."""
        m, end = self.chunk_len, number * self.chunk_len
        end = end if end <= self.prompt_lens[row] else end - self.lookahead
        return np.ascontiguousarray(tokens(row, max(end - m, 0), end), dtype=np.int64)

    def _chunks_ahead(self, step: CachedStep, is_prompt: bool) -> list[CompletedChunk]:
        """The chunks to search for now: those that end `lookahead` tokens on, after a prompt no more than that."""
        m, found = self.chunk_len, []
        for row, first in enumerate(step.first if self.lookahead else []):
            known = max(first + step.length, 0)
            number = known // m + 1
            left = number * m - known
            if left == self.lookahead or (is_prompt and left < self.lookahead):
                found.append(CompletedChunk(row, number, 0))
        return found

    def _search(
        self, queries: list[np.ndarray], chunks: Sequence[CompletedChunk], is_read: bool = True
    ) -> list[Neighbors]:
        """What queries found. A search that failed counts only where something reads its neighbors."""
        self._start(queries, chunks)
        keys = [query.tobytes() for query in queries]
        for key in keys:
            if isinstance(self._found[key], Future):
                self._found.update(self._found[key].result())
        return [self._or_nothing(self._found[key], is_read) for key in keys]

    def _or_nothing(self, found: Neighbors | RetrievalError, is_read: bool) -> Neighbors:
        if not isinstance(found, RetrievalError):
            return found
        if is_read and self.on_error == "raise":
            raise found
        if is_read and not self._warned:
            logger.warning("%s; such chunks go without neighbors", found)
            self._warned = True
        return self._nothing()

    def _start(self, queries: list[np.ndarray], chunks: Sequence[CompletedChunk]) -> None:
        """Search what is not known yet, those of one length together."""
        new = {query.tobytes(): i for i, query in enumerate(queries) if query.tobytes() not in self._found}
        for length in {len(queries[i]) for i in new.values()}:
            some = {key: i for key, i in new.items() if len(queries[i]) == length}
            asked = [queries[i] for i in some.values()], [chunks[i] for i in some.values()]
            if self._thread is None:
                self._found.update(self._ask(*asked))
            else:
                self._found.update(dict.fromkeys(some, self._thread.submit(self._ask, *asked)))

    def _ask(
        self, queries: list[np.ndarray], chunks: Sequence[CompletedChunk]
    ) -> dict[bytes, Neighbors | RetrievalError | Future]:
        """One search. If it fails, each query is tried alone, so that only the one at fault goes without."""
        try:
            found = self._checked(self.retriever(np.stack(queries), num_neighbors=self.num_neighbors), len(queries))
            return {query.tobytes(): found[i : i + 1] for i, query in enumerate(queries)}
        except Exception as error:
            if len(queries) > 1:
                alone = [self._ask([query], [chunk]) for query, chunk in zip(queries, chunks, strict=True)]
                return {key: found for one in alone for key, found in one.items()}
            where = f"retrieval for chunk {chunks[0].number} of row {chunks[0].row} failed"
            failed = RetrievalError(f"{where}: {error or type(error).__name__}")
            failed.__cause__ = error
            return {queries[0].tobytes(): failed}

    def _checked(self, found: Any, num_queries: int) -> Neighbors:
        from retro.retrieval.neighbors import Neighbors

        if not isinstance(found, Neighbors):
            raise ValueError(f"the retriever gave a {type(found).__name__}; it must give Neighbors.")
        tokens, mask = found.tokens, found.mask
        if tokens.ndim != 3 or tokens.shape != mask.shape or len(tokens) != num_queries:
            raise ValueError(
                f"the retriever gave tokens {list(tokens.shape)} and mask {list(mask.shape)}; both must be [q, k, r], "
                f"here with q = {num_queries}."
            )
        if mask.dtype != bool:
            raise ValueError(f"the retriever gave a mask of {mask.dtype}; it must be bool.")
        outside = tokens[mask & ((tokens < 0) | (tokens >= self.vocab_size))]
        if outside.size:
            raise ValueError(
                f"the retriever gave token {outside[0]}, and the model has {self.vocab_size}; is its store made with "
                "another tokenizer?"
            )
        return found

    def _nothing(self) -> Neighbors:
        """The neighbors of one query that found none."""
        from retro.retrieval.neighbors import Neighbors

        k, shape = self.num_neighbors, (1, self.num_neighbors, self.retrieved_len)
        return Neighbors(
            ids=np.full((1, k), -1, dtype=np.int64),
            tokens=np.zeros(shape, dtype=np.int64),
            mask=np.zeros(shape, dtype=bool),
            scores=np.full((1, k), -np.inf, dtype=np.float32),
            sources=[[None] * k],
        )


def stacked(found: list[Neighbors]) -> tuple[Int[Tensor, "c k r"], Bool[Tensor, "c k r"]]:
    """Tokens and masks of c queries, filled up where k or r differ; 0 where the mask is False."""
    k, r = (max(neighbors.tokens.shape[axis] for neighbors in found) for axis in (1, 2))
    ids, mask = np.zeros((len(found), k, r), dtype=np.int64), np.zeros((len(found), k, r), dtype=bool)
    for i, neighbors in enumerate(found):
        _, own_k, own_r = neighbors.mask.shape
        mask[i, :own_k, :own_r] = neighbors.mask[0]
        ids[i, :own_k, :own_r] = np.where(neighbors.mask[0], neighbors.tokens[0], 0)
    return torch.from_numpy(ids), torch.from_numpy(mask)


class GivenNeighbors:
    """Neighbors known beforehand: `neighbor_ids` [b, l, k, r] of the first l chunks of each prompt's text, counted from
    its first real token. Chunks after these have none.
    """

    def __init__(self, neighbor_ids: Tensor, neighbor_mask: Tensor | None):
        if neighbor_ids.ndim != 4:
            raise ValueError(f"neighbor_ids has shape {list(neighbor_ids.shape)}; it must be [b, l, k, r].")
        if neighbor_mask is None:
            neighbor_mask = torch.ones_like(neighbor_ids, dtype=torch.bool)
        if neighbor_mask.shape != neighbor_ids.shape:
            raise ValueError(f"neighbor_mask has shape {list(neighbor_mask.shape)}, neighbor_ids another.")
        self.ids, self.mask = neighbor_ids, neighbor_mask.bool()

    def of_step(
        self, cache: RetroCache, step: CachedStep, input_ids: Shaped[Tensor, "b s *d"], is_prompt: bool
    ) -> tuple[Int[Tensor, "c k r"], Bool[Tensor, "c k r"]] | None:
        """The neighbors of the chunks that the step completes; None if there is no such chunk."""
        num_rows, num_given = len(step.first), self.ids.shape[1]
        if not step.completed or num_given == 0:
            return None
        repeats = num_rows // len(self.ids)  # beams and samples of a prompt follow each other
        rows = [chunk.row // repeats for chunk in step.completed]
        numbers = torch.tensor([chunk.number for chunk in step.completed])
        columns = numbers.clamp(max=num_given) - 1
        given = (numbers <= num_given).to(self.mask.device)[:, None, None]
        return self.ids[rows, columns], self.mask[rows, columns] & given


class RetrievalGeneration:
    """generate() with `retriever=`. Mixed into a causal LM that takes neighbor_ids, neighbor_mask and a RetroCache."""

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        *args,
        retriever: Callable[..., Neighbors] | None = None,
        num_neighbors: int | None = None,
        neighbor_ids: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
        lookahead: int = 0,
        on_retrieval_error: str = "raise",
        **kwargs,
    ) -> Any:
        """Hugging Face's generate(), with retrieval at the end of every chunk.

        Args:
            inputs: Prompt tokens [b, n], left-padded where `attention_mask` says so; chunks are counted from each
                row's first real token.
            retriever: Where neighbors come from: a Retriever, or what is called as one, with token ids [q, m] and
                `num_neighbors`, and gives Neighbors. It is called once at a time. None samples RETRO[OFF].
            num_neighbors: k; default `config.num_neighbors`. It may be another than in training.
            neighbor_ids, neighbor_mask: In place of a retriever, [b, l, k, r]: the neighbors of the first l chunks of
                each text, of its prompt and of what is generated. Chunks after these have none.
            lookahead: Search for a chunk's neighbors with what is known so many tokens before its end, in a thread,
                while these tokens are generated; see RetrievalSession. Queries of a first chunk are that much shorter.
            on_retrieval_error: When a search fails, "raise" RetrievalError, or "off": that chunk has no neighbors.
            kwargs: As in Hugging Face. With `use_cache=False` every step runs the whole text. With
                `return_dict_in_generate=True` and a retriever the result has `neighbors`: for each row, the
                `Neighbors` (one query each, sources included) of each of its whole chunks.

        Raises ValueError for options that do not go together.
        """
        check_prompts(inputs, kwargs)
        options = dict(num_neighbors=num_neighbors, lookahead=lookahead, on_retrieval_error=on_retrieval_error)
        source = self._neighbor_source(retriever, neighbor_ids, neighbor_mask, **options)
        if source is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("inputs_embeds") is not None:
            if isinstance(source, RetrievalSession):
                raise ValueError("inputs_embeds cannot be searched for; give input_ids, or neighbor_ids.")
            prompts = kwargs["inputs_embeds"]
        elif prompts is not None:
            _check_whole_text(prompts, kwargs.get("attention_mask"))
        if isinstance(source, GivenNeighbors):
            if prompts is not None and len(prompts) != len(source.ids):
                raise ValueError(f"neighbor_ids has {len(source.ids)} rows, and there are {len(prompts)} prompts.")
            return super().generate(inputs, generation_config, *args, retrieval=source, **kwargs)
        with source:
            out = super().generate(inputs, generation_config, *args, retrieval=source, **kwargs)
            if not isinstance(out, Tensor):
                out["neighbors"] = source.of_sequences(out.sequences)
        return out

    def _neighbor_source(
        self, retriever, neighbor_ids, neighbor_mask, num_neighbors, lookahead, on_retrieval_error
    ) -> RetrievalSession | GivenNeighbors | None:
        """What the options ask for; None for RETRO[OFF]. Refuses what would be ignored."""
        m = self.config.chunk_len
        if retriever is None and num_neighbors is not None or num_neighbors is not None and num_neighbors < 1:
            raise ValueError(f"num_neighbors is {num_neighbors}; it must be at least 1, beside a retriever.")
        if not 0 <= lookahead < m or (lookahead and retriever is None):
            raise ValueError(
                f"lookahead is {lookahead}; it must be from 0 to chunk_len - 1 = {m - 1}, with a retriever."
            )
        if on_retrieval_error not in ("raise", "off") or (on_retrieval_error == "off" and retriever is None):
            raise ValueError(f"on_retrieval_error is {on_retrieval_error!r}; give 'raise' or 'off', with a retriever.")
        if retriever is None and neighbor_ids is None:
            if neighbor_mask is not None:
                raise ValueError("neighbor_mask is given without neighbor_ids.")
            return None
        if retriever is not None and neighbor_ids is not None:
            raise ValueError("a retriever and neighbor_ids are both given; choose one.")
        if getattr(self.config, "cca_layers", None) == []:
            raise ValueError("neighbors are asked for, but this model has no CCA layers (config.cca_layers is empty).")
        if retriever is None:
            return GivenNeighbors(neighbor_ids, neighbor_mask)
        if not callable(retriever):
            raise ValueError(
                f"retriever is {retriever!r}, which cannot be called; give the retriever of retro.load(model, store), "
                "or a function of token ids and num_neighbors that gives Neighbors."
            )
        k, r = num_neighbors or self.config.num_neighbors, self.config.retrieved_len
        return RetrievalSession(retriever, m, k, r, self.config.vocab_size, lookahead, on_retrieval_error)

    def init_continuous_batching(self, *args, **kwargs) -> None:
        """ValueError: continuous batching pages keys and values, and would hold no neighbors."""
        raise ValueError("continuous batching keeps no neighbors of its rows; use generate() with a padded batch.")

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs) -> Tensor:
        """As Hugging Face infers it from padding tokens, but for those that stand inside of a text."""
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        text = mask.cumsum(-1) > 0
        if not generation_config.is_assistant:  # what an assistant goes on with is text to its end
            text &= mask.flip(-1).cumsum(-1).flip(-1) > 0
        return text.long()

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "b n"],
        next_sequence_length: int | None = None,
        past_key_values: RetroCache | None = None,
        attention_mask: Shaped[Tensor, "b columns"] | None = None,
        retrieval: RetrievalSession | GivenNeighbors | None = None,
        is_first_iteration: bool = False,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Float[Tensor, "b e d"] | None = None,
        position_ids: Int[Tensor, "_ columns"] | None = None,
        tokenizer: Any = None,
    ) -> dict[str, Any]:
        """The new tokens and the neighbors of the chunks that they complete; without a cache the whole text.

        tokenizer: of the stop strings; generate() passes it on, and no model reads it. position_ids: as they are
            counted anyway, which an assisted model passes on; ValueError for others.
        """
        if position_ids is not None:
            _check_positions(position_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        device, given = self.device, input_ids
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        embedded = inputs_embeds is not None and is_first_iteration
        if next_sequence_length is not None:
            given = given[:, -next_sequence_length:]
            inputs_embeds = inputs_embeds[:, -next_sequence_length:] if embedded else None
        inputs = {
            # for graphs always contiguous
            "input_ids": None if embedded else given.to(device).clone(memory_format=torch.contiguous_format),
            "inputs_embeds": inputs_embeds.to(device) if embedded else None,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        tokens = inputs_embeds if embedded else given
        found = self._neighbors_of_step(retrieval, tokens, attention_mask, past_key_values, is_first_iteration)
        return inputs | found

    def _neighbors_of_step(
        self,
        retrieval: RetrievalSession | GivenNeighbors | None,
        input_ids: Int[Tensor, "b s"] | Float[Tensor, "b s d"],
        attention_mask: Shaped[Tensor, "b columns"] | None,
        cache: RetroCache | None,
        is_prompt: bool,
    ) -> dict[str, Any]:
        """neighbor_ids and neighbor_mask for `forward`, if these tokens, or embeddings, complete a chunk; or all as a
        fixed step.
        """
        m, (b, length) = self.config.chunk_len, input_ids.shape[:2]
        start = RetroCache(m) if cache is None else cache
        step = start.begin(b, length, attention_mask, is_known=not is_prompt)
        found = None if retrieval is None else retrieval.of_step(start, step, input_ids, is_prompt)
        filled = {}
        if found is not None:
            num_slots = length // m if cache is None else max(chunk.slot for chunk in step.completed) + 1
            rows, slots = [chunk.row for chunk in step.completed], [chunk.slot for chunk in step.completed]
            for name, x in zip(("neighbor_ids", "neighbor_mask"), found, strict=True):
                filled[name] = x.new_zeros(b, num_slots, *x.shape[1:])
                filled[name][rows, slots] = x
        if cache is None:
            return {name: x.to(self.device) for name, x in filled.items()}
        fixed = None if is_prompt else self._plan(cache, step, **filled)
        return filled if fixed is None else {"fixed": fixed}

    def _plan(self, cache: RetroCache, step: CachedStep, **neighbors: Tensor) -> FixedStep | None:
        """A step of `generate` as a fixed one; None where it cannot be one."""
        return cache.plan(step, neighbors.get("neighbor_ids"), neighbors.get("neighbor_mask"), self.device)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """Hugging Face's for fixed steps; others, which come once in a text, run as they are."""
        compiled = super().get_compiled_call(compile_config)
        return lambda fixed=None, **inputs: self(**inputs) if fixed is None else compiled(fixed=fixed, **inputs)


def refuse_assisted(generation_mode: str, model_kwargs: dict[str, Any]) -> None:
    """ValueError for assisted generation with neighbors."""
    if generation_mode == "assisted_generation" and model_kwargs.get("retrieval") is not None:
        raise ValueError("assisted generation takes tokens back, and with them neighbors; leave one of both out.")


def _check_positions(position_ids: Int[Tensor, "_ columns"], attention_mask: Int[Tensor, "b columns"]) -> None:
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -position_ids.shape[-1] :]
    if counted.shape[-1] != position_ids.shape[-1] or not (counted == position_ids.to(counted.device)).all():
        raise ValueError("position_ids is given, but positions are counted from each row's first token; leave it out.")


def _check_whole_text(input_ids: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape[-1] != input_ids.shape[-1]:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns and input_ids {input_ids.shape[-1]}; with neighbors give the "
            "whole text, what past_key_values holds included."
        )
