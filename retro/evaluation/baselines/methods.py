"""Which rows there are, and the choices of a measurement."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from retro.evaluation.baselines.prompting import check_room
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.settings import BM25, METHODS, PROMPT, PROTOCOL, READER, RETRO, VALIDATION, BaselineSettings
from retro.text.documents import Document

if TYPE_CHECKING:
    from retro.retrieval import Retriever

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRow:
    """A row: a method, the model that it runs, by name (None: the reader), and its k, if it has any."""

    method: str
    model: str | None = None
    k: int | None = None


def resolved(settings: BaselineSettings, retriever: Retriever, reader: Any, k: int) -> BaselineSettings:
    """The choices that were left open, made. ValueError for those that do not fit store or reader.

    k: the number of neighbors where none is given.
    """
    m, ks = retriever.store.chunk_len, tuple(dict.fromkeys(settings.num_neighbors or (k,)))
    prompt, stride = tuple(dict.fromkeys(settings.prompt_neighbors or ())), settings.retrieval_stride or m
    for name, given in (("num_neighbors", ks), ("prompt_neighbors", prompt)):
        if max(given, default=0) > retriever.index.num_rows:
            raise ValueError(f"{name} is {max(given)}; the store has {retriever.index.num_rows} chunks to retrieve.")
    if m % stride:
        raise ValueError(f"retrieval_stride is {stride}; it must divide the chunk length {m}.")
    if not prompt:
        positions = None if reader is None else num_positions(reader)
        most = max(ks) if positions is None else max(1, (positions - m - 1) // retriever.retrieved_len)
        prompt = tuple(dict.fromkeys(min(k, most) for k in ks))
    made = dict(num_neighbors=ks, prompt_neighbors=prompt, retrieval_stride=stride, query_len=settings.query_len or m)
    return replace(settings, **made)


def plan_rows(
    settings: BaselineSettings,
    models: Mapping[str, Any],
    reader: Any,
    retriever: Retriever,
    validation: Sequence[Document] | None,
) -> list[PlannedRow]:
    """The rows, the one that the others are compared with first, then plain LMs, each model with all of its rows, and
    the other methods; ValueError, in one sentence, for a method that was asked for and cannot run.

    models: those beside the reader. settings: `resolved`.
    """
    lacking = _lacking(models, reader, retriever, validation)
    rows, wanted = [], settings.methods
    for name, (label, needs) in METHODS.items():
        lacks = [lacking[need] for need in sorted(needs) if need in lacking]
        first = name == ("retro_off" if reader is None else "lm")
        if lacks and wanted is not None and name in wanted:
            raise ValueError(f"{label} ({name}) needs {lacks[0]}.")
        if lacks and wanted is None and name in PROTOCOL:
            log.warning("left out: %s needs %s", label, lacks[0])
        if not lacks and (first or name in (PROTOCOL if wanted is None else wanted)):
            rows += _rows_of(name, settings, models, reader)
    if any(PROMPT in METHODS[row.method][1] for row in rows):
        together = max((row.k for row in rows if row.method == "prepend"), default=1)
        check_room(together * retriever.retrieved_len, retriever.store.chunk_len, num_positions(reader))
    places = {name: place for place, name in enumerate(models)}
    place_of = lambda row: places[row.model] if RETRO in METHODS[row.method][1] else len(places)  # noqa: E731
    return sorted(rows, key=lambda row: -1 if row.method == "lm" else place_of(row))


def partners(row: PlannedRow, rows: Sequence[PlannedRow]) -> dict[str, PlannedRow]:
    """The rows that one with true neighbors is held against, of those there are: "random", the same with random
    neighbors, and "prompt", the base with as many in its prompt.
    """
    if row.k is None or row.method.endswith("_random"):
        return {}
    random = "prepend_random" if row.method == "prepend" else "retro_on_random"
    wanted = {"random": replace(row, method=random), "prompt": PlannedRow("prepend", None, row.k)}
    return {name: other for name, other in wanted.items() if other in rows and other != row}


def _rows_of(name: str, settings: BaselineSettings, models: Mapping[str, Any], reader: Any) -> Iterator[PlannedRow]:
    """A row for each model and k that the method has."""
    needs = METHODS[name][1]
    if name == "lm":
        yield from [PlannedRow(name)] * (reader is not None)
        yield from (PlannedRow(name, model) for model, one in models.items() if not reads_neighbors(one))
    elif PROMPT in needs:
        yield from (PlannedRow(name, None, k) for k in settings.prompt_neighbors)
    elif RETRO not in needs:
        yield PlannedRow(name)
    else:
        for model, one in models.items():
            known = name == "retro_off" and settings.methods is None and model in fits_of(models, reader)
            if reads_neighbors(one) and not known:
                ks = [None] if name == "retro_off" else settings.num_neighbors
                yield from (PlannedRow(name, model, k) for k in ks)


def _lacking(models: Mapping[str, Any], reader: Any, retriever: Retriever, validation: Any) -> dict[str, str]:
    """Needs that are not met, and how to meet them. ValueError for a reader that cannot read the store."""
    lacking = {}
    if reader is None:
        lacking |= dict.fromkeys((READER, PROMPT), "a plain LM of the store's tokenizer; give one as reader")
    else:
        rows, tokens = reader.get_input_embeddings().weight.shape[0], retriever.store.num_embeddings
        if rows < tokens:
            raise ValueError(
                f"the reader has {rows} embeddings, the store's tokenizer {tokens} tokens; "
                "give a reader of the store's tokenizer."
            )
        positions, least = num_positions(reader), retriever.retrieved_len + retriever.store.chunk_len
        if positions is not None and positions <= least:
            lacking[PROMPT] = f"a plain LM of more than {least} positions; the reader has {positions}"
    if not any(reads_neighbors(model) for model in models.values()):
        lacking[RETRO] = "a model that reads neighbors; give a RETRO"
    if validation is None:
        lacking[VALIDATION] = "validation documents, on which its lambda, T and k are chosen; give some"
    if find_spec("bm25s") is None:
        lacking[BM25] = "bm25s, which is not installed; pip install retro-lm[bm25]"
    return lacking


def fits_of(models: Mapping[str, Any], reader: Any) -> dict[str, str | None]:
    """The models whose base is the reader, or is called as it is, and where that base is loaded from."""
    bases = {name: model.config.base_name_or_path for name, model in models.items() if hasattr(model, "base")}
    its = {bases[name] for name in bases if models[name].base is reader}
    return {name: base for name, base in bases.items() if models[name].base is reader or (base and base in its)}


def num_positions(reader: Any) -> int | None:
    """The longest text that a reader takes; None where its configuration names none."""
    return getattr(reader.config.get_text_config(), "max_position_embeddings", None)
