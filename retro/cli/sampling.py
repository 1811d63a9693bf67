"""The verbs of sampling: generate, serve, demo."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Unpack

from cyclopts import Parameter

from retro.cli.options import options, taken
from retro.cli.shared import ApiKeyFile, Host, JsonFile, ModelFolder, OwnIndex, stamp, write_json
from retro.retrieval.filters.hits import QueryFilters
from retro.serve.limits import Limits


@dataclass(kw_only=True)
class DecodingSettings:
    """How the next token is chosen; the names are those of Hugging Face's generate().

    Arguments:
        max_new_tokens: Tokens to write. Default: 128, or what the model has room for.
        do_sample: Draw the next token; without this it is the most likely one.
        temperature: Temperature of sampling. Default: 1.
        top_p: Draw from the likeliest tokens that together have this probability. Default: 1.
        top_k: Draw from so many likeliest tokens. Default: 50.
        seed: Seed of sampling. Default: 0.
        num_beams: Texts of a beam search. Default: no beam search.
        num_return_sequences: Texts for each prompt. Default: 1.
        repetition_penalty: A number above 1 makes tokens less likely that the text has already. Default: 1.
        stop: Strings that end a text. Default: none.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None


GenerateOptions = options(DecodingSettings, QueryFilters, without=["against"])


def generate(
    model: ModelFolder,
    prompts: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    store: str | None = None,
    no_retrieval: bool = False,
    k: int | None = None,
    index: OwnIndex = None,
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
        lookahead: Tokens before the end of a chunk at which its neighbors are searched. Default: 0.
        gains: Measure each token's loss without retrieval less that with it, in bits.
        prompt_file: A .txt file with one prompt, or a .jsonl file whose lines have the field "prompt".
        batch_size: Prompts that are continued together.
        html: File to write one page to, with the texts and beside them what they read.
    """
    filters = taken(given, QueryFilters)
    retrieval = {"store": store, "k": k, "index": index, "lookahead": lookahead, "gains": gains or None, **filters}
    _check_given(retrieval, no_retrieval, given)
    for file in (html, json):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"the folder of {file} is not there; make it first.")

    from retro.text.prompts import read_prompts

    texts_of = read_prompts(prompts or [], prompt_file, sys.stdin)

    import torch

    from retro.loading import load
    from retro.sampling import as_json, html_page, sample, terminal_stream, terminal_text, wants_color

    opened, tokenizer, retriever = load(model, store, index=index or "auto", **filters)
    color = wants_color(sys.stdout)
    torch.manual_seed(given.pop("seed", 0))
    if "stop" in given:
        given["stop_strings"] = given.pop("stop")
    if lookahead is not None:
        given["lookahead"] = lookahead
    streams = len(texts_of) == given.get("num_beams", 1) == given.get("num_return_sequences", 1) == 1
    if streams:
        given["streamer"] = terminal_stream(tokenizer, partial(print, end="", flush=True), color)
    texts = sample(opened, tokenizer, texts_of, retriever, k, gains=gains, batch_size=batch_size, **given)
    for number, text in enumerate(texts, start=1):
        print("\n" if streams else f"== text {number} of {len(texts)}")
        print(terminal_text(text, color, with_text=not streams))
    about = {"model": model}
    if retriever is not None:
        about |= {"store": store, "num_neighbors": k or opened.config.num_neighbors, "index": retriever.index.kind}
    made_with = {} if retriever is None else stamp(retriever.store)
    write_json(json, {"texts": [as_json(text) for text in texts]} | about | made_with)
    if html:
        Path(html).write_text(html_page(texts, about), encoding="utf-8")


def _check_given(retrieval: dict[str, Any], no_retrieval: bool, decoding: dict[str, Any]) -> None:
    """Refuse what would be ignored."""
    if not retrieval["store"] and not no_retrieval:
        raise ValueError("--store is missing; name a datastore, or say --no-retrieval.")
    for name, value in retrieval.items():
        if no_retrieval and value is not None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing beside --no-retrieval; leave one of them out.")
    if not decoding.get("do_sample"):
        names = [name for name in ("temperature", "top_p", "top_k", "seed") if name in decoding]
        if names:
            raise ValueError(f"--{names[0].replace('_', '-')} needs --do-sample.")
        if decoding.get("num_return_sequences", 1) > decoding.get("num_beams", 1):
            raise ValueError("--num-return-sequences needs --do-sample, or as many --num-beams.")


def serve(
    model: ModelFolder,
    /,
    *,
    store: list[str],
    name: str | None = None,
    index: OwnIndex = None,
    host: Host = "127.0.0.1",
    port: int = 8000,
    api_key_file: ApiKeyFile = None,
    **limits: Unpack[options(Limits)],
) -> None:
    """Serve a model over HTTP: OpenAI's routes with sources, and a page for people.

    The routes are /v1/completions, /v1/chat/completions, /v1/models, /v1/stores and /health, and the page is at /. The
    field "retro" of an answer says what it read; that of a request takes "retrieval", "store" and "num_neighbors".

    Arguments:
        store: Folder of a datastore to read from, or NAME=FOLDER, where the name is else the folder's; once more for
            each further store to choose from, the first is the default.
        name: What the model is called. Default: its folder's name.
        port: Port to listen on; 0 takes a free one.
    """
    taken_on = Limits(**limits)
    try:
        from retro.serve.server import load_with_stores, serve_app
        from retro.web.listening import read_api_key, run, url_of
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[serve]".') from None
    from retro.serve.engine import GenerationEngine

    api_key = read_api_key(api_key_file)
    opened, tokenizer, stores = load_with_stores(model, store, index or "auto")
    engine = GenerationEngine(opened, tokenizer, stores, taken_on)
    name = name or Path(model).resolve().name
    served, bound = serve_app(engine, name, host, port, api_key)
    print(f"{name} with {', '.join(stores)}: {url_of(bound)}", flush=True)
    run(served, bound, taken_on.grace_seconds)


def demo(*, output: str = "demo", seed: int = 0) -> None:
    """Go from text to a trained RETRO, measured and sampled from, without any download.

    It reads the documentation of the Python packages installed here.

    Arguments:
        output: Folder where everything is written.
        seed: Seed of everything that is drawn.
    """
    from retro.demo import run_demo

    print(run_demo(Path(output), seed))
