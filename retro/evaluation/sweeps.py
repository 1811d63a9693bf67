"""Sweeps: bits per byte over neighbors, over datastore size, over models, over training tokens.

Each gives {"sweep", "x": the name of what was swept, "xlabel", "points": one record a measurement, "curve": what a plot
shows, one record a place and column with "bpb", "low" and "high", "band": what low and high are, "references": columns
that do not depend on the place}.

Source: RETRO, sections 4.1-4.2 and figure 1; the datastore's curve is that of MassiveDS (Shao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro.common.files import load_json, stable_hash
from retro.common.values import CountOrZero, check_record
from retro.evaluation.bits import (
    LITTLE_OVERLAP,
    ChunkScores,
    bpb_interval,
    described,
    gain,
    measured_with,
    neighbors_of,
    score,
    score_columns,
)
from retro.evaluation.data import EvaluationData, find_neighbors
from retro.evaluation.scorer import reads_neighbors
from retro.evaluation.settings import DEFAULT, KS, SHARES, ScoringSettings
from retro.loading import load_model
from retro.retrieval import Retriever, Store
from retro.retrieval.filters import drawn
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.searchers import approximate_parts
from retro.text.documents import Document

if TYPE_CHECKING:
    from retro.retrieval import Embedder

BOOTSTRAP = "95% bootstrap over documents"


def sweep_neighbors(
    model: Any,
    documents: Sequence[Document],
    retriever: Retriever,
    ks: Sequence[int] = KS,
    baseline: Any = None,
    scoring: ScoringSettings = DEFAULT,
) -> dict[str, Any]:
    """RETRO[ON] with k neighbors for each k; 0 is RETRO[OFF]. More neighbors than in training are welcome.

    Args:
        ks: Each 0 or more.
        baseline: A plain LM for comparison.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 0 or ks[-1] < 1:
        raise ValueError(f"k is swept over {ks}; give at least one k above 0, and none below 0.")
    _require_reader(model)
    data = scoring.prepare(documents, retriever, ks[-1])
    given = scoring.given(data, model, baseline)
    off, points = score(model, data, **given), []
    for k in ks:
        scores = score(model, data, "on", retriever.store, k, **given) if k else off
        points.append({"num_neighbors": k, "column": "retro_on"} | _measured(scores, data, given, off))
    references = {"retro_off": _measured(off, data, given)} | _reference(baseline, data, given)
    result = _result("neighbors", "num_neighbors", "neighbors per chunk, k", points, points, BOOTSTRAP, references)
    return result | described(data, given) | measured_with(model, retriever, baseline)


def sweep_datastore(
    model: Any,
    documents: Sequence[Document],
    store: Store,
    shares: Sequence[float] = SHARES,
    num_draws: int = 3,
    num_neighbors: int | None = None,
    baseline: Any = None,
    index: str = "exact",
    embedder: Embedder | None = None,
    scoring: ScoringSettings = DEFAULT,
) -> dict[str, Any]:
    """RETRO[ON] over shares p of the store's documents, `num_draws` of each; mean, least and greatest.

    No key is made again: the search is restricted to the chunks of the documents drawn, by keys exact. "Little overlap"
    is with the neighbors in the whole store, so that it means the same chunks everywhere.

    Args:
        shares: Each in (0, 1]. In one draw, a smaller share lies in the larger ones (see `Subsample`); one without any
            document is read as RETRO[OFF].
        index: "exact", or a lexical index (built anew for each share, in the store's folder).
        embedder: None loads the store's.
    """
    shares = sorted(set(shares))
    if not shares or not all(0 < share <= 1 for share in shares) or num_draws < 1:
        raise ValueError(
            f"the shares are {shares}, draws {num_draws}; give shares above 0 up to 1, and 1 draw or more."
        )
    if "auto" in index.split("+") or approximate_parts(index) & set(ENGINES):
        raise ValueError(
            f"index is {index}, but a share has no index of keys; use exact, a lexical index, or several by +."
        )
    _require_reader(model)
    k, queries = neighbors_of(model, num_neighbors), _CachingEmbedder(store, embedder)
    whole = Retriever(store, index, queries)
    data = scoring.prepare(documents, whole, k)
    given, points = scoring.given(data, model, baseline), []
    off = score(model, data, **given)
    for share in shares:
        for seed in range(scoring.seed, scoring.seed + (num_draws if share < 1 else 1)):
            part = Subsample(store, share, seed)
            rows = np.full((len(data.tokens), k), -1)
            if len(part.searchable_rows):
                rows = find_neighbors(data, Retriever(part, index, queries), k, cache=scoring.cache)
            scores = score(model, replace(data, rows=rows), "on", store, **given)
            sizes = {"documents": part.sampled_documents, "chunks": len(part.searchable_rows)}
            place = {"share": share, "seed": seed, **sizes, "column": "retro_on"}
            points.append(place | _measured(scores, data, given, off))
    references = {"retro_off": _measured(off, data, given)} | _reference(baseline, data, given)
    curve, band = _mean_of_draws(points, len(store.searchable_rows)), f"least and greatest of {num_draws} draws"
    result = _result("datastore", "chunks", "chunks in the datastore", points, curve, band, references)
    return result | {"num_neighbors": k} | described(data, given) | measured_with(model, whole, baseline)


def sweep_models(
    models: Iterable[tuple[str, Any]],
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    scoring: ScoringSettings = DEFAULT,
) -> dict[str, Any]:
    """Bits per byte against parameters: "lm" of plain LMs, RETRO[OFF] and RETRO[ON] of the others.

    Args:
        models: Names and models, taken one at a time; the first one's window is that of all.
        num_neighbors: Default: each model's own.
    """
    places = (({"parameters": num_parameters(model), "model": name}, model) for name, model in models)
    points, data, given = _over_models(places, documents, retriever, num_neighbors, scoring)
    points.sort(key=lambda point: point["parameters"])
    result = _result("models", "parameters", "parameters", points, points, BOOTSTRAP, {})
    about = measured_with(None, retriever) | {"model": list(dict.fromkeys(point["model"] for point in points))}
    return result | described(data, given) | about


def sweep_tokens(
    run: str | Path,
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None = None,
    baseline: Any = None,
    scoring: ScoringSettings = DEFAULT,
) -> dict[str, Any]:
    """Bits per byte against tokens seen, over the checkpoints of one run of training or RETRO-fitting.

    Args:
        run: The run's folder; it keeps as many checkpoints as its setting keep_checkpoints says.

    Raises ValueError if the run has no checkpoint.
    """
    places = (
        ({"tokens": tokens, "checkpoint": folder.name}, load_model(folder, retriever.store))
        for tokens, folder in checkpoints_of(run)
    )
    points, data, given = _over_models(places, documents, retriever, num_neighbors, scoring)
    references = _reference(baseline, data, given)
    result = _result("tokens", "tokens", "training tokens", points, points, BOOTSTRAP, references)
    return result | described(data, given) | measured_with(None, retriever, baseline) | {"model": str(run)}


def checkpoints_of(run: str | Path) -> list[tuple[int, Path]]:
    """Tokens seen and folder of every checkpoint of a run, oldest first; ValueError if there is none."""
    states = sorted(Path(run).glob("checkpoints/step-*/state.json"))
    records = [check_record(state, load_json(state), {"tokens": CountOrZero}) for state in states]
    found = [(record["tokens"], state.parent) for record, state in zip(records, states, strict=True)]
    if not found:
        raise ValueError(f"{run} holds no checkpoints; give the output folder of a run (see keep_checkpoints).")
    return sorted(found)


def num_parameters(model: Any) -> int:
    """Weights of a model, each counted once, embeddings and a frozen base included."""
    return sum(parameter.numel() for parameter in model.parameters())


class Subsample(Store):
    """A store of which only the chunks of some documents are found; rows and values are the whole store's.

    share, seed: which documents, of `retro.retrieval.filters.drawn`; there may be none.
    """

    def __init__(self, store: Store, share: float, seed: int):
        vars(self).update(vars(store))
        chosen = drawn(store.document_ids, share, seed)
        chosen[store.removed_documents] = False
        self.sampled_documents = int(chosen.sum())
        self.searchable_rows = store.searchable_rows[chosen[store.document_rows(store.searchable_rows)]]
        made_of = {"store": store.fingerprint, "share": share, "seed": seed}
        self.fingerprint = store.fingerprint if share == 1 else stable_hash(made_of)

    def shard_fingerprint(self, number: int) -> str:
        """Of the shard and of what is sampled from it."""
        return stable_hash({"shard": super().shard_fingerprint(number), "sample": self.fingerprint})


class _CachingEmbedder:
    """The embedder of a store, which embeds each query once, and is loaded when the first one comes."""

    def __init__(self, store: Store, embedder: Embedder | None = None):
        self.dim, self.fingerprint = store.key_dim, store.embedder_fingerprint
        self.description, self.num_truncated = store.manifest["embedder"], 0
        self._store, self._given, self._keys = store, embedder, {}

    @cached_property
    def _embedder(self) -> Embedder:
        from retro.retrieval.search.searchers import embedder_of

        return embedder_of(self._store, self._given)

    def embed(self, texts: list[str], is_query: bool = False) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if (text, is_query) not in self._keys]
        if new:
            keys = self._embedder.embed(new, is_query=is_query)
            self._keys |= {(text, is_query): key for text, key in zip(new, keys, strict=True)}
        return np.stack([self._keys[text, is_query] for text in texts])


def _over_models(
    places: Iterable[tuple[dict[str, Any], Any]],
    documents: Sequence[Document],
    retriever: Retriever,
    num_neighbors: int | None,
    scoring: ScoringSettings,
) -> tuple[list[dict[str, Any]], EvaluationData, dict[str, Any]]:
    """One point for each place and column of its model, the data, and how it was read."""
    points, data, given = [], None, {}
    for place, model in places:
        k = neighbors_of(model, num_neighbors)
        if data is None or data.rows.shape[1] < k:
            data = scoring.prepare(documents, retriever, k)
        given = given or scoring.given(data, model)
        scores = score_columns(model, data, retriever.store, k, random=False, **given)
        for column, found in scores.items():
            off = scores["retro_off"] if column == "retro_on" else None
            points.append({**place, "column": column} | _measured(found, data, given, off))
    if data is None:
        raise ValueError("there is no model to measure; name at least one.")
    return points, data, given


def _require_reader(model: Any) -> None:
    if not reads_neighbors(model):
        raise ValueError("the model reads no neighbors, so that there is nothing to sweep; give a RETRO.")


def _reference(baseline: Any, data: EvaluationData, given: dict[str, Any]) -> dict[str, Any]:
    return {} if baseline is None else {"lm": _measured(score(baseline, data, **given), data, given)}


def _measured(
    scores: ChunkScores, data: EvaluationData, given: dict[str, Any], off: ChunkScores | None = None
) -> dict[str, Any]:
    """Bits per byte with its interval, over the chunks with little overlap, and what is gained over RETRO[OFF]."""
    low, high = bpb_interval(scores, data, given["seed"])
    little = scores.bits_per_byte(data, data.overlap_ratio <= LITTLE_OVERLAP)
    measured = {"bpb": scores.bits_per_byte(data), "low": low, "high": high, "bpb_little_overlap": little}
    if off is not None:
        measured |= dict(zip(("gain", "gain_low", "gain_high"), gain(scores, off, data, given["seed"]), strict=True))
    return measured | {"seconds": round(scores.elapsed_seconds, 2)}


def _mean_of_draws(points: list[dict[str, Any]], chunks: int) -> list[dict[str, Any]]:
    """One record a share: mean, standard deviation, least and greatest over its draws; the place is p of all chunks."""
    curve = []
    for share in dict.fromkeys(point["share"] for point in points):
        of_share = [point for point in points if point["share"] == share]
        values, gains = ([point[name] for point in of_share] for name in ("bpb", "gain"))
        place = {"share": share, "chunks": round(share * chunks), "column": "retro_on", "draws": len(values)}
        spread = {"bpb": float(np.mean(values)), "std": float(np.std(values)), "low": min(values), "high": max(values)}
        gained = {"gain": float(np.mean(gains)), "gain_low": min(gains), "gain_high": max(gains)}
        curve.append(place | spread | gained)
    return curve


def _result(sweep: str, x: str, xlabel: str, points: list, curve: list, band: str, references: dict) -> dict[str, Any]:
    return dict(sweep=sweep, x=x, xlabel=xlabel, points=points, curve=curve, band=band, references=references)
