"""What an embedder multiplies for a text: numbers of its architecture, without its weights.

Operations of a text of t tokens, a multiplication and an addition counting as two:

    2 t x weights of matrices  +  4 t^2 x attention width  +  2 x weights of what runs once a text

Attention width = layers x heads x head size. Embeddings are looked up; norms, activations, biases and softmax are left
out, as torch's FlopCounterMode leaves them out. Source: Kaplan et al. 2020, section 2.1, with the attention in full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retro.retrieval.embedding.embedder import EXTRA_COLUMNS, NO_EMBEDDER
from retro.retrieval.embedding.presets import PRESETS, preset_of


@dataclass(frozen=True)
class EmbedderShape:
    """The numbers above; `dim` is the width of a key, `parameters` is all weights, embeddings included."""

    name: str
    dim: int
    weights: int
    attention_width: int
    weights_per_text: int
    parameters: int

    def flops(self, tokens: float | int) -> float:
        """Operations of one text of so many tokens."""
        return 2.0 * tokens * self.weights + 4 * tokens**2 * self.attention_width + 2 * self.weights_per_text


def embedder_shape(name: str) -> EmbedderShape:
    """The shape of an embedder by preset, Hugging Face name or folder; known presets need no download.

    Raises ValueError if the configuration cannot be read.
    """
    if name == NO_EMBEDDER:
        return EmbedderShape(name, 0, 0, 0, 0, 0)
    preset = preset_of(name)
    known = next((short for short, found in PRESETS.items() if found is preset), None) if preset else None
    if known in _KNOWN:
        model_type, sizes = _KNOWN[known]
        shape = shape_of_config(_config(model_type, sizes), name)
        shape = _with_head(shape, _DENSE_HEADS[known]) if known in _DENSE_HEADS else shape
    else:
        shape = shape_of_config(_read_config(name), name)
    inner_product = preset is not None and preset.similarity == "dot"
    return replace(shape, dim=shape.dim + EXTRA_COLUMNS) if inner_product else shape


def _with_head(shape: EmbedderShape, dim: int) -> EmbedderShape:
    """The shape with a Dense head that maps a text's vector to `dim` numbers."""
    weights = shape.dim * dim
    once, parameters = shape.weights_per_text + weights, shape.parameters + weights
    return replace(shape, dim=dim, weights_per_text=once, parameters=parameters)


def shape_of_config(config: Any, name: str = "") -> EmbedderShape:
    """The shape of the model that a transformers configuration describes, made without memory for its weights."""
    import torch
    from transformers import AutoModel, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(config) if config.model_type == "t5" else AutoModel.from_config(config)
    looked_up = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2 and id(p) not in looked_up}
    once = sum(count for n, count in matrices.items() if n.startswith("pooler."))
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return EmbedderShape(
        name,
        config.hidden_size,
        sum(matrices.values()) - once,
        config.num_hidden_layers * heads * head_dim,
        once,
        sum(p.numel() for p in model.parameters()),
    )


_BERT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
_SMALL = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
_DECODER = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
_ROBERTA, _MULTILINGUAL = dict(vocab_size=50265), dict(vocab_size=250037)
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "minilm": ("bert", {**_SMALL, "num_hidden_layers": 6}),
    **dict.fromkeys(("bert-base-uncased", "contriever", "contriever-msmarco", "dpr", "dragon"), ("bert", _BERT)),
    **dict.fromkeys(("e5-base", "e5-base-v2", "bge-base-en-v1.5", "dpr-single-nq"), ("bert", _BERT)),
    **dict.fromkeys(("e5-large", "e5-large-v2", "bge-large-en-v1.5"), ("bert", _LARGE)),
    **dict.fromkeys(("e5-small-v2", "bge-small-en-v1.5"), ("bert", _SMALL)),
    "dragon-roberta": ("roberta", {**_BERT, **_ROBERTA}),
    "multilingual-e5-small": ("bert", {**_SMALL, **_MULTILINGUAL}),
    "multilingual-e5-base": ("xlm-roberta", {**_BERT, **_MULTILINGUAL}),
    "multilingual-e5-large": ("xlm-roberta", {**_LARGE, **_MULTILINGUAL}),
    "gtr-t5-base": ("t5", dict(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12)),
    "gtr-t5-large": ("t5", dict(d_model=1024, d_ff=4096, d_kv=64, num_layers=24, num_heads=16)),
    "grit": ("mistral", {**_DECODER, "num_key_value_heads": 8, "vocab_size": 32000}),
    "reasonir": ("llama", {**_DECODER, "num_key_value_heads": 8, "vocab_size": 128256}),
}
_DENSE_HEADS = {"gtr-t5-base": 768, "gtr-t5-large": 768}


def _config(model_type: str, sizes: dict[str, int]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **sizes)


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    from retro.retrieval.embedding.embedder import quiet_loading

    try:
        with quiet_loading():
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        place = "it holds no config.json" if Path(name).is_dir() else "it is no folder and cannot be fetched"
        raise ValueError(
            f"the configuration of the embedder {name} cannot be read ({place}); "
            f"give a folder with its config.json, or a known one: {', '.join(_KNOWN)}"
        ) from None
