"""The verb of the retrieval server: serve-store."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from retro.cli.shared import (
    KINDS,
    add_filters,
    add_limits,
    add_listening,
    given_filters,
    given_limits,
    verb,
)


def add_serve_store(verbs: Any) -> None:
    from retro.retrieval.remote.limits import RetrievalLimits

    parser = verb(verbs, "serve-store", serve_store, "a retrieval server, for trainers and samplers on other machines")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("--index", default="auto", metavar="I", help=f"{KINDS}; default: auto")
    parser.add_argument(
        "--k", type=int, default=2, metavar="N", help="neighbors, where a client does not say; default 2"
    )
    about = "tokens of a neighbor and what follows it, where a client does not say; default 128"
    parser.add_argument("--retrieved-len", type=int, default=128, metavar="R", help=about)
    shards = parser.add_argument_group("shards", "a search that is spread over the nodes of a Ray cluster")
    shards.add_argument("--shards", type=int, metavar="N", help="spread it over N actors")
    shards.add_argument("--ray-address", metavar="A", help="of the cluster; default: RAY_ADDRESS, else a local one")
    about = "answer without shards that are missing, and say how many answered; default: an error"
    shards.add_argument("--partial", action="store_true", default=None, help=about)
    add_listening(parser, 8001)
    add_filters(parser)
    add_limits(parser, RetrievalLimits)


def serve_store(args: argparse.Namespace) -> int:
    """Serve the searches of a datastore; its address can be given wherever a command takes --store to retrieve from.

    From Python: RemoteRetriever(address), in place of a Retriever.
    """
    from retro.retrieval import Retriever
    from retro.retrieval.remote.limits import RetrievalLimits

    for name in ("ray_address", "partial"):
        if args.shards is None and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} means nothing without --shards; give the number of shards.")
    limits = given_limits(args, RetrievalLimits)
    try:
        from retro.retrieval.remote.server import create_retrieval_app
        from retro.web.listening import listen, names_of, read_api_key, run, url_of
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[serve]".') from None
    api_key = read_api_key(args.api_key_file)
    with ExitStack() as opened:
        given = dict(num_neighbors=args.k, retrieved_len=args.retrieved_len, **given_filters(args))
        retriever = Retriever(*_searched(args, limits, opened), **given)
        bound = listen(args.host, args.port)
        app = create_retrieval_app(retriever, limits, api_key, names_of(bound, args.host, api_key))
        print(f"{args.store} ({retriever.index.kind}): {url_of(bound)}", flush=True)
        run(app, bound, limits.grace_seconds)
    return 0


def _searched(args: argparse.Namespace, limits: Any, opened: ExitStack) -> tuple[Any, Any]:
    """The store and its index: a kind, or a search over shards."""
    from retro.retrieval import Store
    from retro.retrieval.remote.client import is_url

    if is_url(args.store):
        raise ValueError(f"{args.store} is served already; give the folder of a store.")
    store = Store.open(args.store)
    if args.shards is None:
        return store, args.index
    from retro.retrieval.search.sharded import open_sharded

    seconds = 0.8 * limits.max_seconds  # so that an error that names shards comes before that of the request
    given = dict(timeout=seconds, partial=bool(args.partial), address=args.ray_address)
    return store, opened.enter_context(open_sharded(store, args.index, args.shards, **given))
