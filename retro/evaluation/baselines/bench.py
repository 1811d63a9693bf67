"""Running the methods over a sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retro.evaluation.baselines import costs, ensembles, knn
from retro.evaluation.baselines.methods import num_positions
from retro.evaluation.baselines.oracle import oracle_rows
from retro.evaluation.baselines.prompting import (
    SpanHits,
    Spans,
    documents_of,
    search_spans,
    spans_of,
    texts_with_documents,
)
from retro.evaluation.baselines.sample import Sample
from retro.evaluation.neighbors import random_neighbors
from retro.evaluation.scorer import joined, needs_all_logits, score_tokens
from retro.retrieval import Retriever


@dataclass(frozen=True)
class MethodScores:
    """What a method made of the targets, log p and ids of each, and what that took.

    seconds: of reading. search_seconds, search_flops: of `searches`. chosen: what was tuned or resolved for it.
    """

    log_p: Float[np.ndarray, " t"]
    targets: Int[np.ndarray, " t"]
    seconds: float = 0.0
    search_seconds: float = 0.0
    searches: int = 0
    flops: int = 0
    search_flops: int = 0
    store_bytes: int = 0
    chosen: dict[str, Any] | None = None


@dataclass(frozen=True)
class PerDocumentScores:
    """A sample read with one document in front at a time: log p with each (0 where a span has fewer), which documents
    there are, and their scores. A span that found nothing has one empty document."""

    spans: Spans
    log_p: Float[np.ndarray, "t k"]
    present: Bool[np.ndarray, "s k"]
    scores: Float[np.ndarray, "s k"]
    cost: MethodScores

    def mixed(self, mixture: Callable, temperature: float) -> Float[np.ndarray, " t"]:
        """log p under `token_mixture` or `sequence_mixture`."""
        weights = ensembles.log_weights(self.scores, self.present, temperature)
        return mixture(self.log_p, weights, self.spans.of_target)


class BaselineEvaluator:
    """Models, store and settings of a measurement, and what several methods share: searches, readings, keys.

    Shared work is done once, and told in every row that needs it. excluded: ids of documents that kNN-LM leaves out.
    settings: `resolved`.
    """

    def __init__(
        self,
        model: Any,
        reader: Any,
        retriever: Retriever,
        settings: BaselineSettings,
        excluded: list[str],
        progress: bool = False,
    ):
        self.model, self.reader, self.retriever, self.settings = model, reader, retriever, settings
        self.store, self.excluded, self.progress = retriever.store, excluded, progress
        self._done: dict[tuple, Any] = {}

    def run(self, name: str, sample: Sample, tuning: Sample | None = None) -> MethodScores:
        """One method by its name. tuning: a sample of validation documents."""
        methods = {
            "lm": self._lm,
            "retro_off": self._retro_off,
            "retro_on": partial(self._retro_on, ""),
            "retro_on_random": partial(self._retro_on, "random"),
            "retro_on_bm25": partial(self._retro_on, "bm25"),
            "retro_on_tfidf": partial(self._retro_on, "tfidf"),
            "retro_on_oracle": partial(self._retro_on, "oracle"),
            "prepend": self._prepend,
            "replug": partial(self._replug, tuning),
            "rag_token": partial(self._rag, ensembles.token_mixture),
            "rag_sequence": partial(self._rag, ensembles.sequence_mixture),
            "knn_lm": partial(self._knn, tuning),
        }
        return methods[name](sample)

    # the reader alone

    def _lm(self, sample: Sample) -> MethodScores:
        return self._lm_with_states(sample)[0]

    def _lm_with_states(self, sample: Sample) -> tuple[MethodScores, Float[np.ndarray, "t d"]]:
        read = lambda: self._read(sample.texts, sample.places, "LM", states=True)  # noqa: E731
        return self._shared(("lm", id(sample)), read)

    def _read(self, texts: list, places: list, label: str, states: bool = False) -> tuple[MethodScores, Any]:
        bar, read = self._bar(label), list(zip(texts, places, strict=True))
        found, seconds = _timed(lambda: score_tokens(self.reader, texts, places, states=states, progress=bar))
        targets = np.concatenate([text[at] for text, at in read])
        work = sum(costs.lm_flops(self.reader, len(text), len(at)) for text, at in read)
        of_tokens = np.concatenate([one.states for one in found]) if states else None
        return MethodScores(joined(found), targets, seconds, flops=work), of_tokens

    # RETRO

    def _retro_off(self, sample: Sample) -> MethodScores:
        return self._retro(sample, None)

    def _retro_on(self, neighbors: str, sample: Sample) -> MethodScores:
        """neighbors: "" the retriever's, "random", "oracle", or a kind of index."""
        if neighbors == "random":
            return replace(self._retro(sample, self._random(sample)), store_bytes=costs.text_bytes(self.store))
        kind = "tfidf" if neighbors == "oracle" else neighbors
        retriever = self._retriever(kind)
        if neighbors == "oracle":
            given = self.settings.num_neighbors, self.settings.oracle_candidates, self.retriever.retrieved_len
            rows, seconds = _timed(lambda: oracle_rows(sample, retriever, *given))
        else:
            rows, seconds = self._shared(("rows", kind, id(sample)), lambda: _timed(self._rows, sample, retriever))
        scored = self._retro(sample, rows)
        spans, asked = spans_of(sample, sample.data.chunk_len, 1), int((np.diff(sample.data.documents) == 0).sum())
        return self._with_searches(scored, spans, seconds / max(1, asked), retriever)

    def _rows(self, sample: Sample, retriever: Retriever) -> Int[np.ndarray, "c k"]:
        """The neighbors of every chunk that has another after it in its window."""
        asks = np.diff(sample.data.documents, append=-1) == 0
        return sample.search(retriever, self.settings.num_neighbors, asks)

    def _random(self, sample: Sample) -> Int[np.ndarray, "c k"]:
        """As many, each a random chunk of the store."""
        rows, _ = self._shared(("rows", "", id(sample)), lambda: _timed(self._rows, sample, self.retriever))
        return random_neighbors(self.store, rows, self.settings.seed)

    def _retro(self, sample: Sample, rows: np.ndarray | None) -> MethodScores:
        """OFF for rows None."""
        of_window = None if rows is None else np.split(rows, sample.first_chunk[1:])
        given = self.model, sample.texts, sample.places, of_window, self.store
        found, seconds = _timed(lambda: score_tokens(*given, progress=self._bar("RETRO")))
        k = 0 if rows is None else rows.shape[1]
        num_logits = map(len, sample.texts if needs_all_logits(self.model, k > 0) else sample.places)
        lengths = zip(map(len, sample.texts), num_logits, strict=True)
        work = sum(costs.retro_flops(self.model, *one, k) for one in lengths)
        return MethodScores(joined(found), sample.targets, seconds, flops=work)

    # retrieved text in front

    def _prepend(self, sample: Sample) -> MethodScores:
        spans, found = self._searched(sample, self.settings.retrieval_stride)
        started = time.perf_counter()
        documents = documents_of(
            self.store, found.rows[:, : self.settings.prompt_neighbors], self.retriever.retrieved_len
        )
        texts, places = texts_with_documents(sample, spans, documents, num_positions(self.reader))
        scored, _ = self._read(texts, places, "prepended")
        chosen = {"neighbors": self.settings.prompt_neighbors, "retrieval_stride": self.settings.retrieval_stride}
        scored = replace(scored, seconds=time.perf_counter() - started, chosen=chosen)
        return self._with_searches(scored, spans, found.seconds / max(1, spans.num_searches), self.retriever)

    def _replug(self, tuning: Sample | None, sample: Sample) -> MethodScores:
        stride, temperature = self.settings.retrieval_stride, self.settings.temperature
        if tuning is not None:
            apart = self._apart(tuning, stride)
            bits = {t: -apart.mixed(ensembles.token_mixture, t).sum() for t in self.settings.replug_temperatures}
            temperature = min(bits, key=bits.get)
        apart = self._apart(sample, stride)
        chosen = {"temperature": temperature, "on_validation": tuning is not None, "retrieval_stride": stride}
        return replace(apart.cost, log_p=apart.mixed(ensembles.token_mixture, temperature), chosen=chosen)

    def _rag(self, mixture: Callable, sample: Sample) -> MethodScores:
        apart = self._apart(sample, sample.data.chunk_len)
        return replace(apart.cost, log_p=apart.mixed(mixture, 1.0))

    def _apart(self, sample: Sample, stride: int) -> PerDocumentScores:
        return self._shared(("apart", id(sample), stride), lambda: self._read_apart(sample, stride))

    def _read_apart(self, sample: Sample, stride: int) -> PerDocumentScores:
        spans, found = self._searched(sample, stride)
        started = time.perf_counter()
        documents = documents_of(self.store, found.rows, self.retriever.retrieved_len)
        present = found.rows >= 0  # a prefix: the nearest first
        scores = np.where(present, found.scores, 0.0)
        present[:, 0] = True
        log_p, flops = np.zeros((len(sample.targets), present.shape[1])), 0
        for d in range(present.shape[1]):
            alone = [of_span[d : d + 1] for of_span in documents]
            texts, places = texts_with_documents(sample, spans, alone, num_positions(self.reader))
            chosen = np.flatnonzero(present[:, d])
            if len(chosen):
                read, _ = self._read([texts[s] for s in chosen], [places[s] for s in chosen], f"document {d + 1}")
                at = present[spans.of_target, d]
                assert np.array_equal(read.targets, sample.targets[at]), "each document stands before its own span"
                log_p[at, d] = read.log_p
                flops += read.flops
        cost = MethodScores(log_p[:, 0], sample.targets, time.perf_counter() - started, flops=flops)
        cost = self._with_searches(cost, spans, found.seconds / max(1, spans.num_searches), self.retriever)
        return PerDocumentScores(spans, log_p, present, scores, cost)

    def _searched(self, sample: Sample, stride: int) -> tuple[Spans, SpanHits]:
        """RAG, whose stride is a chunk, asks with the same number of tokens as the others."""

        def search() -> tuple[Spans, SpanHits]:
            spans = spans_of(sample, stride, self.settings.query_len)
            return spans, search_spans(sample, spans, self.retriever, self.settings.num_neighbors)

        return self._shared(("found", id(sample), stride), search)

    # kNN-LM

    def _knn(self, tuning: Sample, sample: Sample) -> MethodScores:
        made, s = self._token_store(), self.settings
        read, states = self._lm_with_states(tuning)
        found = made.search(states, max(s.knn_ks), self.progress)
        best = knn.choose(read.log_p, *found, tuning.targets, made.spread, s.knn_ks, s.knn_temperatures, s.knn_weights)
        scored, states = self._lm_with_states(sample)
        (distances, values), seconds = _timed(lambda: made.search(states, best.k, self.progress))
        of_keys = knn.knn_log_p(distances, values, sample.targets, best.temperature * made.spread)
        chosen = {"index": made.kind, "tokens": len(made.values), "build_seconds": round(made.build_seconds, 2)}
        return replace(
            scored,
            log_p=knn.interpolated(scored.log_p, of_keys, best.weight),
            search_seconds=seconds,
            searches=len(sample.targets),
            search_flops=len(sample.targets) * made.flops_of_search,
            store_bytes=made.num_bytes,
            chosen={**asdict(best), "spread": made.spread} | chosen,
        )

    def _token_store(self) -> knn.TokenStore:
        s = self.settings
        build = lambda: knn.build_token_store(  # noqa: E731
            self.reader, self.store, s.window_len, s.knn_tokens, self.excluded, s.seed, progress=self.progress
        )
        return self._shared(("keys",), build)

    # what methods share

    def _shared(self, key: tuple, make: Callable) -> Any:
        if key not in self._done:
            self._done[key] = make()
        return self._done[key]

    def _retriever(self, kind: str) -> Retriever:
        return self._shared(("retriever", kind), lambda: Retriever(self.store, kind)) if kind else self.retriever

    def _with_searches(
        self, scored: MethodScores, spans: Spans, seconds_each: float, retriever: Retriever
    ) -> MethodScores:
        """The cost of what the spans ask for: text that is only read was searched for when it was scored."""
        searches = spans.num_searches
        return replace(
            scored,
            searches=searches,
            search_seconds=searches * seconds_each,
            search_flops=searches * costs.search_flops(retriever.index, self.settings.query_len),
            store_bytes=costs.text_bytes(self.store) + costs.index_bytes(retriever.index, self.store),
        )

    def _bar(self, label: str) -> str | None:
        return label if self.progress else None


def _timed(run: Callable, *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return run(*args), time.perf_counter() - started
