"""Starts that are copied from the base: CCA from its layer's self-attention, the encoder from the first layers."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from retro.modules import NeighborEncoder
from retro.modules.feed_forward import ACTIVATIONS
from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig, attention_sizes

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
# names of one matrix for queries, keys and values, and how its rows are laid out; model types laid out in other ways
FUSED = {"qkv_proj": "parts", "c_attn": "parts", "Wqkv": "parts", "query_key_value": "heads"}
OTHER_LAYOUTS = ("codegen", "falcon")
NORMS_BEFORE_ATTENTION = (
    "input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "operator_norm", "attention_layernorm", "attn_norm",
)  # fmt: skip
LLAMA_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def start_cca_from_self_attention(
    cca: nn.Module, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy, number: int
) -> None:
    """Copy W_q, W_k, W_v, W_o and the norm before them into CCA. Biases are left behind: CCA has none.

    Raises ValueError, naming the base, where they cannot be read or have other sizes.
    """
    name = f"cca_init is 'self_attention', but layer {number} of {type(base).__name__}"
    if config.encoder_hidden_size != config.hidden_size:
        raise ValueError(
            f"cca_init is 'self_attention', but encoder_hidden_size is {config.encoder_hidden_size}; "
            f"it must be the base's {config.hidden_size}."
        )
    layer = anatomy.layer(base, number)
    matrices = projections(getattr(layer, anatomy.attention_name), config.base_config.get_text_config())
    if matrices is None:
        raise ValueError(f"{name} has no projections that can be told apart; take cca_init='random'.")
    for part, matrix in matrices.items():
        weight = getattr(cca.cross_attention.attention, f"{part}_proj").weight
        if weight.shape != matrix.shape:
            sizes = f"{list(matrix.shape)}, not {list(weight.shape)}"
            raise ValueError(f"{name} has a {part} projection of {sizes}; take cca_init='random'.")
        weight.copy_(matrix)
    norm = next((getattr(layer, n) for n in NORMS_BEFORE_ATTENTION if hasattr(layer, n)), None)
    if norm is not None:
        cca.norm.weight.copy_(norm_scale(norm, config.hidden_size))


def projections(attention: nn.Module, base_config: PreTrainedConfig) -> dict[str, Float[Tensor, "o i"]] | None:
    """The matrices q, k, v, o of a self-attention as nn.Linear holds them; None where they cannot be told apart."""
    parts = {name.rpartition(".")[2]: module for name, module in attention.named_modules()}
    out = next((_matrix(parts[name]) for name in OUTPUTS if name in parts), None)
    found = [_matrix(parts.get(f"{name}_proj")) for name in "qkv"]
    if any(matrix is None for matrix in found):
        found = _split(parts, base_config)
    return None if found is None or out is None else dict(zip("qkvo", (*found, out), strict=True))


def _split(parts: dict[str, nn.Module], base_config: PreTrainedConfig) -> list[Tensor] | None:
    name = next((name for name in FUSED if name in parts), None)
    whole = None if name is None else _matrix(parts[name])
    heads, kv_heads, head_dim = attention_sizes(base_config)
    if whole is None or base_config.model_type in OTHER_LAYOUTS:
        return None
    if whole.shape[0] != (heads + 2 * kv_heads) * head_dim:
        return None
    if FUSED[name] == "heads":
        return list(rearrange(whole, "(h three dh) d -> three (h dh) d", three=3, dh=head_dim))
    return list(whole.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]))


def _matrix(module: nn.Module | None) -> Tensor | None:
    """The weight [out, in] of a linear map that is not quantised."""
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        return None
    return weight.T if type(module).__name__ == "Conv1D" else weight


@torch.no_grad()
def norm_scale(norm: nn.Module, dim: int) -> Float[Tensor, " d"]:
    """By what a norm scales each channel, whatever it calls its weight: read off numbers of mean 0 and square 1."""
    like = next(norm.parameters(), torch.zeros(1))
    ones = torch.ones(dim, device=like.device, dtype=like.dtype)
    ones[1::2] = -1
    return (norm(ones[None])[0] - norm(-ones[None])[0]) / 2 * ones


def start_encoder_from_base(
    encoder: NeighborEncoder, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy
) -> None:
    """Copy the base's first layers into the encoder's, whose self-attention then sees both sides.

    What reads H_u, which the base does not have, keeps its random start. The base has been through `require_llama`.
    """
    for number, block in enumerate(encoder.layers, start=1):
        layer = anatomy.layer(base, number)
        block.attention_norm.weight.copy_(norm_scale(layer.input_layernorm, config.hidden_size))
        block.feed_forward_norm.weight.copy_(norm_scale(layer.post_attention_layernorm, config.hidden_size))
        for part in "qkvo":
            _copy(block.attention, layer.self_attn, f"{part}_proj")
        for part in ("gate", "up", "down"):
            _copy(block.feed_forward, layer.mlp, f"{part}_proj")


def _copy(target: nn.Module, source: nn.Module, name: str) -> None:
    weight, matrix = getattr(target, name).weight, getattr(source, name).weight
    if weight.shape != matrix.shape:
        raise ValueError(
            f"encoder_init is 'base', whose {name} is {list(matrix.shape)}, but the encoder's is {list(weight.shape)}; "
            "leave the encoder's sizes out."
        )
    weight.copy_(matrix)


def require_llama(config: RetrofitConfig, base: nn.Module, anatomy: Anatomy) -> None:
    """Raise ValueError, naming what differs, unless the base's first layers can become the encoder's."""
    reason = _unlike_llama(config, base, anatomy)
    if reason is not None:
        raise ValueError(
            f"encoder_init is 'base', but {type(base).__name__} {reason}, so that its layers cannot become an "
            "encoder's; take encoder_init='random'."
        )


def _unlike_llama(config: RetrofitConfig, base: nn.Module, anatomy: Anatomy) -> str | None:
    """What keeps the first layers from becoming encoder layers; None if nothing does."""
    if config.encoder_num_layers > anatomy.num_layers:
        return f"has {anatomy.num_layers} layers and encoder_num_layers is {config.encoder_num_layers}"
    if not config.encoder_shares_embeddings or config.encoder_hidden_size != config.hidden_size:
        return "needs an encoder of its own width that shares its embeddings"
    layers = [anatomy.layer(base, number + 1) for number in range(config.encoder_num_layers)]
    missing = [name for name in LLAMA_PARTS if any(not hasattr(layer, name) for layer in layers)]
    if missing:
        return f"has no {missing[0]} in its layers"
    if any(writer.kind != "between" or writer.scale != 1 for writer in anatomy.writers.values()):
        return "has a scaled or parallel residual"
    extra = [name for name, _ in layers[0].self_attn.named_children() if name[1:] != "_proj"]
    if extra:
        return f"has {extra[0]} in its self-attention"
    return _unlike_matrices(layers) or _unlike_activation(config)


def _unlike_matrices(layers: list[nn.Module]) -> str | None:
    for layer in layers:
        for part, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down")):
            for name in names.split():
                linear = getattr(part, f"{name}_proj", None)
                if _matrix(linear) is None:
                    return f"has no {name}_proj in its {type(part).__name__}"
                if linear.bias is not None:
                    return f"has a bias in {name}_proj"
    return None


def _unlike_activation(config: RetrofitConfig) -> str | None:
    name = getattr(config.base_config.get_text_config(), "hidden_act", None)
    return None if name in ACTIVATIONS else f"has the activation {name}"


def encoder_rope_theta(base_config: PreTrainedConfig) -> float:
    """The base's rotary base; 10,000 where it has none."""
    rope = getattr(base_config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta", 10_000.0))
