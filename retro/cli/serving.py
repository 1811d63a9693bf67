"""The verbs of serving: serve, serve-store."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Unpack

from cyclopts import Group, Parameter

from retro.cli.options import options, taken
from retro.cli.shared import ApiKeyFile, Base, Host, IndexKind, ModelFolder, OwnIndex, Port, StoreFolder, use_device
from retro.common.devices import DeviceSettings
from retro.common.extras import check_installed
from retro.retrieval.filters.hits import QueryFilters
from retro.retrieval.remote.limits import RetrievalLimits
from retro.serve.limits import GenerationLimits

ServeStoreOptions = options(RetrievalLimits, QueryFilters, DeviceSettings, without=["against"])
SHARDS = Parameter(group=Group("Shards", "A search that is spread over the nodes of a Ray cluster."))


def serve(
    model: ModelFolder,
    /,
    *,
    store: list[str],
    name: str | None = None,
    index: OwnIndex = None,
    base: Base = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: ApiKeyFile = None,
    **limits: Unpack[options(GenerationLimits, DeviceSettings)],
) -> None:
    """Serve a model over HTTP: OpenAI's routes with sources, and a page for people.

    The routes are /v1/completions, /v1/chat/completions, /v1/models, /v1/stores and /health, and the page is at /. The
    field "retro" of an answer says what it read; that of a request takes "retrieval", "store" and "num_neighbors".

    Arguments:
        store: Folders of datastores to read from, or addresses of retrieval servers; a request may choose, the first is
            the default. NAME=FOLDER gives a store a name other than its folder's.
        name: Name by which requests call the model. Default: its folder's.
    """
    use_device(limits)
    taken_on = GenerationLimits(**limits)
    for library in ("fastapi", "uvicorn"):
        check_installed(library, "retro serve")
    from retro.evaluation.scorer import reads_neighbors
    from retro.serve.engine import Engine
    from retro.serve.server import load_with_stores, serve_app
    from retro.web.listening import read_api_key, run, url_of

    api_key = read_api_key(api_key_file)
    opened, tokenizer, stores = load_with_stores(model, store, index or "auto", base)
    if not reads_neighbors(opened):
        raise ValueError(f"{model} reads no neighbors; serve a RETRO, or a model that was fitted for them.")
    engine = Engine(opened, tokenizer, stores, taken_on)
    name = name or Path(model).resolve().name
    served, bound = serve_app(engine, name, host, port, api_key)
    print(f"{name} with {', '.join(stores)}: {url_of(bound)}", flush=True)
    run(served, bound, taken_on.grace_seconds)


def serve_store(
    store: StoreFolder,
    /,
    *,
    index: IndexKind = "auto",
    k: int = 2,
    retrieved_len: int = 128,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    api_key_file: ApiKeyFile = None,
    shards: Annotated[int | None, SHARDS] = None,
    ray_address: Annotated[str | None, SHARDS] = None,
    partial: Annotated[bool, SHARDS] = False,
    **given: Unpack[ServeStoreOptions],
) -> None:
    """Serve the searches of a datastore, for trainers and samplers on other machines.

    Its address can be given wherever a command takes --store to retrieve from. From Python: RemoteRetriever(address),
    in place of a Retriever.

    Arguments:
        k: Neighbors of a query, where a client does not say.
        retrieved_len: Tokens of a neighbor and what follows it, where a client does not say.
        shards: Actors over which the search is spread. Default: it stays in this process.
        ray_address: Address of the Ray cluster. Default: the environment's RAY_ADDRESS, else a local one.
        partial: Answer without shards that are missing, and say how many answered; without this it is an error.
    """
    for name, value in (("ray-address", ray_address), ("partial", partial or None)):
        if shards is None and value is not None:
            raise ValueError(f"--{name} means nothing without --shards; give the number of shards.")
    use_device(given)
    limits = RetrievalLimits(**taken(given, RetrievalLimits))
    for library in ("fastapi", "uvicorn"):
        check_installed(library, "retro serve-store")
    from retro.retrieval import Retriever, Store, open_sharded
    from retro.retrieval.remote.client import is_url
    from retro.retrieval.remote.server import create_retrieval_app
    from retro.web.listening import listen, names_of, read_api_key, run, url_of

    if is_url(store):
        raise ValueError(f"{store} is served already; give the folder of a store.")
    api_key, opened, searched = read_api_key(api_key_file), Store.open(store), nullcontext(index)
    if shards is not None:
        seconds = 0.8 * limits.max_seconds  # so that an error that names shards comes before that of the request
        searched = open_sharded(opened, index, shards, timeout=seconds, partial=partial, address=ray_address)
    with searched as search:
        retriever = Retriever(opened, search, num_neighbors=k, retrieved_len=retrieved_len, **given)
        bound = listen(host, port)
        served = create_retrieval_app(retriever, limits, api_key, names_of(bound, host, api_key))
        print(f"{store} ({retriever.index.kind}): {url_of(bound)}", flush=True)
        run(served, bound, limits.grace_seconds)
