"""Which methods run, and the choices of a measurement."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from retro.evaluation.baselines.prompting import check_room
from retro.evaluation.settings import BM25, METHODS, PROMPT, READER, RETRO, VALIDATION, BaselineSettings
from retro.text.documents import Document

if TYPE_CHECKING:
    from retro.retrieval import Retriever

log = logging.getLogger(__name__)


def resolved(settings: BaselineSettings, retriever: Retriever, reader: Any, k: int) -> BaselineSettings:
    """The choices that were left open, made. ValueError for those that do not fit store or reader."""
    m = retriever.store.chunk_len
    if k > retriever.index.num_rows:
        raise ValueError(f"num_neighbors is {k}; the store has {retriever.index.num_rows} chunks to retrieve.")
    prompt, stride = settings.prompt_neighbors, settings.retrieval_stride or m
    if m % stride:
        raise ValueError(f"retrieval_stride is {stride}; it must divide the chunk length {m}.")
    if prompt is not None and prompt > k:
        raise ValueError(f"prompt_neighbors is {prompt}, more than the {k} neighbors searched; give at most {k}.")
    if prompt is None:
        positions = None if reader is None else num_positions(reader)
        prompt = k if positions is None else max(1, min(k, (positions - m - 1) // retriever.retrieved_len))
    made = dict(num_neighbors=k, prompt_neighbors=prompt, retrieval_stride=stride, query_len=settings.query_len or m)
    return replace(settings, **made)


def plan_methods(
    settings: BaselineSettings, model: Any, reader: Any, retriever: Retriever, validation: Sequence[Document] | None
) -> list[str]:
    """The methods to run, the first row first; ValueError, in one sentence, for one that was asked for and cannot.

    settings: `resolved`.
    """
    lacking = _lacking(model, reader, retriever, validation)
    names, wanted = [], settings.methods
    for name, (label, needs) in METHODS.items():
        lacks = [lacking[need] for need in sorted(needs) if need in lacking]
        first = name == ("retro_off" if reader is None else "lm")
        if lacks and wanted is not None and name in wanted:
            raise ValueError(f"{label} ({name}) needs {lacks[0]}.")
        if lacks and wanted is None:
            log.warning("left out: %s needs %s", label, lacks[0])
        if not lacks and (wanted is None or name in wanted or first):
            names.append(name)
    if any(PROMPT in METHODS[name][1] for name in names):
        together = settings.prompt_neighbors if "prepend" in names else 1
        check_room(together * retriever.retrieved_len, retriever.store.chunk_len, num_positions(reader))
    return names


def _lacking(model: Any, reader: Any, retriever: Retriever, validation: Any) -> dict[str, str]:
    """Needs that are not met, and how to meet them. ValueError for a reader that cannot read the store."""
    lacking = {}
    if reader is None:
        lacking |= dict.fromkeys((READER, PROMPT), "a plain LM of the store's tokenizer; give one as reader")
    else:
        rows, tokens = reader.get_input_embeddings().weight.shape[0], len(retriever.store.tokenizer)
        if rows < tokens:
            raise ValueError(
                f"the reader has {rows} embeddings, the store's tokenizer {tokens} tokens; "
                "give a reader of the store's tokenizer."
            )
    if model is None:
        lacking[RETRO] = "a model that reads neighbors; give a RETRO"
    if validation is None:
        lacking[VALIDATION] = "validation documents, on which its lambda, T and k are chosen; give some"
    if find_spec("bm25s") is None:
        lacking[BM25] = "bm25s, which is not installed; pip install retro-lm[bm25]"
    return lacking


def num_positions(reader: Any) -> int | None:
    """The longest text that a reader takes; None where its configuration names none."""
    return getattr(reader.config.get_text_config(), "max_position_embeddings", None)
