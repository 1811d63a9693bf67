"""An attribution as lines for a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, TextIO

from retro.sampling.detokenizer import TextStream, visible
from retro.sampling.sources import Attribution, ReadingChunk, ReadNeighbor

MIN_SHOWN_RUN = 3  # tokens; shorter runs are chance, and are shown nowhere but in the objects and in JSON
_DIM, _BOLD, _COLORS = "2", "1", ("36", "33", "35", "32", "34", "31")


def wants_color(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows color and NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, color: bool) -> str:
    """The text in an ANSI style, each line by itself."""
    if not color:
        return text
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else line for line in text.split("\n"))


def terminal_text(attribution: Attribution, color: bool = False, with_text: bool = True) -> str:
    """The text with its prompt dimmed, then what each chunk read, its score and what was copied from it.

    with_text: False where the text has been streamed already. Control characters are shown, not sent.
    """
    lines = [_text(attribution, color), ""] if with_text else []
    reading = [chunk for chunk in attribution.chunks if chunk.neighbors]
    if not attribution.retrieved:
        lines.append("sources: none, retrieval is off")
    elif not reading:
        lines.append("sources: none; nothing was found, or the text ends before its second chunk")
    else:
        lines.append("sources: what each chunk could read")
    for chunk in reading:
        lines.append(_heading(attribution, chunk, color))
        lines += [_neighbor(neighbor, place, color) for place, neighbor in enumerate(chunk.neighbors)]
    return "\n".join(lines)


def terminal_stream(tokenizer: Any, write: Callable[[str], Any], color: bool = False) -> TextStream:
    """A streamer for generate() that shows the prompt dimmed, then the text, control characters visible."""
    return TextStream(tokenizer, lambda text: write(visible(text)), lambda text: write(_prompt(text, color)))


def shown_runs(chunk: ReadingChunk) -> list[tuple[int, int, int]]:
    """(place of the neighbor, start, stop) of the copied runs worth showing, in the text's tokens."""
    runs = [(place, neighbor.copied) for place, neighbor in enumerate(chunk.neighbors)]
    return [
        (place, run.start, run.start + run.num_tokens) for place, run in runs if run and run.num_tokens >= MIN_SHOWN_RUN
    ]


def _text(attribution: Attribution, color: bool) -> str:
    painted = [_prompt(attribution.prompt, color)]
    for chunk in attribution.chunks:
        runs = shown_runs(chunk)
        tokens = range(max(chunk.start, attribution.num_prompt_tokens), chunk.stop)
        for reading, group in groupby(tokens, partial(_first_covering, runs)):
            text = visible("".join(attribution.tokens[token] for token in group))
            painted.append(text if reading is None else paint(text, _color(reading), color))
    return "".join(painted)


def _prompt(text: str, color: bool) -> str:
    return paint(visible(text), _DIM, color)


def _first_covering(runs: list[tuple[int, int, int]], token: int) -> int | None:
    return next((place for place, start, stop in runs if start <= token < stop), None)


def _heading(attribution: Attribution, chunk: ReadingChunk, color: bool) -> str:
    gain = attribution.gain_of(chunk)
    saved = "" if gain is None else f", gain {gain:+.1f} bits"
    origin = {"prompt": "prompt", "generated": "generated", "both": "prompt, then generated"}[chunk.origin]
    excerpt = _short(attribution.text_of(chunk.start, chunk.stop))
    return f"  {paint(f'chunk {chunk.number + 1}', _BOLD, color)} ({origin}{saved}): {excerpt}"


def _neighbor(neighbor: ReadNeighbor, place: int, color: bool) -> str:
    named = paint(where(neighbor), _color(place), color)
    line = f"    {neighbor.measure} {neighbor.rounded_score:.3f}  {named}: {_short(neighbor.text)}"
    if neighbor.copied and neighbor.copied.num_tokens >= MIN_SHOWN_RUN:
        copied = paint(_short(neighbor.copied.text), _color(place), color)
        line += f"\n             copied {neighbor.copied.num_tokens} tokens: {copied}"
    return line


def where(neighbor: ReadNeighbor) -> str:
    """Title, chunk and date of a neighbor on one line, safe to show."""
    source = neighbor.source
    if source is None:
        return "source unknown"
    date = f", {source.date}" if source.date else ""
    return _flat(f"{source.title or source.document_id}, chunk {source.position + 1}{date}")


def _color(place: int) -> str:
    return _COLORS[place % len(_COLORS)]


def _flat(text: str) -> str:
    return visible(" ".join(text.split()))


def _short(text: str, width: int = 80) -> str:
    flat = _flat(text)
    return flat if len(flat) <= width else flat[: width - 1] + "…"
