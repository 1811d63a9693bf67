"""What a text read while it was written: its chunks, their neighbors, and the tokens copied from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retro.retrieval.search.searchers import in_measure
from retro.sampling.detokenizer import token_texts
from retro.text.overlap import common_runs

if TYPE_CHECKING:
    from retro.retrieval import Neighbors
    from retro.retrieval.neighbors import Source


@dataclass(frozen=True)
class CopiedRun:
    """The longest run of tokens that a text's generated tokens share with a neighbor they could read.

    start: of its first token in the text; neighbor_start: in the neighbor's tokens.
    """

    start: int
    neighbor_start: int
    num_tokens: int
    text: str


@dataclass(frozen=True)
class ReadNeighbor:
    """A neighbor [N, F] that a chunk could read.

    row: of the store; score: higher is closer, and `measure` says what it is, such as cosine; source: None where the
    retriever did not say.
    tokens: the text of each real token; those from `continuation_start` on are F.
    copied: None where nothing was, or where the chunk is all prompt.
    """

    row: int
    score: float
    source: Source | None
    tokens: tuple[str, ...]
    continuation_start: int
    copied: CopiedRun | None = None
    measure: str = "score"

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def rounded_score(self) -> float:
        """The score as it is shown; a distance that rounds to 0 has no sign."""
        return round(self.score, 3) + 0.0


@dataclass(frozen=True)
class ReadingChunk:
    """Tokens [start, stop) of the text, and the neighbors they could read: those that the chunk before found.

    num_prompt_tokens: how many of its tokens, its first ones, are the prompt's.
    """

    number: int
    start: int
    stop: int
    num_prompt_tokens: int
    neighbors: tuple[ReadNeighbor, ...]

    @property
    def origin(self) -> str:
        """Whether it was "prompt", "generated" or "both"."""
        if self.num_prompt_tokens == 0:
            return "generated"
        return "prompt" if self.num_prompt_tokens == self.stop - self.start else "both"


@dataclass(frozen=True)
class Attribution:
    """A prompt, the text generated after it, and for each chunk what it could read.

    Attributes:
        token_ids, tokens: of prompt and generated text, and the text of each; a character of several tokens stands
            with the last of them, special tokens have none.
        retrieved: False for RETRO[OFF].
        gains: for each token its loss OFF minus its loss ON in bits (above 0: the neighbors helped), None for the
            first token, which nothing predicts; None unless asked for.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    num_prompt_tokens: int
    chunk_len: int
    chunks: tuple[ReadingChunk, ...]
    retrieved: bool = True
    gains: tuple[float | None, ...] | None = None

    @property
    def prompt(self) -> str:
        return self.text_of(0, self.num_prompt_tokens)

    @property
    def text(self) -> str:
        """What was generated."""
        return self.text_of(self.num_prompt_tokens, len(self.tokens))

    def text_of(self, start: int, stop: int) -> str:
        return "".join(self.tokens[start:stop])

    def gain_of(self, chunk: ReadingChunk) -> float | None:
        """Bits that its neighbors saved a chunk; None where gains were not asked for."""
        return None if self.gains is None else sum(gain or 0.0 for gain in self.gains[chunk.start : chunk.stop])


def attribute(
    tokenizer: Any,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    found: Sequence[Neighbors | None] | None,
    chunk_len: int,
    gains: Sequence[float | None] | None = None,
    measure: str = "score",
) -> Attribution:
    """The attribution of one text without padding.

    Arguments:
        tokenizer: of the model and of the store, which are the same.
        token_ids: prompt and generated tokens.
        found: for each whole chunk what it found, one query each, as `generate` gives it; None for RETRO[OFF].
        gains: see `Attribution` and `retro.sampling.token_gains`.
        measure: what the scores are, as a retriever's `measure` says it.

    Chunk u + 1 is predicted while reading what chunk u found (RETRO, section 2.4), so that the first chunk reads
    nothing, and what the last whole chunk found is left out where no token follows it.
    """
    if not 0 <= num_prompt_tokens <= len(token_ids):
        raise ValueError(f"num_prompt_tokens is {num_prompt_tokens}; it must be from 0 to the {len(token_ids)} tokens.")
    ids, tokens = np.asarray(token_ids, np.int64), token_texts(tokenizer, token_ids)
    chunks = []
    for number, start in enumerate(range(0, len(ids), chunk_len)):
        stop = min(start + chunk_len, len(ids))
        of_prompt = min(max(num_prompt_tokens - start, 0), stop - start)
        read = found[number - 1] if found and 0 < number <= len(found) else None
        neighbors = []
        if read is not None:
            written = np.arange(start, stop) >= num_prompt_tokens
            for j, run in _runs(read, ids[start:stop], written):
                copied = None if run is None else _copied(tokens, start, *run)
                neighbors.append(_neighbor(tokenizer, read, j, chunk_len, copied, measure))
        chunks.append(ReadingChunk(number, start, stop, of_prompt, tuple(neighbors)))
    return Attribution(
        tuple(ids.tolist()),
        tuple(tokens),
        num_prompt_tokens,
        chunk_len,
        tuple(chunks),
        retrieved=found is not None,
        gains=None if gains is None else tuple(gains),
    )


def _runs(found: Neighbors, chunk: np.ndarray, written: np.ndarray) -> Iterator[tuple[int, tuple | None]]:
    """Each neighbor that is there, and (length, start, start among its real tokens) of the run it shares, if any."""
    lengths, starts, neighbor_starts = common_runs(chunk[None], found.tokens[:1], written[None], found.mask[:1])
    for j in np.flatnonzero(found.mask[0].any(-1)).tolist():
        place = int(found.mask[0, j, : neighbor_starts[0, j]].sum())
        yield j, (int(lengths[0, j]), int(starts[0, j]), place) if lengths[0, j] else None


def _copied(tokens: list[str], chunk_start: int, length: int, start: int, neighbor_start: int) -> CopiedRun:
    first = chunk_start + start
    return CopiedRun(first, neighbor_start, length, "".join(tokens[first : first + length]))


def _neighbor(
    tokenizer: Any, found: Neighbors, j: int, chunk_len: int, copied: CopiedRun | None, measure: str
) -> ReadNeighbor:
    mask = found.mask[0, j]
    texts = _passage_texts(tokenizer, found.tokens[0, j][mask].tolist())
    row, score, source = int(found.ids[0, j]), in_measure(float(found.scores[0, j]), measure), found.sources[0][j]
    return ReadNeighbor(row, score, source, tuple(texts), int(mask[:chunk_len].sum()), copied, measure)


def _passage_texts(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """The text of each token of a passage; a character that the passage's own edge cuts is left out."""
    texts = token_texts(tokenizer, token_ids)
    held = [place for place, text in enumerate(texts) if text]
    if held:
        texts[held[0]] = texts[held[0]].lstrip("\ufffd")
        texts[held[-1]] = texts[held[-1]].rstrip("\ufffd")
    return texts


def as_json(attribution: Attribution) -> dict[str, Any]:
    """An attribution as plain values, of this form:

    ::

      {
        "prompt", "text": str,                    the prompt as the model read it, and what was generated after it
        "num_prompt_tokens", "chunk_len": int,
        "token_ids": [int], "tokens": [str],      of both; the texts joined are prompt + text
        "retrieved": bool,                        False for RETRO[OFF]
        "gains": [float | null] | null,           bits that the neighbors saved each token; null unless asked for
        "chunks": [{                              all of them, in order
          "chunk", "start", "stop": int,          its number from 0, its tokens [start, stop)
          "num_prompt_tokens": int,               how many of them are the prompt's; they come first
          "origin": "prompt" | "generated" | "both",
          "text": str, "gain": float | null,      the sum of its tokens' gains
          "neighbors": [{                         what it could read, nearest first: found by the chunk before it
            "row": int,                           of the store
            "score": float, "measure": str,       such as "cosine"; higher is closer
            "document_id", "title", "source": str, "position": int, "date": str | null,
                                                  the position is a chunk's number in its document; all null if unknown
            "text": str, "tokens": [str], "continuation_start": int,
                                                  [N, F]; tokens from there on are F, which follows N in its document
            "copied": {"start", "neighbor_start", "num_tokens": int, "text": str} | null
                                                  longest run of generated tokens that is also in the neighbor: where it
          }]                                      starts among all tokens, and among the neighbor's
        }]
      }
    """
    return {
        "prompt": attribution.prompt,
        "text": attribution.text,
        "num_prompt_tokens": attribution.num_prompt_tokens,
        "chunk_len": attribution.chunk_len,
        "token_ids": list(attribution.token_ids),
        "tokens": list(attribution.tokens),
        "retrieved": attribution.retrieved,
        "gains": None if attribution.gains is None else list(attribution.gains),
        "chunks": [_chunk_json(attribution, chunk) for chunk in attribution.chunks],
    }


def _chunk_json(attribution: Attribution, chunk: ReadingChunk) -> dict[str, Any]:
    return {
        "chunk": chunk.number,
        "start": chunk.start,
        "stop": chunk.stop,
        "num_prompt_tokens": chunk.num_prompt_tokens,
        "origin": chunk.origin,
        "text": attribution.text_of(chunk.start, chunk.stop),
        "gain": attribution.gain_of(chunk),
        "neighbors": [_neighbor_json(neighbor) for neighbor in chunk.neighbors],
    }


def _neighbor_json(neighbor: ReadNeighbor) -> dict[str, Any]:
    unknown = dict.fromkeys(("document_id", "title", "source", "position", "date"))
    return {
        "row": neighbor.row,
        "score": neighbor.score,
        "measure": neighbor.measure,
        **(unknown if neighbor.source is None else asdict(neighbor.source)),
        "text": neighbor.text,
        "tokens": list(neighbor.tokens),
        "continuation_start": neighbor.continuation_start,
        "copied": None if neighbor.copied is None else asdict(neighbor.copied),
    }
