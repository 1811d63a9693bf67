"""The verbs of sampling: generate, serve, demo."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from retro.cli.shared import (
    FILTERS,
    KINDS,
    OWN_INDEX,
    add_filters,
    add_json,
    add_limits,
    add_listening,
    given_filters,
    given_limits,
    stamp,
    verb,
    write_json,
)

# generate


def add_generate(verbs: Any) -> None:
    parser = verb(verbs, "generate", generate, "sample with retrieval at every chunk and show the sources")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="text to continue; - or none at all: what standard input holds"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help='.txt, or .jsonl with the field "prompt": one a line')
    about = "datastore to read from, or address of a retrieval server; needed unless --no-retrieval"
    parser.add_argument("--store", help=about)
    parser.add_argument("--no-retrieval", action="store_true", help="RETRO[OFF]")
    parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
    parser.add_argument("--index", metavar="I", help=f"{KINDS}; {OWN_INDEX}")
    parser.add_argument("--lookahead", type=int, metavar="N", help="search N tokens before a chunk ends; default 0")
    parser.add_argument("--gains", action="store_true", default=None, help="measure tokens' loss OFF - ON, in bits")
    parser.add_argument("--html", metavar="FILE", help="write one page: the texts, and beside them what they read")
    add_json(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts continued together; default 8")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 128, or what the model has room for")
    parser.add_argument("--do-sample", action="store_true", help="sample; default: the most likely token")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling; default 1")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this mass")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the likeliest N tokens; default 50")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling; default 0")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search over N texts; default: none")
    parser.add_argument("--num-return-sequences", type=int, metavar="N", help="texts for each prompt; default 1")
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="above 1 makes used tokens less likely")
    parser.add_argument("--stop", nargs="+", action="extend", metavar="STRING", help="a text ends after any of these")
    add_filters(parser)


def generate(args: argparse.Namespace) -> int:
    """Continue prompts, searching the store at the end of every chunk, and print the texts and what they could read.

    One prompt streams. Standard input is one prompt, whatever its lines.
    """
    from retro.text.prompts import read_prompts

    options = _generation_options(args)
    prompts = read_prompts(args.prompts, args.prompt_file, sys.stdin)

    import torch

    from retro.loading import load
    from retro.sampling import as_json, html_page, sample, terminal_stream, terminal_text, wants_color

    index, filters = args.index or "auto", given_filters(args)
    model, tokenizer, retriever = load(args.model, args.store, index=index, **filters)
    color = wants_color(sys.stdout)
    streams = len(prompts) == (args.num_beams or 1) == (args.num_return_sequences or 1) == 1
    if streams:
        options["streamer"] = terminal_stream(tokenizer, partial(print, end="", flush=True), color)
    torch.manual_seed(args.seed or 0)
    texts = sample(
        model, tokenizer, prompts, retriever, args.k, gains=bool(args.gains), batch_size=args.batch_size, **options
    )
    for number, text in enumerate(texts, start=1):
        print("\n" if streams else f"== text {number} of {len(texts)}")
        print(terminal_text(text, color, with_text=not streams))
    about = {"model": args.model}
    if retriever is not None:
        about |= {"store": args.store, "num_neighbors": args.k or model.config.num_neighbors}
        about["index"] = retriever.index.kind
    made_with = {} if retriever is None else stamp(retriever.store)
    write_json(args.json, {"texts": [as_json(text) for text in texts]} | about | made_with)
    if args.html:
        Path(args.html).write_text(html_page(texts, about), encoding="utf-8")
    return 0


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What Hugging Face's generate() is given; ValueError for what it would ignore."""
    if not args.store and not args.no_retrieval:
        raise ValueError("--store is missing; name a datastore, or say --no-retrieval.")
    for name in ("store", "k", "index", "lookahead", "gains", *FILTERS):
        if args.no_retrieval and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing beside --no-retrieval; leave one of them out.")
    if not args.do_sample:
        names = [name for name in ("temperature", "top_p", "top_k", "seed") if getattr(args, name) is not None]
        if names:
            raise ValueError(f"--{names[0].replace('_', '-')} needs --do-sample.")
        if (args.num_return_sequences or 1) > (args.num_beams or 1):
            raise ValueError("--num-return-sequences needs --do-sample, or as many --num-beams.")
    for file in (args.html, args.json):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"the folder of {file} is not there; make it first.")
    sampling = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "repetition_penalty")
    given = {name: getattr(args, name) for name in (*sampling, "max_new_tokens", "lookahead")}
    given["stop_strings"] = args.stop
    return {name: value for name, value in given.items() if value is not None}


# serve


def add_serve(verbs: Any) -> None:
    from retro.serve.limits import Limits

    parser = verb(verbs, "serve", serve, "an HTTP server: OpenAI's routes with sources, and a page for people")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument(
        "--store",
        required=True,
        action="append",
        metavar="[NAME=]STORE",
        help="datastore to read from; again for more to choose from, the first is the default; its name: the folder's",
    )
    parser.add_argument("--name", help="what the model is called; default: its folder's name")
    parser.add_argument("--index", default="auto", metavar="I", help=f"{KINDS}; {OWN_INDEX}")
    add_listening(parser, 8000)
    add_limits(parser, Limits)


def serve(args: argparse.Namespace) -> int:
    """Serve a model: /v1/completions, /v1/chat/completions, /v1/models, /v1/stores, /health, and a page at /.

    The field "retro" of an answer says what it read; that of a request takes "retrieval", "store" and "num_neighbors".
    """
    from retro.serve.limits import Limits

    limits = given_limits(args, Limits)
    try:
        from retro.serve.server import load_with_stores, serve_app
        from retro.web.listening import read_api_key, run, url_of
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[serve]".') from None
    from retro.serve.engine import GenerationEngine

    api_key = read_api_key(args.api_key_file)
    model, tokenizer, stores = load_with_stores(args.model, args.store, args.index)
    engine = GenerationEngine(model, tokenizer, stores, limits)
    name = args.name or Path(args.model).resolve().name
    app, bound = serve_app(engine, name, args.host, args.port, api_key)
    print(f"{name} with {', '.join(stores)}: {url_of(bound)}", flush=True)
    run(app, bound, limits.grace_seconds)
    return 0


# demo


def add_demo(verbs: Any) -> None:
    parser = verb(verbs, "demo", demo, "text to a trained RETRO, measured and sampled from, without any download")
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)


def demo(args: argparse.Namespace) -> int:
    """Build, train, measure and sample on the documentation of the Python packages installed here."""
    from retro.demo import run_demo

    print(run_demo(Path(args.output), args.seed))
    return 0
