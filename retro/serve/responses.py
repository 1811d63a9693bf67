"""Rows to answers: OpenAI's JSON, whole or as server-sent events, with the sources in the field `retro`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from retro.serve.engine import Engine
from retro.serve.lanes import QueueFull
from retro.serve.rows import NamedToken, Row, RowCancelled, ToldToken
from retro.web.errors import ApiError

Event = tuple[int, str, Any]  # number of the row, kind and value as in `Row.send`


@dataclass
class Answer:
    """What every part of one answer says: ids, model, and what the rows were."""

    chat: bool
    model: str
    rows: Sequence[Row]
    num_choices: int  # of each prompt
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> dict[str, int]:
        """A prompt counts once, however many texts it gets."""
        read = sum(len(row.prompt_ids) for row in self.rows[:: self.num_choices])
        written = sum(len(row.new_ids) for row in self.rows)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def retro(self, sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
        row = self.rows[0]
        options = {"retrieval": row.store is not None, "store": row.store, "num_neighbors": row.num_neighbors}
        return {**options, "seed": row.seed, "sources": list(sources)}

    def whole(
        self,
        texts: Sequence[str],
        told: Sequence[list[ToldToken]],
        reasons: Sequence[str],
        sources: Sequence[dict[str, Any]],
    ) -> dict[str, Any]:
        """The answer at once."""
        choices = [
            {
                "index": index,
                **self._content(text),
                "logprobs": self._logprobs(told[index]) if self._tells else None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage, "retro": self.retro(sources)}

    @property
    def _tells(self) -> bool:
        return self.rows[0].num_logprobs is not None

    def _logprobs(self, told: Sequence[ToldToken]) -> dict[str, list[Any]]:
        """Of each token: itself, log p, the likeliest in its place, and in a completion where its text begins."""
        if self.chat:  # whose content is text, which special tokens are none of
            given = [token for token in told if token.token.bytes is not None]
            tops = [token.top[: self.rows[0].num_logprobs] for token in given]
            named = [
                _named(t.token) | {"top_logprobs": [*map(_named, top)]} for t, top in zip(given, tops, strict=True)
            ]
            return {"content": named, "refusal": None}
        return {
            "tokens": [token.token.name for token in told],
            "token_logprobs": [token.token.log_prob for token in told],
            "top_logprobs": [_by_name(token.top) or None for token in told],
            "text_offset": [token.start for token in told],
        }

    def part(
        self,
        index: int,
        text: str = "",
        reason: str | None = None,
        told: Sequence[ToldToken] = (),
        first: bool = False,
    ) -> dict[str, Any]:
        """A piece of one row."""
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        content = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": self._logprobs(told) if told else None}
        choice["finish_reason"] = reason
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last(self) -> dict[str, Any]:
        """What follows the choices where usage is asked for."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [], "usage": self.usage}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def submit(engine: Engine, rows: Sequence[Row]) -> AsyncGenerator[Event, None]:
    """Queue rows; gives their events until all have ended. Closing it early cancels them.

    Raises ApiError: at once 429 if the queue is full; 503 at shutdown and where the store is down; later 504 when time
    runs out or the store is late, and 500 when the model fails.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def send(index: int, kind: str, value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(queue.put_nowait, (index, kind, value))

    for index, row in enumerate(rows):
        row.send = partial(send, index)
    try:
        engine.submit(rows)
    except QueueFull:
        raise ApiError(429, "the queue is full; try again in a moment.", code="queue_full") from None
    except RowCancelled:
        raise _failure(RowCancelled()) from None
    return _events(rows, queue, engine.limits.max_seconds)


async def _events(rows: Sequence[Row], queue: asyncio.Queue, seconds: float) -> AsyncGenerator[Event, None]:
    late = ApiError(504, f"the text was not finished in {seconds:g} seconds; ask for less.")
    # an event of its own, since asyncio.wait_for may swallow a cancellation in Python 3.11
    alarm = asyncio.get_running_loop().call_later(seconds, queue.put_nowait, (0, "error", late))
    left = len(rows)
    try:
        while left:
            event = await queue.get()
            if event[1] == "error":
                raise _failure(event[2])
            left -= event[1] == "end"
            yield event
    finally:
        alarm.cancel()
        for row in rows:
            row.cancelled = True


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RowCancelled):
        return ApiError(503, "the server is shutting down.", code="shutting_down")
    return ApiError(500, "the model failed; the server's log says why.")


async def gather(answer: Answer, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    """The whole answer, when all rows have ended."""
    texts, reasons, sources = [""] * len(answer.rows), [""] * len(answer.rows), {}
    told: list[list[ToldToken]] = [[] for _ in answer.rows]
    async with aclosing(events):
        async for index, kind, value in events:
            if kind == "text":
                texts[index] += value
            elif kind == "end":
                reasons[index] = value
            elif kind == "logprobs":
                told[index] += value
            else:
                sources |= {(index, chunk["chunk"]): {"choice": index, **chunk} for chunk in value}
    return answer.whole(texts, told, reasons, [sources[place] for place in sorted(sources)])


async def stream(
    answer: Answer, first: Event, events: AsyncGenerator[Event, None], include_usage: bool
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; an error that comes later is the last one but [DONE]."""
    usage = {"usage": None} if include_usage else {}
    told: dict[int, list[ToldToken]] = {}  # of each row, until its next piece
    async with aclosing(events):
        for index in range(len(answer.rows) if answer.chat else 0):
            yield _sse(answer.part(index, first=True) | usage)
        try:
            async for index, kind, value in _chained(first, events):
                if kind == "logprobs":
                    told[index] = value
                else:
                    yield _sse(_part(answer, (index, kind, value), told) | usage)
            if include_usage:
                yield _sse(answer.last())
        except ApiError as error:
            yield _sse(error.body())
    yield "data: [DONE]\n\n"


async def _chained(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    yield first
    async for event in events:
        yield event


def _part(answer: Answer, event: Event, told: dict[int, list[ToldToken]]) -> dict[str, Any]:
    index, kind, value = event
    if kind == "sources":
        return answer.part(index) | {"retro": answer.retro([{"choice": index, **chunk} for chunk in value])}
    text, reason = (value, None) if kind == "text" else ("", value)
    return answer.part(index, text, reason, told.pop(index, ()))


def _by_name(tokens: Sequence[NamedToken]) -> dict[str, float | None]:
    """Of those of one name, which bytes alone do not tell apart, the first."""
    return {token.name: token.log_prob for token in tokens} | {t.name: t.log_prob for t in reversed(tokens)}


def _named(token: NamedToken) -> dict[str, Any]:
    own = None if token.bytes is None else list(token.bytes)
    return {"token": token.name, "bytes": own, "logprob": token.log_prob}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
