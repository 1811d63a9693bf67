"""One row of a batch: its tokens in; text piece by piece, sources and an end out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from retro.sampling import IncrementalDetokenizer, as_json, attribute

if TYPE_CHECKING:
    from retro.retrieval import Neighbors

_SLICE_TOKENS = 128  # whose softmax is taken at a time
_LEAST = -9999.0  # log p where it is lower, -inf included, which JSON cannot spell; as OpenAI says it
_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character


class StopStrings:
    """Text up to the first of some stop strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to hand out, and whether a stop string was met."""
        text = self._held + text
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        keep = max(held, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class FoundByChunk:
    """A retriever that remembers what each chunk found, so that a row can say so while it is being written."""

    def __init__(self, retriever: Callable[..., Neighbors], measure: str) -> None:
        self.retriever, self.measure = retriever, measure
        self._found: dict[bytes, Neighbors] = {}

    def __call__(self, queries: Any, **options: Any) -> Neighbors:
        found = self.retriever(queries, **options)
        for number, chunk in enumerate(np.asarray(queries, np.int64)):
            self._found[chunk.tobytes()] = found[number : number + 1]
        return found

    def of(self, chunk: Sequence[int]) -> Neighbors:
        """What a chunk found; KeyError if it was never searched."""
        return self._found[np.asarray(chunk, np.int64).tobytes()]


class RowCancelled(Exception):
    """A row was no longer wanted, or the engine shuts down."""


class NamedToken(NamedTuple):
    """A token as `IncrementalDetokenizer.named` calls it, and its log p in nats; None of a text's first."""

    name: str
    bytes: bytes | None
    log_prob: float | None


class ToldToken(NamedTuple):
    """A token of a text, the likeliest ones in its place, and the character of the text where it begins."""

    token: NamedToken
    top: list[NamedToken]
    start: int


class TokenLogprob(NamedTuple):
    """log p of a token in nats, None of a text's first, and of the likeliest tokens in its place, itself included."""

    token: int
    log_prob: float | None
    top: dict[int, float]


def token_logprobs(logits: Float[Tensor, "t v"], tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of t tokens, from the logits in the place before each."""
    found = []
    for start in range(0, len(tokens), _SLICE_TOKENS):
        log_p, ids = (x[start : start + _SLICE_TOKENS] for x in (logits, tokens))
        log_p = log_p.float().log_softmax(-1)
        own = log_p.gather(-1, torch.tensor(ids, device=log_p.device)[:, None])[:, 0].tolist()
        top, top_ids = (x.tolist() for x in log_p.topk(min(num_top, log_p.shape[-1])))
        for token, log_prob, values, names in zip(ids, own, top, top_ids, strict=True):
            likeliest = dict(zip(names, values, strict=True))
            found.append(TokenLogprob(token, log_prob, likeliest | {token: log_prob}))
    return found


@dataclass(eq=False)
class Row:
    """A prompt, how to continue it, and what has come of it.

    Attributes:
        store, num_neighbors: where to retrieve and how many; both None for RETRO[OFF].
        seed: of this row's own generator, so that neighbors in the batch change nothing.
        send: takes ("text", str), before it ("logprobs", list[ToldToken]) of the tokens that begin in it, ("sources",
            chunks as `chunks_json` gives them; a later one replaces an earlier one of its number), and once ("end",
            "stop" | "length") or ("error", Exception). Called from the model's thread.
        num_logprobs: how many likeliest tokens to tell in the place of each; None: tell no log-probabilities.
        echo: what to send before what is written, the prompt's text; its tokens are told of then, too.
        cancelled: set by whoever no longer wants the row.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: Sequence[str] = ()
    store: str | None = None
    num_neighbors: int | None = None
    num_logprobs: int | None = None
    echo: str = ""
    send: Callable[[str, Any], None] = lambda kind, value: None
    cancelled: bool = False
    finished: bool = False
    new_ids: list[int] = field(default_factory=list)
    came_at: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> tuple[str | None, int | None, bool]:
        """Rows of one group may share a batch."""
        return self.store, self.num_neighbors, self.scores_prompt

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.num_logprobs is not None

    def end(self, kind: str, value: Any) -> None:
        """Say the last word, once."""
        if not self.finished:
            self.finished = True
            self.send(kind, value)


class RunningRow:
    """A row inside a batch. `found` is None for RETRO[OFF]."""

    def __init__(
        self, row: Row, tokenizer: Any, end_ids: frozenset[int], chunk_len: int, found: FoundByChunk | None
    ) -> None:
        self.row, self._tokenizer, self._end_ids, self._chunk_len = row, tokenizer, end_ids, chunk_len
        self._detokenizer, self._stops = IncrementalDetokenizer(tokenizer, row.prompt_ids), StopStrings(row.stops)
        self._generator = torch.Generator().manual_seed(row.seed)
        self._found, self._read = found, {}
        self._first = len(row.prompt_ids) // chunk_len  # the chunk that the first new token is in
        self._scored: list[TokenLogprob] = []  # of the token that was drawn
        self._told: list[ToldToken] = []  # whose text was not yet sent
        self._added = self._sent = 0  # characters: of all tokens, and of what was sent

    def draw(self, logits: Float[Tensor, " v"]) -> int:
        """The next token: the likeliest at temperature 0, else one of those that hold the mass top_p."""
        token = self._drawn(logits)
        if self.row.num_logprobs is not None and not self.row.finished:
            self._scored = token_logprobs(logits[None], [token], self.row.num_logprobs)
        return token

    def score_prompt(self, logits: Float[Tensor, "n v"]) -> None:
        """Tell the log-probabilities of the prompt, from the logits of its places and of the padding before it."""
        ids = self.row.prompt_ids
        first = TokenLogprob(ids[0], None, {})
        scored = token_logprobs(logits[len(logits) - len(ids) : -1], ids[1:], self.row.num_logprobs)
        detokenizer, told, start = IncrementalDetokenizer(self._tokenizer), [], 0
        for token in (first, *scored):
            told.append(_told(detokenizer, token, start))
            start += len(detokenizer.add(token.token))
        self.row.send("logprobs", told)

    def _drawn(self, logits: Float[Tensor, " v"]) -> int:
        if self.row.finished or self.row.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        probabilities = torch.softmax((logits - logits.max()) / self.row.temperature, -1)  # whatever the temperature
        if self.row.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            probabilities[order[1:][ordered.cumsum(-1)[:-1] >= self.row.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def push(self, token: int) -> None:
        """Take the token that was drawn; hand out text and sources, or the end."""
        row = self.row
        if row.cancelled:
            row.end("error", RowCancelled())
        if row.finished:
            return
        if row.echo and not row.new_ids:
            row.send("text", row.echo)
        if row.max_new_tokens == 0:
            return row.end("end", "length")
        row.new_ids.append(token)
        self._send_new_sources()
        start = len(row.echo) + self._added
        self._told += [_told(self._detokenizer, scored, start) for scored in self._scored]
        if token in self._end_ids:
            return self._end("stop", "")
        text = self._detokenizer.add(token)
        self._added += len(text)
        text, stopped = self._stops.push(text)
        if stopped:
            return self._last_words("stop", text)
        if len(row.new_ids) == row.max_new_tokens:
            return self._end("length", text)
        self._send_text(text)

    def _end(self, reason: str, text: str) -> None:
        """End with what was held back, which may still hold a stop string; a character that was cut is left out."""
        rest, stopped = self._stops.push(self._detokenizer.rest().rstrip(_BROKEN))
        rest += "" if stopped else self._stops.flush()
        self._last_words("stop" if stopped else reason, text + rest, whole=not stopped)

    def _last_words(self, reason: str, text: str, whole: bool = False) -> None:
        """whole: no token is left out of the text."""
        self._send_text(text, whole)
        if self._found is not None:
            self.row.send("sources", self._chunks(self._first))
        self.row.end("end", reason)

    def _send_text(self, text: str, whole: bool = False) -> None:
        self._sent += len(text)
        begun = [told for told in self._told if whole or told.start < len(self.row.echo) + self._sent]
        if begun:
            self._told = self._told[len(begun) :]
            self.row.send("logprobs", begun)
        if text:
            self.row.send("text", text)

    def _send_new_sources(self) -> None:
        """When a token is the first to read what a chunk found, say so."""
        place = len(self.row.prompt_ids) + len(self.row.new_ids) - 1
        number, offset = divmod(place, self._chunk_len)
        if self._found is None or number == 0 or (offset and len(self.row.new_ids) > 1):
            return
        ids, m = self.row.prompt_ids + self.row.new_ids, self._chunk_len
        self._read[number - 1] = self._found.of(ids[(number - 1) * m : number * m])
        self.row.send("sources", self._chunks(number))

    def _chunks(self, first: int) -> list[dict[str, Any]]:
        ids = self.row.prompt_ids + self.row.new_ids
        given = len(self.row.prompt_ids), self._read, self._chunk_len, first, self._found.measure
        return chunks_json(self._tokenizer, ids, *given)


def _told(detokenizer: IncrementalDetokenizer, scored: TokenLogprob, start: int) -> ToldToken:
    def named(token: int, log_prob: float | None) -> NamedToken:
        return NamedToken(*detokenizer.named(token), None if log_prob is None else max(log_prob, _LEAST))

    return ToldToken(named(scored.token, scored.log_prob), [named(*item) for item in scored.top.items()], start)


def chunks_json(
    tokenizer: Any,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    found: dict[int, Neighbors],
    chunk_len: int,
    first: int,
    measure: str,
) -> list[dict[str, Any]]:
    """The chunks from `first` on with what they could read, as `retro.sampling.as_json` gives them.

    found: what whole chunks found, by the chunk's number. Each chunk has its own `tokens` too.
    """
    base = max(first - 1, 0)
    while base and tokenizer.decode(token_ids[base * chunk_len :][:chunk_len]).startswith(_BROKEN):
        base -= 1  # it begins inside a character
    shift = base * chunk_len
    ids = token_ids[shift:]
    read = [found.get(base + number) for number in range(len(ids) // chunk_len)]
    whole = as_json(attribute(tokenizer, ids, max(num_prompt_tokens - shift, 0), read, chunk_len, measure=measure))
    chunks = whole["chunks"][first - base :]
    for chunk in chunks:
        chunk["tokens"] = whole["tokens"][chunk["start"] : chunk["stop"]]
        chunk["chunk"] += base
        for shifted in (chunk, *(neighbor["copied"] for neighbor in chunk["neighbors"] if neighbor["copied"])):
            shifted["start"] += shift
            shifted["text"] = shifted["text"].rstrip(_BROKEN)  # a character that the end cuts
        chunk["tokens"][-1] = chunk["tokens"][-1].rstrip(_BROKEN)
        chunk["stop"] += shift
    return chunks


class SampleRows(LogitsProcessor):
    """Leaves each row one token, drawn by its own settings and generator; greedy decoding then takes it.

    prompt_logits: holds, when the first token is drawn, the logits [b, n, v] of the prompts where rows tell of them.
    """

    def __init__(self, rows: Sequence[RunningRow], prompt_logits: list[Tensor]) -> None:
        self._rows, self._prompt_logits = rows, prompt_logits

    def __call__(self, input_ids: Int[Tensor, "b n"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        while self._prompt_logits:  # once, before the first token
            for row, logits in zip(self._rows, self._prompt_logits.pop(), strict=True):
                row.score_prompt(logits)
        drawn = [row.draw(logits) for row, logits in zip(self._rows, scores, strict=True)]
        chosen = torch.tensor(drawn, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class StreamRows(StoppingCriteria):
    """Hands each row its token and ends the rows that are finished.

    A streamer would see a token only after generate() has asked its criteria, and cannot end a row; this one place
    does both. `eos_token_id` tells generate() to fill finished rows with padding, which retrieves nothing.
    """

    def __init__(self, rows: Sequence[RunningRow], eos_token_id: Sequence[int]) -> None:
        self._rows, self.eos_token_id = rows, eos_token_id

    def __call__(self, input_ids: Int[Tensor, "b n"], scores: Any, **kwargs: Any) -> Bool[Tensor, " b"]:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.push(token)
        return torch.tensor([row.row.finished for row in self._rows], device=input_ids.device)
