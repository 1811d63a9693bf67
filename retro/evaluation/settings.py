"""How held-out text is scored, and what baselines are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from retro.common.settings import unknown_name

if TYPE_CHECKING:
    from retro.evaluation.data import EvaluationData
    from retro.retrieval import Retriever
    from retro.text.documents import Document

Align = Literal["start", "end"]
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

    window_len: int | None = None
    stride: int | None = None
    seed: int = 0
    cache: str | Path | bool = True
    progress: bool = False

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

    num_neighbors: int | None = None
    align: Align = "start"
    max_len: int | None = None
    batch_size: int = 8
    decontaminate: bool = False
    cache: str | Path | bool = True
    seed: int = 0

    def __post_init__(self):
        if self.align not in get_args(Align):
            raise ValueError(f"align is {self.align!r}; choose one of {', '.join(get_args(Align))}.")
        for name in ("batch_size", "max_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")


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
    num_neighbors: tuple[int, ...] | None = None
    prompt_neighbors: tuple[int, ...] | None = None
    retrieval_stride: int | None = None
    query_len: int | None = None
    windows_per_document: int = 4
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
        for name in ("retrieval_stride", "query_len", "oracle_candidates", "knn_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")
        for name in ("num_neighbors", "prompt_neighbors"):
            if getattr(self, name) is not None and min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name} are {list(getattr(self, name))}; give numbers of at least 1.")
        if self.windows_per_document < 0:
            raise ValueError(f"windows_per_document is {self.windows_per_document}; give 0 or more.")
        temperatures = (self.temperature, *self.replug_temperatures, *self.knn_temperatures)
        if min(temperatures) <= 0:
            raise ValueError(f"a temperature is {min(temperatures)}; give numbers above 0.")
        if min(self.knn_weights) < 0 or max(self.knn_weights) >= 1:
            raise ValueError(f"knn_weights are {list(self.knn_weights)}; give numbers from 0 to below 1.")
        if min(self.knn_ks) < 1:
            raise ValueError(f"knn_ks are {list(self.knn_ks)}; give at least 1.")
