"""Running the methods over a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retro.evaluation.baselines import costs, ensembles, knn
from retro.evaluation.baselines.methods import PlannedRow, num_positions
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
from retro.evaluation.data import window_start
from retro.evaluation.scorer import TokenScores, joined, score_tokens
from retro.evaluation.settings import BaselineSettings
from retro.retrieval import Retriever
from retro.retrieval.store.random_rows import random_rows


@dataclass(frozen=True)
class MethodScores:
    """What a method made of the targets, log p and ids of each, and what that took.

    seconds: of reading. search_seconds, search_flops: of `searches`. flops: of reading the sample whose operations are
    counted, 0 of others. chosen: what was tuned or resolved for it.
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
    there are, and their scores; and what reading with each of them took. A span that found nothing has one empty
    document."""

    spans: Spans
    log_p: Float[np.ndarray, "t k"]
    present: Bool[np.ndarray, "s k"]
    scores: Float[np.ndarray, "s k"]
    cost: MethodScores
    seconds: list[float]
    flops: list[int]

    def of_nearest(self, k: int) -> PerDocumentScores:
        """With the first k documents only."""
        seconds, flops = self.seconds[:k], self.flops[:k]
        cost = replace(self.cost, seconds=sum(seconds), flops=sum(flops))
        return PerDocumentScores(
            self.spans, self.log_p[:, :k], self.present[:, :k], self.scores[:, :k], cost, seconds, flops
        )

    def mixed(self, mixture: Callable, temperature: float) -> Float[np.ndarray, " t"]:
        """log p under `token_mixture` or `sequence_mixture`."""
        weights = ensembles.log_weights(self.scores, self.present, temperature)
        return mixture(self.log_p, weights, self.spans.of_target)


class BaselineEvaluator:
    """Models, store and settings of a measurement, and what several methods share: searches, readings, keys.

    Shared work is done once, and told in every row that needs it. models: beside the reader, by name. excluded: ids of
    documents that kNN-LM leaves out. counted: the sample whose operations are counted. settings: `resolved`.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        reader: Any,
        retriever: Retriever,
        settings: BaselineSettings,
        excluded: list[str],
        counted: Sample | None = None,
        progress: bool = False,
    ):
        self.models, self.reader, self.retriever, self.settings = models, reader, retriever, settings
        self.store, self.excluded, self.counted, self.progress = retriever.store, excluded, counted, progress
        self.most = max(*settings.num_neighbors, *settings.prompt_neighbors)
        self._done: dict[tuple, Any] = {}

    def run(self, row: PlannedRow, sample: Sample, tuning: Sample | None = None) -> MethodScores:
        """One row. tuning: a sample of validation documents."""
        k, model = row.k, self.reader if row.model is None else self.models[row.model]
        methods = {
            "lm": lambda: self._lm(model, sample)[0],
            "retro_off": lambda: self._retro(model, sample, None),
            "retro_on": lambda: self._retro_on(model, sample, k, ""),
            "retro_on_random": lambda: self._retro_on_random(model, sample, k),
            "retro_on_bm25": lambda: self._retro_on(model, sample, k, "bm25"),
            "retro_on_tfidf": lambda: self._retro_on(model, sample, k, "tfidf"),
            "retro_on_oracle": lambda: self._retro_on(model, sample, k, "oracle"),
            "prepend": lambda: self._prepend(sample, k),
            "prepend_random": lambda: self._prepend_random(sample, k),
            "replug": lambda: self._replug(sample, k, tuning),
            "rag_token": lambda: self._rag(sample, k, ensembles.token_mixture),
            "rag_sequence": lambda: self._rag(sample, k, ensembles.sequence_mixture),
            "knn_lm": lambda: self._knn(sample, tuning),
        }
        return methods[row.method]()

    def forget(self, sample: Sample) -> None:
        """Drop what was kept of a sample."""
        self._done = {key: made for key, made in self._done.items() if id(sample) not in key}

    # one model alone

    def _lm(self, model: Any, sample: Sample) -> tuple[MethodScores, Float[np.ndarray, "t d"]]:
        """Of a plain LM, with its states."""

        def read() -> tuple[MethodScores, np.ndarray]:
            found, seconds, flops = self._scored(sample, model, sample.texts, sample.places, states=True)
            states = np.concatenate([one.states for one in found])
            return MethodScores(joined(found), sample.targets, seconds, flops=flops), states

        return self._shared(("lm", id(model), id(sample)), read)

    def _read(self, sample: Sample, texts: list, places: list) -> MethodScores:
        """Texts made of the sample, by the reader."""
        found, seconds, flops = self._scored(sample, self.reader, texts, places)
        targets = np.concatenate([text[at] for text, at in zip(texts, places, strict=True)])
        return MethodScores(joined(found), targets, seconds, flops=flops)

    def _scored(
        self, sample: Sample, model: Any, texts: Sequence, places: Sequence, rows: Sequence | None = None, **given: Any
    ) -> tuple[list[TokenScores], float, int]:
        """Scores, seconds and operations, of one text at a time: nobody pays for padding."""
        given |= {"batch_size": 1, "bos": window_start(model, sample.data.bos)}
        score = lambda: score_tokens(model, texts, places, rows, self.store, **given)  # noqa: E731
        found, seconds = _timed(score)
        return found, seconds, costs.counted_flops(score) if sample is self.counted else 0

    # RETRO

    def _retro(self, model: Any, sample: Sample, rows: np.ndarray | None) -> MethodScores:
        """OFF for rows None."""
        of_window = None if rows is None else np.split(rows, sample.first_chunk[1:])
        found, seconds, flops = self._scored(sample, model, sample.texts, sample.places, of_window)
        return MethodScores(joined(found), sample.targets, seconds, flops=flops)

    def _retro_on(self, model: Any, sample: Sample, k: int, neighbors: str) -> MethodScores:
        """neighbors: "" the retriever's, "oracle", or a kind of index."""
        retriever = self._retriever("tfidf" if neighbors == "oracle" else neighbors)
        rows, seconds = self._rows(sample, neighbors)
        scored = self._retro(model, sample, rows[:, :k])
        spans, asked = spans_of(sample, sample.data.chunk_len, 1), int((np.diff(sample.data.documents) == 0).sum())
        return self._with_searches(scored, spans, seconds / max(1, asked), retriever)

    def _retro_on_random(self, model: Any, sample: Sample, k: int) -> MethodScores:
        """As many neighbors, each a random chunk of the store."""
        rows, _ = self._rows(sample, "")
        scored = self._retro(model, sample, self._random(sample.numbers, rows)[:, :k])
        return replace(scored, store_bytes=costs.text_bytes(self.store))

    def _rows(self, sample: Sample, neighbors: str) -> tuple[Int[np.ndarray, "c k"], float]:
        """The most neighbors of every chunk that has another after it in its window, and the seconds."""
        most = max(self.settings.num_neighbors)

        def search() -> np.ndarray:
            if neighbors == "oracle":
                given = most, self.settings.oracle_candidates, self.retriever.retrieved_len
                return oracle_rows(sample, self._retriever("tfidf"), *given)
            return sample.search(self._retriever(neighbors), most, np.diff(sample.data.documents, append=-1) == 0)

        return self._shared(("rows", neighbors, id(sample)), lambda: _timed(search))

    def _random(self, numbers: Int[np.ndarray, " c"], rows: Int[np.ndarray, "c k"]) -> Int[np.ndarray, "c k"]:
        """Random rows where there are some: the same for a number, whatever k is, and whoever reads them."""
        drawn = random_rows(self.store, numbers, np.full_like(numbers, -1), self.most, self.settings.seed)
        return np.where(rows >= 0, drawn[:, : rows.shape[1]], -1)

    # retrieved text in front

    def _prepend(self, sample: Sample, k: int) -> MethodScores:
        spans, found = self._searched(sample, self.settings.retrieval_stride)
        scored = self._with_prompt(sample, spans, found.rows[:, :k])
        return self._with_searches(scored, spans, found.seconds / max(1, spans.num_searches), self.retriever)

    def _prepend_random(self, sample: Sample, k: int) -> MethodScores:
        spans, found = self._searched(sample, self.settings.retrieval_stride)
        scored = self._with_prompt(sample, spans, self._random(spans.numbers, found.rows)[:, :k])
        return replace(scored, store_bytes=costs.text_bytes(self.store))

    def _with_prompt(self, sample: Sample, spans: Spans, rows: Int[np.ndarray, "s k"]) -> MethodScores:
        made, seconds = _timed(lambda: self._texts_with_documents(sample, spans, rows))
        scored = self._read(sample, *made)
        return replace(scored, seconds=seconds + scored.seconds)

    def _texts_with_documents(self, sample: Sample, spans: Spans, rows: Int[np.ndarray, "s k"]) -> tuple[list, list]:
        documents = documents_of(self.store, rows, self.retriever.retrieved_len)
        return texts_with_documents(sample, spans, documents, num_positions(self.reader))

    def _replug(self, sample: Sample, k: int, tuning: Sample | None) -> MethodScores:
        stride, temperature = self.settings.retrieval_stride, self.settings.temperature
        if tuning is not None:
            apart = self._apart(tuning, stride).of_nearest(k)
            bits = {t: -apart.mixed(ensembles.token_mixture, t).sum() for t in self.settings.replug_temperatures}
            temperature = min(bits, key=bits.get)
        apart = self._apart(sample, stride).of_nearest(k)
        chosen = {"temperature": temperature, "on_validation": tuning is not None}
        return replace(apart.cost, log_p=apart.mixed(ensembles.token_mixture, temperature), chosen=chosen)

    def _rag(self, sample: Sample, k: int, mixture: Callable) -> MethodScores:
        apart = self._apart(sample, sample.data.chunk_len).of_nearest(k)
        return replace(apart.cost, log_p=apart.mixed(mixture, 1.0))

    def _apart(self, sample: Sample, stride: int) -> PerDocumentScores:
        return self._shared(("apart", id(sample), stride), lambda: self._read_apart(sample, stride))

    def _read_apart(self, sample: Sample, stride: int) -> PerDocumentScores:
        spans, found = self._searched(sample, stride)
        present = found.rows >= 0  # a prefix: the nearest first
        scores = np.where(present, found.scores, 0.0)
        present[:, 0] = True
        log_p, seconds, flops = np.zeros((len(sample.targets), present.shape[1])), [], []
        for d in range(present.shape[1]):
            (texts, places), building = _timed(
                lambda d=d: self._texts_with_documents(sample, spans, found.rows[:, d : d + 1])
            )
            chosen, read = np.flatnonzero(present[:, d]), None
            if len(chosen):
                read = self._read(sample, [texts[s] for s in chosen], [places[s] for s in chosen])
                at = present[spans.of_target, d]
                assert np.array_equal(read.targets, sample.targets[at]), "each document stands before its own span"
                log_p[at, d] = read.log_p
            seconds.append(building + (read.seconds if read else 0))
            flops.append(read.flops if read else 0)
        cost = MethodScores(log_p[:, 0], sample.targets)
        cost = self._with_searches(cost, spans, found.seconds / max(1, spans.num_searches), self.retriever)
        return PerDocumentScores(spans, log_p, present, scores, cost, seconds, flops)

    def _searched(self, sample: Sample, stride: int) -> tuple[Spans, SpanHits]:
        """RAG, whose stride is a chunk, asks with the same number of tokens as the others."""

        def search() -> tuple[Spans, SpanHits]:
            spans = spans_of(sample, stride, self.settings.query_len)
            return spans, search_spans(sample, spans, self.retriever, max(self.settings.prompt_neighbors))

        return self._shared(("found", id(sample), stride), search)

    # kNN-LM

    def _knn(self, sample: Sample, tuning: Sample) -> MethodScores:
        made, best = self._token_store(), self._shared(("knn", id(tuning)), lambda: self._choose_knn(tuning))
        scored, states = self._lm(self.reader, sample)
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

    def _choose_knn(self, tuning: Sample) -> Any:
        made, s = self._token_store(), self.settings
        read, states = self._lm(self.reader, tuning)
        found = made.search(states, max(s.knn_ks), self.progress)
        return knn.choose(read.log_p, *found, tuning.targets, made.spread, s.knn_ks, s.knn_temperatures, s.knn_weights)

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


def _timed(run: Callable, *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return run(*args), time.perf_counter() - started
