"""Attributions as HTML: one page that needs nothing else, or the fragment of one text for another page.

Every text goes through a template that escapes it; the page's policy lets nothing run or load but its own style and
script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from retro.sampling.detokenizer import visible
from retro.sampling.sources import Attribution, ReadingChunk, ReadNeighbor
from retro.sampling.terminal import MIN_SHOWN_RUN, shown_runs, where

_FOLDER = Path(__file__).parent
_NUM_COLORS = 6
_GAIN_LEVELS = (0.25, 1.0, 2.0, 4.0)  # bits at which the shading grows


def html_page(attributions: Sequence[Attribution], about: Mapping[str, Any] | None = None) -> str:
    """One self-contained page: each text on the left, beside it the neighbors that its chunks could read.

    about: what to say at the top, e.g. {"model": "run", "store": "store"}.
    """
    return (
        _environment()
        .get_template("page.html")
        .render(
            texts=[_text_view(attribution, f"t{place}") for place, attribution in enumerate(attributions, start=1)],
            about=[(visible(str(name)), visible(str(value))) for name, value in (about or {}).items()],
            with_gains=any(attribution.gains is not None for attribution in attributions),
            min_run=MIN_SHOWN_RUN,
            style=Markup(page_style()),
            script=Markup(page_script()),
            policy=_policy(),
        )
    )


def html_fragment(attribution: Attribution, name: str = "t1") -> str:
    """The part of the page that shows one text, for a page that holds `page_style` and `page_script` too.

    name: what the ids of its elements start with; letters and digits, another one for each fragment of a page.
    """
    return str(_environment().get_template("text.html").module.text(_text_view(attribution, name)))


@cache
def page_style() -> str:
    return (_FOLDER / "page.css").read_text(encoding="utf-8")


@cache
def page_script() -> str:
    return (_FOLDER / "page.js").read_text(encoding="utf-8")


def _policy() -> str:
    """A Content-Security-Policy under which only the page's own style and script count."""
    return content_policy([page_style()], [page_script()])


def content_policy(styles: Sequence[str], scripts: Sequence[str], others: str = "") -> str:
    """A Content-Security-Policy of these inline styles and scripts, and of what the directives `others` add."""

    def hashes(texts: Sequence[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; {others}style-src {hashes(styles)}; script-src {hashes(scripts)}; base-uri 'none'; "
        "form-action 'none'"
    )


@cache
def _environment() -> Environment:
    return template_environment(_FOLDER)


def template_environment(folder: Path, **options: Any) -> Environment:
    """The templates of a folder: everything they are given is escaped, and nothing may be missing."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _text_view(attribution: Attribution, name: str) -> dict[str, Any]:
    """What the template shows of one text."""
    return {
        "name": name,
        "retrieved": attribution.retrieved,
        "chunks": [_chunk_view(attribution, chunk, f"{name}c{chunk.number + 1}") for chunk in attribution.chunks],
    }


def _chunk_view(attribution: Attribution, chunk: ReadingChunk, name: str) -> dict[str, Any]:
    runs = shown_runs(chunk)
    shown = {place for place, _, _ in runs}
    gain = attribution.gain_of(chunk)
    return {
        "name": name,
        "number": chunk.number + 1,
        "origin": {"prompt": "prompt", "generated": "generated", "both": "prompt, then generated"}[chunk.origin],
        "gain": None if gain is None or chunk.number == 0 else f"{gain:+.1f}",
        "stretches": list(_stretches(attribution, chunk, runs, name)),
        "neighbors": [
            _run_view(place, name) | _neighbor_view(neighbor, place in shown)
            for place, neighbor in enumerate(chunk.neighbors)
        ],
    }


def _stretches(attribution: Attribution, chunk: ReadingChunk, runs: list, name: str) -> Iterator[dict[str, Any]]:
    """The chunk's tokens in stretches of one origin and one set of copied runs."""

    def kind(token: int) -> tuple[bool, tuple[int, ...]]:
        covering = tuple(place for place, start, stop in runs if start <= token < stop)
        return token < attribution.num_prompt_tokens, covering

    for (is_prompt, covering), group in groupby(range(chunk.start, chunk.stop), kind):
        tokens = list(group)
        yield {
            "is_prompt": is_prompt,
            "starts_text": tokens[0] == attribution.num_prompt_tokens,
            "runs": [_run_view(place, name) for place in covering],
            "starting": [_run_view(place, name) for place, start, _ in runs if start == tokens[0]],
            "ending": [_run_view(place, name) for place, _, stop in runs if stop == tokens[-1] + 1],
            "tokens": _token_views(attribution, tokens),
        }


def _token_views(attribution: Attribution, tokens: list[int]) -> list[dict[str, Any]]:
    """Text, gain and shade of each token that has text; one view for all of them where there are no gains."""
    if attribution.gains is None:
        return [{"text": visible(attribution.text_of(tokens[0], tokens[-1] + 1)), "gain": None, "shade": None}]
    views = []
    for token in tokens:
        text, gain = visible(attribution.tokens[token]), attribution.gains[token]
        if text:
            views.append({"text": text, "gain": None if gain is None else f"{gain:+.2f}", "shade": _shade(gain)})
    return views


def _shade(gain: float | None) -> str | None:
    level = 0 if gain is None else sum(abs(gain) >= at for at in _GAIN_LEVELS)
    return f"{'gain' if gain > 0 else 'loss'}{level}" if level else None


def _run_view(place: int, name: str) -> dict[str, Any]:
    """How a neighbor of the chunk `name` and its copied run are called and colored."""
    return {"number": place + 1, "name": f"{name}n{place + 1}", "color": place % _NUM_COLORS}


def _neighbor_view(neighbor: ReadNeighbor, is_shown: bool) -> dict[str, Any]:
    source, copied = neighbor.source, neighbor.copied if is_shown else None
    start, stop = (copied.neighbor_start, copied.neighbor_start + copied.num_tokens) if copied else (0, 0)
    parts = []
    for (follows, is_run), group in groupby(
        range(len(neighbor.tokens)), lambda j: (j >= neighbor.continuation_start, start <= j < stop)
    ):
        text = visible("".join(neighbor.tokens[j] for j in group))
        parts.append({"follows": follows, "is_run": is_run, "text": text})
    return {
        "where": where(neighbor),
        "score": f"{neighbor.measure} {neighbor.rounded_score:.3f}",
        "source": visible(source.source) if source else "",
        "link": _link(source.source) if source else None,
        "num_copied": copied.num_tokens if copied else 0,
        "parts": parts,
    }


def _link(source: str) -> str | None:
    """The source if it is an address on the web that a click may open."""
    try:
        address = urlsplit(source)
    except ValueError:
        return None
    plain = source.isprintable() and not any(character.isspace() for character in source)
    return source if plain and address.scheme in ("http", "https") and address.hostname else None
