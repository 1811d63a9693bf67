"""The methods by name, what each needs, and the choices of a measurement."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from retro.common.settings import unknown_name
from retro.evaluation.baselines.prompting import check_room
from retro.text.documents import Document

if TYPE_CHECKING:
    from retro.retrieval import Retriever

log = logging.getLogger(__name__)
READER, RETRO, PROMPT, VALIDATION, BM25 = "reader", "retro", "prompt", "validation", "bm25s"
METHODS = {
    "lm": ("LM", {READER}),
    "retro_off": ("RETRO[OFF]", {RETRO}),
    "retro_on": ("RETRO[ON]", {RETRO}),
    "retro_on_random": ("RETRO[ON], random", {RETRO}),
    "retro_on_bm25": ("RETRO[ON], BM25", {RETRO, BM25}),
    "retro_on_tfidf": ("RETRO[ON], TF-IDF", {RETRO}),
    "retro_on_oracle": ("RETRO[ON], oracle (bound)", {RETRO}),
    "prepend": ("in-context, prepended", {READER, PROMPT}),
    "replug": ("REPLUG", {READER, PROMPT}),
    "rag_token": ("RAG-token", {READER, PROMPT}),
    "rag_sequence": ("RAG-sequence", {READER, PROMPT}),
    "knn_lm": ("kNN-LM", {READER, VALIDATION}),
}
_AT_LEAST_1 = ("prompt_neighbors", "retrieval_stride", "query_len", "windows_per_document", "oracle_candidates")


@dataclass(frozen=True)
class BaselineSettings:
    """What is measured and how.

    methods: Names of METHODS; None takes all that can run. The first row, LM or RETRO[OFF], is always there.
    num_neighbors: k; None is the model's.
    prompt_neighbors: Documents put in front together, at most k; None is k, or as many as there is room for.
    retrieval_stride, query_len: Tokens between two searches, and in a query, of in-context retrieval and REPLUG; None
        is the chunk length, which RETRO and RAG always have.
    windows_per_document: None takes all.
    window_len, stride: See `window_of`.
    oracle_candidates: Ranked for each chunk.
    temperature, replug_temperatures: REPLUG's, and those that validation data chooses from.
    knn_tokens: Keys of kNN-LM, drawn with the seed; None takes the whole store.
    knn_ks, knn_temperatures, knn_weights: The grid for k, T (in units of the expected squared distance of two keys)
        and lambda.
    """

    methods: tuple[str, ...] | None = None
    num_neighbors: int | None = None
    prompt_neighbors: int | None = None
    retrieval_stride: int | None = None
    query_len: int | None = None
    windows_per_document: int | None = 4
    window_len: int | None = None
    stride: int | None = None
    oracle_candidates: int = 50
    temperature: float = 1.0
    replug_temperatures: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    knn_tokens: int | None = None
    knn_ks: tuple[int, ...] = (8, 32, 128, 1024)
    knn_temperatures: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    knn_weights: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.methods or ():
            if name not in METHODS:
                raise ValueError(unknown_name(name, METHODS, "method"))
        for name in (*_AT_LEAST_1, "knn_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")
        temperatures = (self.temperature, *self.replug_temperatures, *self.knn_temperatures)
        if min(temperatures) <= 0:
            raise ValueError(f"a temperature is {min(temperatures)}; give numbers above 0.")
        if min(self.knn_weights) < 0 or max(self.knn_weights) >= 1:
            raise ValueError(f"knn_weights are {list(self.knn_weights)}; give numbers from 0 to below 1.")
        if min(self.knn_ks) < 1:
            raise ValueError(f"knn_ks are {list(self.knn_ks)}; give at least 1.")


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
