"""How held-out text is scored, and what baselines are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from retro.common.settings import unknown_name
from retro.common.values import Count, CountOrZero, NumNeighbors, Positive, Range, Seed, Size, check_fields

if TYPE_CHECKING:
    from retro.evaluation.data import EvaluationData
    from retro.retrieval import Retriever
    from retro.text.documents import Document

Align = Literal["start", "end"]
Weight = Annotated[float, Range(ge=0, lt=1)]
KS = (0, 1, 2, 4, 7, 10, 20, 40)
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
READER, RETRO, PROMPT, VALIDATION, BM25 = "reader", "retro", "prompt", "validation", "bm25s"
METHODS = {  # label, and what is needed
    "lm": ("LM", {READER}),
    "retro_off": ("RETRO[OFF]", {RETRO}),
    "retro_on": ("RETRO[ON]", {RETRO}),
    "retro_on_random": ("RETRO[ON], random", {RETRO}),
    "retro_on_bm25": ("RETRO[ON], BM25", {RETRO, BM25}),
    "retro_on_tfidf": ("RETRO[ON], TF-IDF", {RETRO}),
    "retro_on_oracle": ("RETRO[ON], oracle (bound)", {RETRO}),
    "prepend": ("in-context, prepended", {READER, PROMPT}),
    "prepend_random": ("in-context, random", {READER, PROMPT}),
    "replug": ("REPLUG", {READER, PROMPT}),
    "rag_token": ("RAG-token", {READER, PROMPT}),
    "rag_sequence": ("RAG-sequence", {READER, PROMPT}),
    "knn_lm": ("kNN-LM", {READER, VALIDATION}),
}
Method = Literal[tuple(METHODS)]
PROTOCOL = ("lm", "retro_off", "retro_on", "retro_on_random", "prepend", "prepend_random")


@dataclass(frozen=True)
class ScoringSettings:
    """How held-out text is scored.

    Arguments:
        window_len: Tokens of a window. Default: the model's positions, at most 2048.
        stride: Tokens between the starts of two windows. Default: half a window.
        seed: Seed of everything that is drawn.
        cache: Folder where neighbors are kept (from Python, False keeps none). Default: neighbors/ in the store.
        progress: Whether to show a bar.
    """

    window_len: Size | None = None
    stride: Size | None = None
    seed: Seed = 0
    cache: str | Path | bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def prepare(
        self, documents: Sequence[Document], retriever: Retriever, k: int, exclude: str = "same_document"
    ) -> EvaluationData:
        """The documents with their neighbors."""
        from retro.evaluation.data import prepare

        store = getattr(retriever, "store", None)
        if store is None:
            raise ValueError(
                f"the retriever is a {type(retriever).__name__} without a store; text is measured with a Retriever, "
                "which takes a search of your own over the rows of a store as its index."
            )
        return prepare(documents, store.tokenizer, store.chunk_len, retriever, k, self.progress, exclude, self.cache)

    def given(self, data: EvaluationData, *models: Any) -> dict[str, Any]:
        """What `score` takes, with a window that all models can read."""
        from retro.evaluation.data import window_of

        present = [model for model in models if model is not None]
        window_len, stride = window_of(present, data.chunk_len, self.window_len, self.stride)
        return dict(window_len=window_len, stride=stride, seed=self.seed, progress=self.progress)


DEFAULT = ScoringSettings()


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How a task is read.

    Arguments:
        num_neighbors: Neighbors of a chunk, k in the paper. Default: the model's.
        align: Where a context stands in the chunks: it starts at the start of one, or ends at the end of one, filled up
            in front.
        max_len: Tokens of an input, of which the start is cut off. Default: the model's positions, at most 2048.
        batch_size: Texts that are read together, at most.
        decontaminate: Whether to leave out neighbors that share 13 words in a row with the right text.
        cache: Folder where neighbors are kept (from Python, False keeps none). Default: neighbors/ in the store.
        seed: Seed of everything that is drawn.
    """

    num_neighbors: Annotated[int, Range(ge=0, le=1 << 16)] | None = None
    align: Align = "start"
    max_len: Size | None = None
    batch_size: Size = 8
    decontaminate: bool = False
    cache: str | Path | bool = True
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class BaselineSettings:
    """What is measured, and how.

    Arguments:
        methods: The rows of the table; the first, LM or RETRO[OFF], is always there. Default: those of
            the protocol that can run, lm, retro_on, prepend and both with random neighbors, and retro_off of models
            that are no fits of the reader.
        num_neighbors: Neighbors of a chunk, k in the paper; each k is a row of every RETRO. Default: the first model's.
        prompt_neighbors: Documents that in-context retrieval, REPLUG and RAG read; each number is a row. Default: those
            of num_neighbors, or as many as there is room for.
        retrieval_stride: Tokens between two searches of in-context retrieval and REPLUG. Default: the chunk length,
            which RETRO and RAG always have.
        query_len: Tokens of a query of in-context retrieval and REPLUG. Default: the chunk length.
        windows_per_document: Windows of each document that are scored; 0 takes all.
        window_len: Tokens of a window. Default: the model's positions, at most 2048.
        stride: Tokens between the starts of two windows. Default: half a window.
        oracle_candidates: Neighbors that the oracle ranks for each chunk.
        temperature: Temperature of REPLUG's weights where there is no validation data.
        replug_temperatures: Temperatures of REPLUG's weights that validation data chooses from.
        knn_tokens: Keys of kNN-LM, drawn with the seed. Default: those of the whole store.
        knn_ks: Numbers of neighbors of kNN-LM that validation data chooses from.
        knn_temperatures: Temperatures of kNN-LM that validation data chooses from, in units of the expected squared
            distance of two keys.
        knn_weights: Weights of kNN-LM, lambda in its paper, that validation data chooses from.
        seed: Seed of everything that is drawn.
    """

    methods: tuple[Method, ...] | None = None
    num_neighbors: tuple[NumNeighbors, ...] | None = None
    prompt_neighbors: tuple[NumNeighbors, ...] | None = None
    retrieval_stride: Size | None = None
    query_len: Size | None = None
    windows_per_document: CountOrZero = 4
    window_len: Size | None = None
    stride: Size | None = None
    oracle_candidates: NumNeighbors = 50
    temperature: Positive = 1.0
    replug_temperatures: tuple[Positive, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    knn_tokens: Count | None = None
    knn_ks: tuple[NumNeighbors, ...] = (8, 32, 128, 1024)
    knn_temperatures: tuple[Positive, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    knn_weights: tuple[Weight, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in self.methods or ():
            if name not in METHODS:
                raise ValueError(unknown_name(name, METHODS, "method"))
        for name in ("num_neighbors", "prompt_neighbors"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"{name} is empty; give a number, or leave it out.")
        check_fields(self)
