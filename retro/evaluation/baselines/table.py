"""One table of what can be done with a store: every row over the same target tokens, each with its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retro.common.settings import to_plain
from retro.evaluation.baselines.bench import BaselineEvaluator, MethodScores
from retro.evaluation.baselines.methods import plan_methods, resolved
from retro.evaluation.baselines.sample import Sample, check_targets, draw_sample
from retro.evaluation.bits import LITTLE_OVERLAP, ChunkScores, bpb_interval, gain, measured_with, neighbors_of
from retro.evaluation.data import LEAKAGE_NEIGHBORS, overlap_of, prepare, window_of
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.settings import METHODS, BaselineSettings
from retro.retrieval import Retriever, Store
from retro.text.documents import Document


def measure_baselines(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    reader: Any = None,
    validation: Sequence[Document] | None = None,
    settings: BaselineSettings | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Bits per byte and cost of every method over the same windows of held-out documents.

    Args:
        model: One that reads neighbors, or a plain LM, which is then the reader.
        retriever: Its `retrieved_len` is that of the model, where the model has one.
        reader: The plain LM of the first row, which reads prompts; None: the base of a RETRO-fitted model.
        validation: Documents on which kNN-LM and REPLUG choose; none of them is in `documents`.

    Gives {"rows": one for each method, see `_row`; "tokens", "bytes", "windows", "documents", "chunks_little_overlap",
    "window_len", "stride", "settings", "validation_tokens", and what it was measured with}. Raises ValueError, before
    any work, for a method that cannot run with what is given.
    """
    if not isinstance(retriever.store, Store):
        raise ValueError("the retriever asks a server, which tells no costs; give one over a store of this machine.")
    settings = BaselineSettings() if settings is None else settings
    model, reader = _roles(model, reader, retriever)
    k = neighbors_of(reader if model is None else model, settings.num_neighbors)
    settings = resolved(settings, retriever, reader, k)
    names = plan_methods(settings, model, reader, retriever, validation)
    present = [one for one in (model, reader) if one is not None]
    window_len, stride = window_of(present, retriever.store.chunk_len, settings.window_len, settings.stride)
    settings = replace(settings, window_len=window_len, stride=stride)
    _check_apart(documents, validation or ())
    sample = _sample(documents, retriever, settings)
    tuning = None if validation is None else _sample(validation, retriever, settings)
    excluded = [document.id for document in (*documents, *(validation or ()))]
    bench = BaselineEvaluator(model, reader, retriever, settings, excluded, progress)
    scored = {name: bench.run(name, sample, tuning) for name in names}
    for found in scored.values():
        check_targets(sample, found.targets)
    rows = _rows(scored, sample, _little_overlap(sample, retriever), settings.seed)
    return _about(sample, settings, tuning) | {"rows": rows} | measured_with(model, retriever, reader)


def _roles(model: Any, reader: Any, retriever: Retriever) -> tuple[Any, Any]:
    """The model that reads neighbors and the plain reader; one of them may be None."""
    if not reads_neighbors(model):
        if reader is not None:
            raise ValueError("the model reads no neighbors, so that there would be two plain LMs; leave one out.")
        return None, model
    if reader is not None and reads_neighbors(reader):
        raise ValueError("the reader reads neighbors itself; give a plain LM.")
    if retriever.retrieved_len != model.config.retrieved_len:
        raise ValueError(
            f"retrieved_len is {retriever.retrieved_len} in the retriever, {model.config.retrieved_len} in the model; "
            "make the retriever with the model's."
        )
    return model, getattr(model, "base", None) if reader is None else reader


def _check_apart(documents: Sequence[Document], validation: Sequence[Document]) -> None:
    both = sorted({document.id for document in documents} & {document.id for document in validation})
    if both:
        raise ValueError(
            f"{len(both)} of the validation documents, {both[0]} among them, are evaluated too; give others."
        )


def _sample(documents: Sequence[Document], retriever: Retriever, settings: BaselineSettings) -> Sample:
    data = prepare(documents, retriever.store.tokenizer, retriever.store.chunk_len)
    return draw_sample(data, settings.window_len, settings.stride, settings.windows_per_document or None, settings.seed)


def _little_overlap(sample: Sample, retriever: Retriever) -> np.ndarray:
    """Which scored chunks have r(C) <= 12.5%, against the retriever's 10 nearest neighbors."""
    data = sample.data
    rows = sample.search(retriever, LEAKAGE_NEIGHBORS, data.scored.any(1))
    overlap = overlap_of(data, rows, retriever.store)
    return (overlap / data.lens <= LITTLE_OVERLAP) & data.scored.any(1)


def _rows(scored: dict[str, MethodScores], sample: Sample, little: np.ndarray, seed: int) -> list[dict[str, Any]]:
    scores = {name: sample.chunk_scores(found.log_p, found.seconds) for name, found in scored.items()}
    reference = next(iter(scores.values()))
    return [_row(name, scored[name], scores[name], reference, sample, little, seed) for name in scored]


def _row(
    name: str,
    found: MethodScores,
    scores: ChunkScores,
    reference: ChunkScores,
    sample: Sample,
    little: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Bits per byte with a 95% interval over documents, change against the first row with the same, and the cost.

    searches: those for the scored tokens. flops: of reading; search_flops: of searching, as far as it is counted (see
    retro.evaluation.baselines.costs). store_bytes: what is read at inference.
    """
    data, thousands = sample.by_document, len(sample.targets) / 1000
    value, low, high = gain(scores, reference, data, seed)
    return {
        "method": name,
        "label": METHODS[name][0],
        "bpb": scores.bits_per_byte(data),
        "interval": bpb_interval(scores, data, seed),
        "change": 0.0 - value,
        "change_interval": [0.0 - high, 0.0 - low],
        "bpb_little_overlap": scores.bits_per_byte(data, little),
        "seconds_per_1000_tokens": found.seconds / thousands,
        "search_seconds_per_1000_tokens": found.search_seconds / thousands,
        "searches_per_1000_tokens": found.searches / thousands,
        "flops_per_1000_tokens": found.flops / thousands,
        "search_flops_per_1000_tokens": found.search_flops / thousands,
        "store_bytes": found.store_bytes,
        "chosen": found.chosen or {},
    }


def _about(sample: Sample, settings: BaselineSettings, tuning: Sample | None) -> dict[str, Any]:
    return {
        "documents": len(np.unique(sample.document_of_window)),
        "windows": len(sample.texts),
        "tokens": len(sample.targets),
        "bytes": int(sample.data.bytes_of_chunk.sum()),
        "validation_tokens": 0 if tuning is None else len(tuning.targets),
        "settings": to_plain(settings),
    }
