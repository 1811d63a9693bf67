"""What a RETRO-fit adds to a base, one class for each form.

A form is a module that holds every new weight. It names the points of the residual stream that it wants to see, and
writes in one of two ways: at each point it gives what to add to the stream, or, when the run is over, what to mix with
the logits. Hooks, the base and its dtype are not its business.

    "pointer"   copies from the neighbors by the base's own features: see retro.retrofit.pointer
    "paper"     the paper's encoder and chunked cross-attention: PaperForm
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules import ChunkedCrossAttention, NeighborEncoder
from retro.modules.encoder import chunks_of
from retro.modules.feed_forward import ResidualLinear
from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig, attention_sizes
from retro.retrofit.hooks import HookPoint, RetrofitContext
from retro.retrofit.pointer import PointerForm
from retro.retrofit.starts import (
    encoder_rope_theta,
    require_llama,
    start_cca_from_self_attention,
    start_encoder_from_base,
)


class Form(Protocol):
    """A form: an nn.Module made as Form(config, base, anatomy), on any device; `start` gives its weights their start.

    hook_points: in the order in which the base reaches them. mixes_logits: whether there may be a `mixture`.
    """

    hook_points: list[HookPoint]
    mixes_logits: bool

    def start(self, base: nn.Module, anatomy: Anatomy) -> None:
        """Give every weight its start, such that every update is exactly 0. Not called when weights are loaded."""

    def update(
        self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext
    ) -> Float[Tensor, "b n d"] | None:
        """What to add to the residual stream h at a hook point, in any type; None to only look.

        With `context.cache` h is that of new tokens, and what later ones need is kept there.

        The gradient of the whole must flow through what is returned and `context.state` only. With gradient
        checkpointing a point is computed again, in the backward pass: the same point must do the same work again.
        """

    def mixture(self, context: RetrofitContext) -> Mixture | None:
        """What to mix with the base's logits, once it has run over the text; None for a form that wrote before."""


@runtime_checkable
class Mixture(Protocol):
    """A distribution of a form's own, mixed with the base's."""

    def edit(self, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
        """The mixture's logits at the last s positions of the run, from the base's and in their type."""

    def log_likelihood(
        self, logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s"], start: int
    ) -> Float[Tensor, "b s"]:
        """The mixture's log-probability of a token each at positions start, start + 1, ..., from the base's logits."""


class GatedCrossAttention(nn.Module):
    """tanh(g) CCA(norm(H), E), g = 0 at the start: one number, or one per channel."""

    def __init__(self, dim: int, norm_eps: float, gate: str, **cross_attention):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.cross_attention = ChunkedCrossAttention(dim, **cross_attention)
        self.gate = nn.Parameter(torch.zeros(dim if gate == "channel" else 1))

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        encoded: Float[Tensor, "b l k r c"],
        neighbor_mask: Bool[Tensor, "b l k r"],
        document_ids: Int[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n d"]:
        return self.gate.tanh() * self.cross_attention(self.norm(h), encoded, neighbor_mask, document_ids)

    def read_held(
        self, h: Float[Tensor, "b n d"], reader: Callable[[ChunkedCrossAttention, Tensor], Tensor]
    ) -> Float[Tensor, "b n d"]:
        """The same of new tokens, where a cache holds what CCA reads."""
        return self.gate.tanh() * reader(self.cross_attention, self.norm(h))


class PaperForm(nn.Module):
    """The paper's RETRO-fit: an encoder conditioned on H, and CCA between self-attention and feed-forward.

    Differs: each CCA stands behind a gate that starts closed, so that training begins at the base itself.

    Source: RETRO, sections 2.4-2.5 and B.2.
    """

    mixes_logits = False

    def __init__(self, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy):
        super().__init__()
        if config.encoder_init == "base":
            require_llama(config, base, anatomy)
        self.config = config
        self.hook_points = [HookPoint(layer, "attention") for layer in config.cca_layers]
        self.encoder_embedding = _encoder_embedding(config, base)
        self.encoder = _encoder(config)
        self.cca = nn.ModuleDict({str(layer): _cross_attention(config) for layer in config.cca_layers})
        for layer, cca in self.cca.items():
            cca.to(next(anatomy.layer(base, int(layer)).parameters()).device)
        self.encoder.to(next(anatomy.layer(base, config.cca_layers[0]).parameters()).device)

    @torch.no_grad()
    def start(self, base: nn.Module, anatomy: Anatomy) -> None:
        """Normal of `initializer_range`; what writes into a residual stream divided by sqrt(2 x layers); gates 0."""
        random_start(self, self.config)
        if self.config.encoder_init == "base":
            start_encoder_from_base(self.encoder, self.config, base, anatomy)
        if self.config.cca_init == "self_attention":
            for layer, cca in self.cca.items():
                start_cca_from_self_attention(cca, self.config, base, anatomy, int(layer))

    def update(
        self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext
    ) -> Float[Tensor, "b n d"] | None:
        cca = self.cca[str(point.layer)]
        h = h.to(cca.gate.dtype)
        if context.cache is not None:
            return self._update_held(point, cca, h, context)
        if point == self.hook_points[0]:
            conditions = chunks_of(h, self.config.chunk_len)
            context.state["encoded"] = self._encode(
                context, context.neighbor_ids, context.neighbor_mask, conditions, context.condition_mask
            )
        encoded, mask, documents = (
            x if x is None else x.to(h.device)
            for x in (context.state["encoded"], context.neighbor_mask, context.document_ids)
        )
        return cca(h, encoded, mask, documents)

    def _update_held(
        self, point: HookPoint, cca: GatedCrossAttention, h: Float[Tensor, "b s d"], context: RetrofitContext
    ) -> Float[Tensor, "b s d"] | None:
        """With a cache: only neighbors of chunks that the new tokens complete are encoded."""
        cache, step = context.cache, context.step
        if point == self.hook_points[0]:
            conditions = cache.conditions(h, step)
            if step.found:
                ids, mask = step.neighbor_ids[:, None], step.neighbor_mask[:, None]
                step.encoded = self._encode(context, ids, mask, conditions[:, None])[:, 0]
        return cca.read_held(h, partial(cache.read, f"cca.{point.layer}", step)) if step.reads else None

    def mixture(self, context: RetrofitContext) -> None:
        """None: what there was to say is in the stream."""

    def _encode(
        self,
        context: RetrofitContext,
        neighbor_ids: Int[Tensor, "b l k r"],
        neighbor_mask: Bool[Tensor, "b l k r"],
        conditions: Float[Tensor, "b l m d"],
        condition_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r c"]:
        shares, device = self.config.encoder_shares_embeddings, conditions.device
        embedded = context.embed(neighbor_ids).to(conditions) if shares else neighbor_ids.to(device)
        if self.encoder_embedding is not None:
            embedded = self.encoder_embedding(embedded)
        condition_mask = None if condition_mask is None else condition_mask.to(device)
        return self.encoder(embedded, neighbor_mask.to(device), conditions, condition_mask)


@torch.no_grad()
def random_start(form: nn.Module, config: RetrofitConfig) -> None:
    """Normal of `initializer_range` for linear maps and embeddings, a part of it for what writes into a stream."""
    std = config.initializer_range
    for module in form.modules():
        if isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=std / (2 * config.num_hidden_layers) ** 0.5)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)


def _encoder_embedding(config: RetrofitConfig, base: nn.Module) -> nn.Module | None:
    """From token ids, or with shared embeddings from those, to the encoder's width; None where they fit."""
    width = config.encoder_hidden_size
    if not config.encoder_shares_embeddings:
        return nn.Embedding(config.vocab_size, width)
    shared = base.get_input_embeddings()
    shared_width = getattr(shared, "embedding_dim", None) or shared.weight.shape[-1]
    return None if shared_width == width else nn.Linear(shared_width, width, bias=False)


def _encoder(config: RetrofitConfig) -> NeighborEncoder:
    attention = dict(num_heads=config.encoder_num_attention_heads, head_dim=config.encoder_head_dim)
    feed_forward = dict(activation="gelu", gated=False)
    if config.encoder_init == "base":
        text = config.base_config.get_text_config()
        attention |= dict(num_key_value_heads=attention_sizes(text)[1], rope_theta=encoder_rope_theta(text))
        feed_forward = dict(activation=text.hidden_act, gated=True)
    return NeighborEncoder(
        dim=config.encoder_hidden_size,
        inner_dim=config.encoder_intermediate_size,
        num_layers=config.encoder_num_layers,
        condition_dim=config.hidden_size,
        cross_attention_layers=config.encoder_cross_attention_layers,
        attention=attention,
        feed_forward=feed_forward,
        norm_eps=config.rms_norm_eps,
    )


def _cross_attention(config: RetrofitConfig) -> GatedCrossAttention:
    heads, kv_heads, head_dim = attention_sizes(config.base_config.get_text_config())
    return GatedCrossAttention(
        config.hidden_size,
        config.rms_norm_eps,
        config.gate,
        context_dim=config.encoder_hidden_size,
        chunk_len=config.chunk_len,
        smeared_keys=config.smeared_keys,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )


FORMS: dict[str, type] = {"pointer": PointerForm, "paper": PaperForm}


def form_class(name: str) -> type:
    """The class of a form; ValueError, with the known names, for another."""
    if name not in FORMS:
        raise ValueError(f"form is {name!r}; choose one of {', '.join(FORMS)}.")
    return FORMS[name]
