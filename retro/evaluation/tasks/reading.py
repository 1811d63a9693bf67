"""How a model reads the texts of a task: contexts and continuations in tokens, the neighbors of their chunks, batches.

Chunks are counted from the start of the input. `align` says where a context stands in them:

    "start"   its first token is the first of a chunk. The tokens after its last whole chunk are read, but no query;
              a context shorter than a chunk has no neighbors
    "end"     its last token is the last of a chunk, so that the continuation reads what the last m tokens found.
              In front stand eos tokens (pad without an eos), which the model sees as text and queries leave out

A query is a whole chunk of the context, never one that holds a token of the continuation. With `of="text"` every whole
chunk before the last token is one, as in bits per byte, and what it finds is read from its last token on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from tqdm.auto import tqdm

from retro.common.modes import evaluating
from retro.evaluation.bits import RETRIEVAL, neighbors_of
from retro.evaluation.neighbors import neighbor_rows, random_neighbors
from retro.evaluation.scorer import reads_neighbors, score_tokens
from retro.evaluation.settings import ReaderSettings
from retro.evaluation.tasks.examples import Example, ScoredContinuation, aligned, encode, passage_texts
from retro.loading import load
from retro.model.padding import pad_left
from retro.retrieval.filters import shares_run
from retro.text.chunks import decode_chunks, pad_token_id

CHUNK_LEN = 64  # of models that have none
Passages = tuple[Int64[np.ndarray, "_ _"], Bool[np.ndarray, "_ _"]]  # [k, r]; "_": lists of them may differ


@dataclass(frozen=True, kw_only=True)
class Reader(ReaderSettings):
    """A causal LM with a tokenizer, and where the neighbors of its chunks come from; what is longer than max_len is cut
    at its start, by whole chunks where there is retrieval. For the rest see `ReaderSettings`.

    Args:
        model: Any Hugging Face causal LM; with neighbors, one of this library's.
        retriever: Needed unless `retrieval` is "off".
        retrieval: "off", "on", or "random": as many neighbors, each a random chunk of the store, as a control.

    Raises ValueError for what does not go together.
    """

    model: Any
    tokenizer: Any
    retriever: Any = None
    retrieval: str = "off"
    progress: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.retrieval not in RETRIEVAL.values():
            raise ValueError(f"retrieval is {self.retrieval!r}; choose one of {', '.join(RETRIEVAL.values())}.")
        if self.retrieval != "off" and self.retriever is None:
            raise ValueError(f"retrieval is {self.retrieval!r} without a retriever; give one, or retrieval='off'.")
        if self.retrieval != "off" and not reads_neighbors(self.model):
            raise ValueError("the model reads no neighbors; retrieval must be 'off'.")

    def columns(self) -> dict[str, Reader]:
        """The readers to compare: "lm" alone for a plain LM; else "retro_off", and with a retriever "retro_on" and
        "retro_on_random"."""
        if not reads_neighbors(self.model):
            return {"lm": self}
        kinds = RETRIEVAL if self.retriever is not None else {"retro_off": "off"}
        return {column: replace(self, retrieval=kind) for column, kind in kinds.items()}

    def score_columns(
        self, examples: Sequence[Example], of: str = "context"
    ) -> tuple[dict[str, list[ScoredContinuation]], dict[str, float]]:
        """What `score` gives for each of `columns`, and the seconds each took."""
        scores, seconds = {}, {}
        for column, one in self.columns().items():
            started = time.perf_counter()
            scores[column] = one.score(examples, of)
            seconds[column] = round(time.perf_counter() - started, 2)
        return scores, seconds

    # Tokens

    @cached_property
    def chunk_len(self) -> int:
        return getattr(self.model.config, "chunk_len", CHUNK_LEN)

    @cached_property
    def longest(self) -> int:
        """Tokens of an input at most."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        return min(positions, 2048) if self.max_len is None else self.max_len

    def encode(self, text: str) -> Int64[np.ndarray, " t"]:
        """The ids of a text that may go on: with the tokenizer's bos, without an eos."""
        return encode(self.tokenizer, text)

    def pair(self, context: str, continuation: str, name: str = "", text: str = "") -> Example:
        """A context and what follows it, tokenized as one text and cut where the context ends.

        White space at the end of the context goes to the continuation, since tokens begin with it. Raises ValueError if
        one of both is empty.
        """
        bare = context.rstrip()
        before, whole = self.encode(bare), self.encode(context + continuation)
        if not bare or len(whole) <= len(before):
            raise ValueError(f"the context {context[-40:]!r} or what follows it, {continuation[:40]!r}, is empty.")
        return Example(self.place(before), whole[len(before) :], name, text)

    def place(self, context: Int64[np.ndarray, " s"]) -> Int64[np.ndarray, " t"]:
        """A context as `align` wants it."""
        return aligned(context, self.chunk_len, self.filler, self.align)

    @property
    def filler(self) -> int:
        """The token in front of a text that ends with a chunk."""
        eos = self.tokenizer.eos_token_id
        return pad_token_id(self.tokenizer) if eos is None else int(eos)

    # Scoring

    def score(self, examples: Sequence[Example], of: str = "context") -> list[ScoredContinuation]:
        """Every continuation, by one forward pass over context and continuation.

        of: "context" or "text", whose chunks are queries; see above.
        """
        step = 1 if self.retrieval == "off" else self.chunk_len
        cut = [self._cut(example, step) for example in examples]
        rows = self._rows(cut, of)
        texts = [np.concatenate([one.context, one.continuation]) for one in cut]
        places = [np.arange(len(one.context), len(text)) for one, text in zip(cut, texts, strict=True)]
        given = (None, None) if self.retrieval == "off" else (rows, self.retriever.store)
        options = dict(batch_size=self.batch_size, progress=self.retrieval if self.progress else None)
        found = score_tokens(self.model, texts, places, *given, **options)
        return [
            ScoredContinuation(scores.log_probs.astype(np.float64), scores.greedy, self._num_read(one, own))
            for one, scores, own in zip(cut, found, rows, strict=True)
        ]

    def _cut(self, example: Example, step: int) -> Example:
        """The example with room for it: whole steps of its context cut off, and one token at least left."""
        room = self.longest + 1 - len(example.continuation)
        return replace(example, context=_last(example.context, room, step))

    def _num_read(self, example: Example, rows: np.ndarray) -> int:
        """Neighbors that the first token of the continuation could read."""
        last = len(example.context) // self.chunk_len - 1
        return int((rows[last] >= 0).sum()) if 0 <= last < len(rows) else 0

    # Neighbors

    def _rows(self, examples: Sequence[Example], of: str) -> list[Int64[np.ndarray, "_ k"]]:
        """For each example the neighbors' rows of its first l whole chunks; -1 for none."""
        if self.retrieval == "off":
            return [np.zeros((0, 0), np.int64)] * len(examples)
        k, places = neighbors_of(self.model, self.num_neighbors), {}
        of_example = []
        for example in examples:
            texts = [example.context] if of == "context" else [example.context, example.continuation[:-1]]
            chunks = _whole_chunks(np.concatenate(texts), self.chunk_len)
            keys = [(chunk.tobytes(), example.name) for chunk in chunks]
            of_example.append([places.setdefault(key, len(places)) for key in keys])
        found = self._found(places, k)
        rows = [found[np.asarray(own, np.int64)] for own in of_example]
        return self._without_overlap(examples, rows) if self.decontaminate else rows

    def _found(self, places: dict[tuple[bytes, str], int], k: int) -> Int64[np.ndarray, "c k"]:
        """The neighbors of each chunk, no search twice."""
        if not places:
            return np.zeros((0, k), np.int64)
        chunks = np.stack([np.frombuffer(chunk, np.int64) for chunk, _ in places])
        names = [name for _, name in places]
        excluded = names if any(names) else None
        real = np.ones(chunks.shape, bool)
        found = neighbor_rows(self.retriever, chunks, real, k, excluded, self.cache, self.progress)
        if self.retrieval == "on":
            return found
        return random_neighbors(self.retriever.store, found, self.seed)

    def _without_overlap(self, examples: Sequence[Example], rows: list[np.ndarray]) -> list[np.ndarray]:
        """The rows with -1 for those whose [N, F] overlaps with the example's text."""
        present = np.unique(np.concatenate([own.reshape(-1) for own in rows]))
        present = present[present >= 0]
        passages = dict(zip(present.tolist(), self.passage_texts(present), strict=True))
        clean = []
        for example, own in zip(examples, rows, strict=True):
            bad = [row for row in np.unique(own[own >= 0]).tolist() if shares_run(passages[row], example.text)]
            clean.append(np.where(np.isin(own, bad), -1, own))
        return clean

    def passage_texts(self, rows: Int64[np.ndarray, " p"]) -> list[str]:
        """The texts of [N, F] of some rows of the store."""
        return passage_texts(self.retriever.store, rows, self.retrieved_len)

    @property
    def retrieved_len(self) -> int:
        """r, of the model or of the retriever."""
        given = getattr(self.model.config, "retrieved_len", None)
        return given or (2 * self.chunk_len if self.retriever is None else self.retriever.retrieved_len)

    # Writing

    def complete(
        self,
        prompts: Sequence[Int64[np.ndarray, " _"]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        passages: Sequence[Passages] | None = None,
        strip: bool = False,
        **options: Any,
    ) -> list[str]:
        """What the model writes after each prompt, greedily, up to the first of the strings in `stop`.

        passages: for each prompt, what the last whole chunk of it reads in place of what it would retrieve.
        strip: white space at the start of what is written is left out, and ends nothing.
        options: as Hugging Face's generate() takes them.

        Raises ValueError for random neighbors, which are for scoring, and for prompts that leave no room.
        """
        if self.retrieval == "random" and passages is None:
            raise ValueError("retrieval is 'random'; that control is for scoring, write with 'on' or 'off'.")
        if max_new_tokens >= self.longest:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; the model reads {self.longest} in all, give fewer.")
        step = 1 if passages is None and self.retrieval == "off" else self.chunk_len
        cut = [_last(prompt, self.longest - max_new_tokens, step) for prompt in prompts]
        order, texts = sorted(range(len(cut)), key=lambda i: -len(cut[i])), [""] * len(cut)
        end = _Stop(self.tokenizer, [end for end in stop if end], strip)
        with evaluating(self.model), tqdm(total=len(cut), desc="writing", disable=not self.progress or None) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                given = None if passages is None else [passages[i] for i in batch]
                written = self._write([cut[i] for i in batch], max_new_tokens, end, given, options)
                for i, text in zip(batch, written, strict=True):
                    texts[i] = text
                bar.update(len(batch))
        return texts

    def _write(self, prompts, max_new_tokens: int, end: _Stop, passages, options: dict[str, Any]) -> list[str]:
        pad = pad_token_id(self.tokenizer)
        ids, mask = pad_left(prompts, pad)
        n = ids.shape[1]
        given = {"do_sample": False, "pad_token_id": pad, "eos_token_id": self.tokenizer.eos_token_id, **options}
        if end.stop:
            given["stopping_criteria"] = [lambda ids, scores, **kwargs: end(ids[:, n:])]
        if passages is not None:
            given |= self._placed(prompts, passages)
        elif self.retrieval == "on":
            given |= {"retriever": self.retriever, "num_neighbors": neighbors_of(self.model, self.num_neighbors)}
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **given)[:, n:].cpu().numpy()
        return [end.cut(text) for text in end.texts(written)]

    def _placed(self, prompts, passages: Sequence[Passages]) -> dict[str, torch.Tensor]:
        """The passages as neighbors of the last whole chunk of each prompt, counted from its first real token."""
        chunks = [len(prompt) // self.chunk_len for prompt in prompts]
        k, r = (max(ids.shape[axis] for ids, _ in passages) for axis in (0, 1))
        shape = (len(prompts), max(chunks), k, r)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for i, (last, (own, real)) in enumerate(zip(chunks, passages, strict=True)):
            if last:
                ids[i, last - 1, : len(own), : own.shape[1]], mask[i, last - 1, : len(own), : own.shape[1]] = own, real
        given = {"neighbor_ids": torch.from_numpy(ids), "neighbor_mask": torch.from_numpy(mask)}
        return {name: tensor.to(self.model.device) for name, tensor in given.items()}


@dataclass(frozen=True)
class _Stop:
    """A text ends when what was written holds one of some strings. transformers' own criterion asks more of a tokenizer
    than decoding."""

    tokenizer: Any
    stop: list[str]
    strip: bool

    def __call__(self, written: torch.Tensor) -> torch.Tensor:
        found = [any(end in text for end in self.stop) for text in self.texts(written.cpu().numpy())]
        return torch.tensor(found, device=written.device)

    def texts(self, written: np.ndarray) -> list[str]:
        texts = decode_chunks(self.tokenizer, list(written))
        return [text.lstrip() for text in texts] if self.strip else texts

    def cut(self, text: str) -> str:
        return min((text.split(end)[0] for end in self.stop), key=len, default=text)


def open_reader(
    model: Any,
    store: Any = None,
    index: str = "auto",
    tokenizer: Any = None,
    dtype: Any = None,
    base: Any = None,
    **options: Any,
) -> Reader:
    """A reader of what `retro.load` gives for these arguments.

    options: Of Reader. `retrieval` is "on" by default if there is a store and the model reads neighbors.
    """
    model, tokenizer, retriever = load(model, store, index=index, tokenizer=tokenizer, dtype=dtype, base=base)
    retrieval = "on" if retriever is not None and reads_neighbors(model) else "off"
    return Reader(model=model, tokenizer=tokenizer, retriever=retriever, **{"retrieval": retrieval, **options})


def _whole_chunks(ids: Int64[np.ndarray, " s"], chunk_len: int) -> Int64[np.ndarray, "l m"]:
    return np.ascontiguousarray(ids[: len(ids) // chunk_len * chunk_len], np.int64).reshape(-1, chunk_len)


def _last(ids: np.ndarray, room: int, step: int) -> np.ndarray:
    """What is left within `room` tokens when whole steps are cut off at the start."""
    excess = len(ids) - room
    if excess > 0 and -(-excess // step) * step >= len(ids):
        raise ValueError(
            f"there is room for {room} of the {len(ids)} tokens of a context, and it is cut by {step}; "
            "give a larger max_len, or less to follow it."
        )
    return ids if excess <= 0 else ids[-(-excess // step) * step :]
