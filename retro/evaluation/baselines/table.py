"""One table of what can be done with a store: every row over the same target tokens, each with its cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from retro.common.settings import to_plain
from retro.evaluation.baselines.bench import BaselineEvaluator, MethodScores
from retro.evaluation.baselines.methods import PlannedRow, fits_of, partners, plan_rows, resolved
from retro.evaluation.baselines.sample import Sample, check_targets, draw_sample
from retro.evaluation.bits import LITTLE_OVERLAP, bpb_interval, gain, measured_with, neighbors_of
from retro.evaluation.data import LEAKAGE_NEIGHBORS, overlap_of, prepare, window_of
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.settings import METHODS, BaselineSettings
from retro.retrieval import Retriever, Store
from retro.retrieval.filters import largest_shares
from retro.text.chunks import decode_chunks
from retro.text.documents import Document

NEAR_COPY = 0.5  # of the 13-grams of a held-out document in one of the store


def measure_baselines(
    models: Mapping[str, Any],
    documents: Sequence[Document],
    retriever: Retriever,
    reader: Any = None,
    validation: Sequence[Document] | None = None,
    settings: BaselineSettings | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Bits per byte and cost of every method over the same windows of held-out documents.

    The documents are read one after another, each by every row in turn, so that other work on the machine falls on
    all of them. Documents that share half or more of their word 13-grams with one of the store count in the first
    figures of a row, and not in those without near copies.

    Args:
        models: Models that read neighbors, and plain LMs beside them, by the names that they have in the table.
        retriever: Its `retrieved_len` is that of the models that have one.
        reader: The plain LM of the first row, which reads prompts; None: the base of the RETRO-fitted models, else the
            first plain LM.
        validation: Documents on which kNN-LM and REPLUG choose; none of them is in `documents`.

    Gives {"rows": one for each method, model and k, see `_about_row`, `Comparison.of`, `partners` and `_costs`;
    "tokens", "bytes", "windows", "documents", "near_copies": ids, "settings", "validation_tokens", "threads", "device",
    and what it was measured with}. Raises ValueError, before any work, for a method that cannot run with what is given.
    """
    if not isinstance(retriever.store, Store):
        raise ValueError("the retriever asks a server, which tells no costs; give one over a store of this machine.")
    settings = BaselineSettings() if settings is None else settings
    models, reader = _roles(models, reader, retriever)
    k = neighbors_of(next((one for one in models.values() if reads_neighbors(one)), reader), None)
    settings = resolved(settings, retriever, reader, k)
    planned = plan_rows(settings, models, reader, retriever, validation)
    present = [one for one in (*models.values(), reader) if one is not None]
    window_len, stride = window_of(present, retriever.store.chunk_len, settings.window_len, settings.stride)
    settings = replace(settings, window_len=window_len, stride=stride)
    _check_apart(documents, validation or ())
    sample = _sample(documents, retriever, settings)
    tuning = None if validation is None else _sample(validation, retriever, settings)
    parts = sample.parts()
    excluded = [document.id for document in (*documents, *(validation or ()))]
    bench = BaselineEvaluator(models, reader, retriever, settings, excluded, _typical(parts), progress)
    found = _measured(bench, planned, parts, tuning)
    log_p = {row: np.concatenate([one.log_p for one in of_row]) for row, of_row in found.items()}
    little, copies = _little_overlap(sample, retriever), _near_copies(documents, retriever.store)
    figures = Comparison(sample, log_p[planned[0]], little, copies, settings.seed)
    about = _about(sample, settings, tuning) | {"near_copies": figures.near_copies, "device": str(present[0].device)}
    rows = [
        _about_row(row, bench)
        | figures.of(log_p[row])
        | {"below": {name: figures.below(log_p[row], log_p[other]) for name, other in partners(row, planned).items()}}
        | _costs(found[row])
        for row in planned
    ]
    names = {"model": list(models), "lm": _name_of_reader(models, reader)}
    return about | {"rows": rows} | measured_with(None, retriever) | names


def _roles(models: Mapping[str, Any], reader: Any, retriever: Retriever) -> tuple[dict[str, Any], Any]:
    """The models beside the plain reader, and the reader; None where only models that read neighbors are given."""
    reading = {name: model for name, model in models.items() if reads_neighbors(model)}
    if reader is not None and reads_neighbors(reader):
        raise ValueError("the reader reads neighbors itself; give a plain LM.")
    for name, model in reading.items():
        if retriever.retrieved_len != model.config.retrieved_len:
            raise ValueError(
                f"retrieved_len is {retriever.retrieved_len} in the retriever, {model.config.retrieved_len} in {name}; "
                "make the retriever with the model's."
            )
    if reader is None:
        reader = _common_base(reading)
    plain = [name for name in models if name not in reading]
    if reader is None and plain:
        reader = models[plain[0]]
        return {name: model for name, model in models.items() if name != plain[0]}, reader
    return dict(models), reader


def _common_base(reading: Mapping[str, Any]) -> Any:
    """The base of the fitted models, that of the first; ValueError for fits of different ones."""
    fitted = {name: model for name, model in reading.items() if hasattr(model, "base")}
    bases = {model.config.base_name_or_path: name for name, model in fitted.items()}
    if len(bases) > 1:
        told = " and ".join(f"{name} of {base}" for base, name in bases.items())
        raise ValueError(f"the fitted models have several bases, {told}; give the one to compare with as reader.")
    return next((model.base for model in fitted.values()), None)


def _check_apart(documents: Sequence[Document], validation: Sequence[Document]) -> None:
    both = sorted({document.id for document in documents} & {document.id for document in validation})
    if both:
        raise ValueError(
            f"{len(both)} of the validation documents, {both[0]} among them, are evaluated too; give others."
        )


def _sample(documents: Sequence[Document], retriever: Retriever, settings: BaselineSettings) -> Sample:
    data = prepare(documents, retriever.store.tokenizer, retriever.store.chunk_len)
    return draw_sample(data, settings.window_len, settings.stride, settings.windows_per_document or None, settings.seed)


def _typical(parts: Sequence[Sample]) -> Sample:
    """The one with the median number of scored tokens."""
    return sorted(parts, key=lambda part: len(part.targets))[(len(parts) - 1) // 2]


def _measured(
    bench: BaselineEvaluator, rows: Sequence[PlannedRow], parts: Sequence[Sample], tuning: Sample | None
) -> dict[PlannedRow, list[MethodScores]]:
    """The scores of every row over every part, part after part."""
    found = {row: [] for row in rows}
    for part in tqdm(parts, desc="measuring", unit="document", disable=not bench.progress or None):
        for row in rows:
            one = bench.run(row, part, tuning)
            check_targets(part, one.targets)
            found[row].append(one)
        bench.forget(part)
    return found


def _little_overlap(sample: Sample, retriever: Retriever) -> Bool[np.ndarray, " c"]:
    """Which scored chunks have r(C) <= 12.5%, against the retriever's 10 nearest neighbors."""
    data = sample.data
    rows = sample.search(retriever, LEAKAGE_NEIGHBORS, data.scored.any(1))
    overlap = overlap_of(data, rows, retriever.store)
    return (overlap / data.lens <= LITTLE_OVERLAP) & data.scored.any(1)


def _near_copies(documents: Sequence[Document], store: Store) -> Bool[np.ndarray, " d"]:
    """Which documents share half or more of their word 13-grams with one of the store, of another id."""

    def stored() -> Iterator[Document]:
        for name, (first, count) in zip(store.document_ids, store.document_spans.tolist(), strict=True):
            if count:
                tokens = np.concatenate(store.token_lists(np.arange(first, first + count)))
                yield Document(name, decode_chunks(store.tokenizer, [tokens])[0])

    return largest_shares(documents, stored()) >= NEAR_COPY


@dataclass(frozen=True)
class Comparison:
    """How rows are compared over a sample.

    reference: log p of the row that all are compared with. little: the chunks with r(C) <= 12.5%. copies: the documents
    that are near copies of one of the store.
    """

    sample: Sample
    reference: Float[np.ndarray, " t"]
    little: Bool[np.ndarray, " c"]
    copies: Bool[np.ndarray, " d"]
    seed: int

    @property
    def near_copies(self) -> list[str]:
        """Ids of those that are in the sample."""
        present = np.unique(self.sample.document_of_window)
        return [self.sample.document_ids[document] for document in present[self.copies[present]]]

    def of(self, log_p: Float[np.ndarray, " t"]) -> dict[str, Any]:
        """Bits per byte, the share by which they are below the reference's, and both over the chunks with little
        overlap: of all documents and, where some are near copies and others not, of the others. Intervals are of 95%.
        """
        told = self._over(self.sample, log_p, self.reference)
        if 0 < len(self.near_copies) < len(np.unique(self.sample.document_of_window)):
            others = self.sample.of_documents(~self.copies)
            kept = np.isin(self.sample.chunks, others.numbers)
            told["without_near_copies"] = self._over(others, log_p[kept], self.reference[kept])
        return told

    def below(self, log_p: Float[np.ndarray, " t"], other: Float[np.ndarray, " t"]) -> dict[str, list[float]]:
        """By which share one row is below another over the same tokens: over all chunks, and over those with little
        overlap.
        """
        figures = self._over(self.sample, log_p, other)
        return {name: figures[name] for name in ("gain", "gain_little_overlap")}

    def _over(self, sample: Sample, log_p: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
        own, other, data = sample.chunk_scores(log_p), sample.chunk_scores(reference), sample.by_document
        little = self.little[sample.numbers]
        return {
            "bpb": own.bits_per_byte(data),
            "interval": bpb_interval(own, data, self.seed),
            "gain": gain(own, other, data, self.seed),
            "bpb_little_overlap": own.bits_per_byte(data, little),
            "gain_little_overlap": gain(own, other, data, self.seed, little),
        }


def _about_row(row: PlannedRow, bench: BaselineEvaluator) -> dict[str, Any]:
    """trained_weights: those of a model that reads neighbors which are not frozen."""
    model = bench.models.get(row.model)
    weights = None
    if model is not None and reads_neighbors(model):
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = row.model or _name_of_reader(bench.models, bench.reader)
    about = {"method": row.method, "label": METHODS[row.method][0], "model": name, "k": row.k}
    return about | {"trained_weights": weights}


def _name_of_reader(models: Mapping[str, Any], reader: Any) -> str | None:
    base = next(iter(fits_of(models, reader).values()), None)
    return base or (reader and (reader.config.name_or_path or type(reader).__name__))


def _costs(found: Sequence[MethodScores]) -> dict[str, Any]:
    """ms_per_token: of reading, the median over documents; search_ms_per_token likewise. flops: of reading, as counted
    over one document; search_flops: of searching, as far as it is counted (see retro.evaluation.baselines.costs).
    store_bytes: what is read at inference. Tokens are the scored ones.
    """
    tokens = [len(one.targets) for one in found]
    ms = lambda name: 1000 * median(getattr(one, name) / n for one, n in zip(found, tokens, strict=True))  # noqa: E731
    thousands = lambda name: sum(getattr(one, name) for one in found) / sum(tokens) * 1000  # noqa: E731
    return {
        "ms_per_token": ms("seconds"),
        "search_ms_per_token": ms("search_seconds"),
        "searches_per_1000_tokens": thousands("searches"),
        "flops_per_1000_tokens": max(one.flops / n for one, n in zip(found, tokens, strict=True)) * 1000,
        "search_flops_per_1000_tokens": thousands("search_flops"),
        "store_bytes": found[0].store_bytes,
        "chosen": found[0].chosen or {},
    }


def _about(sample: Sample, settings: BaselineSettings, tuning: Sample | None) -> dict[str, Any]:
    return {
        "documents": len(np.unique(sample.document_of_window)),
        "windows": len(sample.texts),
        "tokens": len(sample.targets),
        "bytes": int(sample.data.bytes_of_chunk.sum()),
        "validation_tokens": 0 if tuning is None else len(tuning.targets),
        "settings": to_plain(settings),
        "threads": torch.get_num_threads(),
    }
