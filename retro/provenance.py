"""What a trained folder says about where it comes from: `retro.json`, and the check that a store fits it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro.common.files import load_json, save_json
from retro.common.values import Prefix, Size, check_record
from retro.version import __version__

if TYPE_CHECKING:
    from retro.retrieval import Store

FILE = "retro.json"
_FIELDS = {"tokenizer": Prefix, "tokenizer_fingerprint": str, "chunk_len": Size}
logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """The versions that a result or a checkpoint was made with."""
    from importlib.metadata import version  # importing torch takes seconds

    return {"retro": __version__, "torch": version("torch"), "transformers": version("transformers")}


def describe(store: Store, index: str | None = None) -> dict[str, Any]:
    """What a model trained on `store` records: fingerprints of store and tokenizer, embedder, the library's version.

    index: the kind of search that found the neighbors it was trained with; None if it had none.
    """
    return {
        "library_version": __version__,
        "store": Path(store.path).name,
        "store_fingerprint": store.fingerprint,
        "tokenizer": store.manifest["tokenizer"]["name"],
        "tokenizer_fingerprint": store.tokenizer_fingerprint,
        "embedder": store.manifest["embedder"],
        "index": index,
        "chunk_len": store.chunk_len,
    }


def write_provenance(model_folder: str | Path, store: Store, index: str | None = None) -> None:
    """Write `retro.json` into a model folder; for `index` see `describe`."""
    save_json(Path(model_folder) / FILE, describe(store, index))


def read_provenance(model: str | Path | None) -> dict[str, Any] | None:
    """The content of the `retro.json` of a model's folder or Hugging Face name; ValueError if it is unreadable.

    None if it has none, or the model no name.
    """
    file = None if model is None else _file_of(model)
    if file is None:
        return None
    return check_record(file, load_json(file), _FIELDS)


def _file_of(model: str | Path) -> Path | None:
    file = Path(model) / FILE
    if file.parent.exists():
        return file if file.is_file() else None
    from transformers.utils import cached_file

    missing = ("missing_entries", "connection_errors", "gated_repo")
    try:
        found = cached_file(str(model), FILE, **{f"_raise_exceptions_for_{what}": False for what in missing})
    except OSError:  # no name of the hub
        return None
    return None if found is None else Path(found)


def own_index(model: str | Path | None, store: Store, index: Any = "auto") -> Any:
    """What "auto" means for a model: the kind of search it was trained with, if that is lexical, and its second stage.

    Kinds that go by keys find the same neighbors, each as far as it is tuned to: there the store's best stays "auto".
    In a store without keys only what is lexical is kept.
    """
    from retro.retrieval.search.lexical import KINDS
    from retro.retrieval.search.searchers import is_keyless

    trained = (read_provenance(model) or {}).get("index") if index == "auto" else None
    first, separator, second = (trained or "").partition(">")
    kinds = first.split("+")
    if set(kinds) & set(KINDS):
        first = "+".join(kind for kind in kinds if kind in KINDS or not is_keyless(store))
    elif separator:
        first = "auto"
    else:
        return index
    own = f"{first}{separator}{second}"
    logger.info("%s is searched by %s, as in the training of %s", store.path, own, model)
    return own


def check_store(model: str | Path, store: Store) -> None:
    """Refuse a store that a model cannot read: another tokenizer's, or one of another chunk length.

    Any store of the same tokenizer will do, larger or newer than that of training. A folder without `retro.json` passes
    with a warning. Raises ValueError that names both sides.
    """
    mine = read_provenance(model)
    if mine is None:
        logger.warning("%s has no %s: whether its tokenizer is the one of %s is not checked", model, FILE, store.path)
        return
    if mine["tokenizer_fingerprint"] != store.tokenizer_fingerprint:
        raise ValueError(
            f"the model {model} was trained with the tokenizer {mine['tokenizer']} "
            f"({mine['tokenizer_fingerprint'][:12]}), the store {store.path} was built with "
            f"{store.manifest['tokenizer']['name']} ({store.tokenizer_fingerprint[:12]}); "
            "build a store with the model's tokenizer"
        )
    if mine["chunk_len"] != store.chunk_len:
        raise ValueError(
            f"the model {model} reads chunks of {mine['chunk_len']} tokens, the store {store.path} has "
            f"chunks of {store.chunk_len}; build a store with chunk_len={mine['chunk_len']}"
        )
