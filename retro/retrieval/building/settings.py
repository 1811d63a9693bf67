"""What `retro build` needs to know, and the embedder that it names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from retro.common.values import Count, Prefix, Range, Size, check_fields
from retro.retrieval.embedding.embedder import NO_EMBEDDER, Embedder, NoEmbedder, load_embedder
from retro.retrieval.embedding.presets import Attention, Pooling, Similarity
from retro.retrieval.executors.opening import ExecutorName
from retro.retrieval.filters import FilterSettings
from retro.retrieval.search.engines import ENGINES
from retro.retrieval.search.searchers import parse_kind
from retro.text.corpus import as_list

KeyDtype = Literal["float32", "float16", "bfloat16"]
KEY_DTYPES = get_args(KeyDtype)
EMBEDDER_CHOICES = ("pooling", "query_prefix", "passage_prefix", "max_length", "normalize")
LATER_CHOICES = ("similarity", "query_encoder", "attention", "pool_prefix")  # in the fingerprint of the embedder


@dataclass(kw_only=True)
class ChunkSettings:
    """How text becomes chunks, and how their keys are stored.

    Arguments:
        text_field: Field or column that holds the text.
        chunk_len: Tokens of a chunk, m in the paper, from 1 to 65535.
        key_dtype: How the numbers of keys are stored.
    """

    text_field: str = "text"
    chunk_len: Annotated[int, Range(ge=1, le=65535)] = 64
    key_dtype: KeyDtype = "float32"

    def __post_init__(self) -> None:
        check_fields(self, without=["inputs"])


@dataclass(kw_only=True)
class EmbedderSettings:
    """What turns a chunk into its key.

    Arguments:
        embedder: A preset (minilm, contriever, dpr, e5-base-v2 and others), a Hugging Face name or folder with
            safetensors, or "none" for a store without keys, which is searched by its words.
        pooling: Which of the embedder's tokens make the key. Default: what the preset says, else what the folder says,
            else mean.
        query_prefix: Text that the embedder wants before a query. Default: what the preset says, else none.
        passage_prefix: Text that the embedder wants before a passage. Default: what the preset says, else none.
        max_length: The embedder's tokens to which a text is cut. Default: what the preset or the folder says.
        normalize: Whether keys get length 1, which is the same as similarity cosine. Default: as similarity says.
        similarity: What keys are compared by: cosine, dot (the inner product) or l2 (the distance). Default: what the
            preset says, else cosine.
        query_encoder: Name or folder of another encoder for queries, "same" for none. Default: what the preset says,
            else same.
        attention: "own" is the model's, "bidirectional" lets every token of a decoder see all others. Default: what the
            preset says, else own.
        pool_prefix: Whether the tokens of a prefix are pooled too. Default: what the preset says, else yes.
        batch_size: Chunks of a forward pass of the embedder. Default: as many as suit the device.
        compile: Whether the embedder runs through torch.compile, which every worker does once: for large datastores on
            GPUs. It was never timed there.
    """

    embedder: str = "minilm"
    pooling: Pooling | None = None
    query_prefix: Prefix | None = None
    passage_prefix: Prefix | None = None
    max_length: Size | None = None
    normalize: bool | None = None
    similarity: Similarity | None = None
    query_encoder: str | None = None
    attention: Attention | None = None
    pool_prefix: bool | None = None
    batch_size: Size | None = None
    compile: bool = False


@dataclass(kw_only=True)
class ExecutorSettings:
    """Who does the work; what is made is the same to the byte.

    Arguments:
        executor: "local" is processes of this machine, "ranks" the ranks of a Slurm array, srun or torchrun, "ray"
            tasks on a Ray cluster.
        workers: Processes, or tasks at a time on Ray. Default: two for each GPU, or else one for each core.
    """

    executor: ExecutorName = "local"
    workers: Annotated[int, Range(ge=1, le=1 << 16)] | None = None


@dataclass
class BuildSettings(ExecutorSettings, FilterSettings, EmbedderSettings, ChunkSettings):
    """What a datastore is built from, and how.

    Arguments:
        store: Folder of the datastore.
        inputs: Documents: .jsonl, .json, .csv, .tsv, .txt, .md or .rst files, also compressed (.gz, .bz2, .xz, .zst);
            .parquet or .arrow files; folders of those; patterns with "*" or "**"; `datasets` as NAME, NAME:SPLIT
            or NAME:CONFIGURATION:SPLIT, with stream: in front without a copy on disk, or a saved folder; package:NAME,
            the documentation of a package.
        tokenizer: Hugging Face name or folder, a GGUF file, or package:NAME for the GGUF file of an installed package.
        min_chunk_len: Tokens of the shortest chunk that a search may return; shorter ones keep their row.
        on_bad: What to do at a record that is no document, or has another's id: "error" stops, "reject" lists it in
            rejects/.
        index: The index to build: auto, exact, scann, scann:CODES, routed, faiss, faiss:CODES, tfidf, bm25, or several
            joined by +; "none" builds no index.
        recall: Share of the true nearest keys that an approximate index is tuned to find, such as 0.95. Default: the
            index's own.
        shard_chunks: Chunks of a shard; it is closed before the document that would take it beyond.
    """

    store: str
    inputs: list[str]
    tokenizer: str
    min_chunk_len: Count = 8
    on_bad: Literal["error", "reject"] = "error"
    index: str = "auto"
    recall: Annotated[float, Range(gt=0, le=1)] | None = None
    shard_chunks: Count = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store = os.fspath(self.store)
        self.tokenizer, self.embedder = os.fspath(self.tokenizer), os.fspath(self.embedder)
        self.inputs = as_list(self.inputs)
        kinds = parse_kind(self.index, keyless=self.embedder == NO_EMBEDDER) if self.index != "none" else []
        if self.recall is not None and not {"auto", *ENGINES} & {kind.partition(":")[0] for kind in kinds}:
            raise ValueError(f"recall is given, but index is {self.index}, which is not tuned to one; leave recall out")
        if not 1 <= self.min_chunk_len <= self.chunk_len:
            raise ValueError(f"min_chunk_len must be from 1 to chunk_len ({self.chunk_len}), not {self.min_chunk_len}")


def embedder_of_settings(settings: BuildSettings) -> Embedder:
    chosen = {name: getattr(settings, name) for name in EMBEDDER_CHOICES + LATER_CHOICES}
    if settings.embedder != NO_EMBEDDER:
        return load_embedder(settings.embedder, **chosen, batch_size=settings.batch_size, compile=settings.compile)
    chosen |= {name: getattr(settings, name) for name in ("key_dtype", "batch_size", "compile")}
    given = [name for name, value in chosen.items() if value != getattr(BuildSettings, name)]
    if given:
        raise ValueError(f"{given[0]} is given, but embedder is none; leave it out or name an embedder")
    return NoEmbedder()
