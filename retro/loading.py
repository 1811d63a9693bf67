"""One way in: a model, its tokenizer and the retriever that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from retro.common.devices import find_device, find_dtype
from retro.provenance import check_store, own_index, read_provenance
from retro.retrieval import RemoteRetriever, Retriever, Store
from retro.retrieval.remote.client import RemoteStore, is_url
from retro.retrofit.bases import base_tokenizer, open_base


class Loaded(NamedTuple):
    """A causal LM in evaluation mode, its tokenizer, and what retrieves for it; without a store nothing does."""

    model: Any
    tokenizer: Any
    retriever: Retriever | RemoteRetriever | None


def load(
    model: Any,
    store: Any = None,
    *,
    index: Any = "auto",
    num_neighbors: int | None = None,
    embedder: Any = None,
    tokenizer: Any = None,
    base: Any = None,
    device: Any = None,
    dtype: Any = None,
    **filters: Any,
) -> Loaded:
    """A causal LM with its tokenizer and, over a store, the retriever that it reads with.

    Args:
        model: A trained RETRO, a RETRO-fitted or any other causal LM: a folder, a Hugging Face name, a GGUF file or
            "package:NAME"; or a model in memory.
        store: A `Store` or its folder, or the address of a retrieval server (`retro serve-store`), whose tokenizer must
            be the model's. None: RETRO[OFF], or a plain LM.
        index: The kind of search, see `Retriever`, or a search such as `open_sharded` gives. "auto" is the kind that
            the model was trained with if that is lexical, else the best one of the store.
        num_neighbors: k where a call does not say otherwise; default: the model's, or 2. r is always the model's.
        embedder: Of the queries; default: the one that the store names.
        tokenizer: Itself, its folder or its name. Default: the one beside the model, or, of a model in memory, the
            store's.
        base: Of a RETRO-fitted model: where its base lies, or the base itself, in the place of what its folder names.
        device: Default: the environment's RETRO_DEVICE, else the accelerator if there is one, else the CPU; a model in
            memory stays where it is.
        dtype: As in from_pretrained, or one of the names float32, bfloat16 and float16. Default: the environment's
            RETRO_DTYPE, else that in which the model was saved.
        filters: What is kept out of the neighbors, as for `Retriever`. A server has filters of its own.

    Raises ValueError for a model that cannot be loaded, for a store of another tokenizer or chunk length, for an index
    or a device that is not there, and for options that mean nothing without a store or beside a server.
    """
    given = filters | ({} if embedder is None else {"embedder": embedder})
    how = {name: value for name, value in (("dtype", dtype), ("base", base)) if value is not None}
    if store is None:
        for name in (*["index"] * (index != "auto"), *["num_neighbors"] * (num_neighbors is not None), *given):
            raise ValueError(f"{name} means nothing without a store; name a store to retrieve from.")
        return Loaded(*_model_and_tokenizer(model, None, tokenizer, device, how), None)
    if is_url(store):
        remote = open_retriever(store, index, **given)
        opened, tokenizer = _model_and_tokenizer(model, remote.store, tokenizer, device, how)
        remote.num_neighbors, remote.retrieved_len = _k_and_r(opened, remote.store, num_neighbors)
        return Loaded(opened, tokenizer, remote)
    store = store if isinstance(store, Store) else Store.open(store)
    opened, tokenizer = _model_and_tokenizer(model, store, tokenizer, device, how)
    k, r = _k_and_r(opened, store, num_neighbors)
    retriever = Retriever(store, own_index(_name_of(model), store, index), num_neighbors=k, retrieved_len=r, **given)
    return Loaded(opened, tokenizer, retriever)


def load_model(model: Any, store: Store | RemoteStore, *, device: Any = None, dtype: Any = None) -> Any:
    """The model alone, as `load` gives it for a store that is open, such as a plain LM beside a RETRO."""
    return _model_and_tokenizer(model, store, None, device, {} if dtype is None else {"dtype": dtype})[0]


def open_retriever(store: Any, index: Any = "auto", **given: Any) -> Retriever | RemoteRetriever:
    """A Retriever over a store, or a RemoteRetriever where `store` is the address of a retrieval server.

    given: as both take it, and what only a Retriever does: a server has an index, an embedder and filters of its own.
    """
    if not is_url(store):
        return Retriever(store, index, **given)
    both = ("num_neighbors", "retrieved_len")
    for name in (*["index"] * (index != "auto"), *(name for name in given if name not in both)):
        raise ValueError(f"{name} is for a store of this machine; give it to the `retro serve-store` of {store}")
    return RemoteRetriever(store, **given)


def _model_and_tokenizer(
    model: Any, store: Store | RemoteStore | None, tokenizer: Any, device: Any, how: dict[str, Any]
) -> tuple[Any, Any]:
    """Both; refused, before the weights are read where that can be known, for a store of another tokenizer."""
    named = isinstance(model, (str, Path))
    if not named and not hasattr(model, "config"):
        raise ValueError(f"{model!r} is no model; give a folder, a Hugging Face name or a causal LM in memory.")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = base_tokenizer(tokenizer)
    name = _name_of(model)
    recorded = store is not None and read_provenance(name) is not None
    if recorded:
        check_store(name, store)
    if tokenizer is None:
        tokenizer = _tokenizer_beside(name) if named or store is None else store.tokenizer
    if tokenizer is not None and store is not None and not recorded:
        store.check_tokenizer(tokenizer)
    opened = _opened(model, device, how)
    chunk_len = getattr(opened.config, "chunk_len", None)
    if tokenizer is None and (store is None or chunk_len is None):
        raise ValueError(f"{name or 'a model in memory'} comes without a tokenizer; give tokenizer=, or a store.")
    if store is not None and chunk_len not in (None, store.chunk_len):
        raise ValueError(
            f"the model {name} reads chunks of {chunk_len} tokens, the store {store.path} has chunks of "
            f"{store.chunk_len}; build a store with chunk_len={chunk_len}"
        )
    if tokenizer is None and not recorded:
        check_store(name, store)  # warns
    return opened, store.tokenizer if tokenizer is None else tokenizer


def _opened(model: Any, device: Any, how: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    named = isinstance(model, (str, Path))
    if named and Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} holds no model (config.json is missing); give the folder of a trained model.")
    if "base" in how and not (named and PreTrainedConfig.get_config_dict(model)[0].get("model_type") == "retrofit"):
        raise ValueError(f"base is for a RETRO-fitted model that is loaded here, and {model!r} is none; leave it out.")
    place = find_device(device) if named or device is not None else None
    if named or "dtype" in how:
        dtype = find_dtype(how.get("dtype"))
        how = how if dtype is None else {**how, "dtype": dtype}
    opened = open_base(model, **how).eval()
    return opened if place is None else opened.to(place)


def _tokenizer_beside(name: str | None) -> Any:
    try:
        return None if name is None else base_tokenizer(name)
    except ValueError:
        return None


def _name_of(model: Any) -> str | None:
    """What a model was loaded by; None of one that was made in memory."""
    return str(model) if isinstance(model, (str, Path)) else getattr(model.config, "name_or_path", "") or None


def _k_and_r(model: Any, store: Store | RemoteStore, num_neighbors: int | None) -> tuple[int, int]:
    """k as given, else the model's; r of the model, else a chunk and the one that follows it."""
    k = getattr(model.config, "num_neighbors", None) or 2 if num_neighbors is None else num_neighbors
    return k, getattr(model.config, "retrieved_len", None) or 2 * store.chunk_len
