"""The verbs of text: generate, demo."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

from cyclopts import Parameter

from retro.cli.options import options, taken
from retro.cli.shared import Base, JsonFile, ModelFolder, OwnIndex, check_file, stamp, use_device, write_json
from retro.common.devices import DeviceSettings
from retro.retrieval.filters.hits import QueryFilters
from retro.sampling.settings import DecodingSettings

GenerateOptions = options(DecodingSettings, QueryFilters, DeviceSettings, without=["against"])


def generate(
    model: ModelFolder,
    prompts: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    store: str | None = None,
    no_retrieval: bool = False,
    k: int | None = None,
    index: OwnIndex = None,
    base: Base = None,
    align: Literal["start", "end"] | None = None,
    lookahead: int | None = None,
    gains: bool = False,
    prompt_file: str | None = None,
    batch_size: int = 8,
    html: str | None = None,
    json: JsonFile = None,
    **given: Unpack[GenerateOptions],
) -> None:
    """Continue prompts, searching the store at the end of every chunk, and show the sources.

    One prompt streams. Standard input is one prompt, whatever its lines.

    Arguments:
        prompts: Texts to continue; "-", or none at all, is what standard input holds.
        store: Folder of the datastore to read from, or the address of a retrieval server.
        no_retrieval: Read nothing, RETRO[OFF]; give this or a store.
        k: Neighbors of a chunk. Default: the model's.
        align: Where a prompt stands in the chunks: "end" fills it up in front, so that its last token ends one and what
            that finds is read at once, by a prompt shorter than a chunk too. Default: start.
        lookahead: Tokens before the end of a chunk at which its neighbors are searched. Default: 0.
        gains: Measure each token's loss without retrieval less that with it, in bits.
        prompt_file: A .txt file with one prompt, or a .jsonl file whose lines have the field "prompt".
        batch_size: Prompts that are continued together.
        html: File to write one page to, with the texts and beside them what they read.
    """
    use_device(given)
    filters = taken(given, QueryFilters)
    DecodingSettings(**given)
    if not store and not no_retrieval:
        raise ValueError("--store is missing; name a datastore, or say --no-retrieval.")
    retrieval = {
        "store": store,
        "k": k,
        "index": index,
        "align": align,
        "lookahead": lookahead,
        "gains": gains or None,
        **filters,
    }
    for name, value in retrieval.items():
        if no_retrieval and value is not None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing beside --no-retrieval; leave one of them out.")
    for file in (html, json):
        check_file(file)

    from retro.text.prompts import read_prompts

    texts_of = read_prompts(prompts or [], prompt_file, sys.stdin)

    import torch

    from retro.loading import load
    from retro.sampling import sample, terminal_stream, terminal_text, wants_color

    opened, tokenizer, retriever = load(model, store, index=index or "auto", base=base, **filters)
    color = wants_color(sys.stdout)
    torch.manual_seed(given.pop("seed", 0))
    given |= {name: value for name, value in (("lookahead", lookahead), ("align", align)) if value is not None}
    streams = len(texts_of) == given.get("num_beams", 1) == given.get("num_return_sequences", 1) == 1
    if streams:
        given["streamer"] = terminal_stream(tokenizer, partial(print, end="", flush=True), color)
    texts = sample(opened, tokenizer, texts_of, retriever, k, gains=gains, batch_size=batch_size, **given)
    for number, text in enumerate(texts, start=1):
        print("\n" if streams else f"== text {number} of {len(texts)}")
        print(terminal_text(text, color, with_text=not streams))
    about, made_with = {"model": model}, {}
    if retriever is not None:
        about |= {"store": store, "num_neighbors": k or opened.config.num_neighbors, "index": retriever.index.kind}
        made_with = stamp(retriever.store)
    _write_texts(texts, about, made_with, json, html)


def _write_texts(
    texts: list, about: dict[str, Any], made_with: dict[str, Any], json: str | None, html: str | None
) -> None:
    """Write the files that were asked for."""
    from retro.common.files import write_text
    from retro.sampling import as_json, html_page

    write_json(json, {"texts": [as_json(text) for text in texts]} | about | made_with)
    if html:
        write_text(html, html_page(texts, about))


def demo(*, output: str = "demo", seed: int = 0, **place: Unpack[options(DeviceSettings)]) -> None:
    """Go from text to a trained RETRO, measured and sampled from, without any download.

    It reads the documentation of the Python packages installed here.

    Arguments:
        output: Folder where everything is written.
        seed: Seed of everything that is drawn.
    """
    from retro.demo import run_demo

    use_device(place)
    print(run_demo(Path(output), seed))
