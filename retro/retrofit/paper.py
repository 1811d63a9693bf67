"""The paper's form: an encoder conditioned on H, and CCA between self-attention and feed-forward.

With `start="reading"`, the default, it reads before it is trained. The frozen base knows where to look from its first
layers on, so that what is new starts as an induction head between texts (Olsson et al. 2022):

    E = norm(ENCODER(h, H_u))       h: the base's stream over a neighbor after `key_layer`, to which 0 is added at first
    a_t = softmax of tau c(t, j) over the tokens j of all neighbors, and of s    c: see retro.retrofit.matching
    CCA(H, E)_t = tanh|g| W_o sum_j a_t(j) W_v E(j + 1)                          g = 0 at the start

W_q starts as the linear map that finds h of the text in H best, and W_o W_v as that which finds the output embedding of
a neighbor's token in E, in the size of H: both by least squares over a text. What nothing in the neighbors resembles
attends to a sink (s), which holds nothing.

With `start="random"` encoder and CCA are the paper's, with random weights; only the gate, closed at first, is added.

Source: RETRO, sections 2.4-2.5 and B.2. Differs: keys stand one token before their values, see the tokens before
theirs, and have no positions; queries and keys are normalized; there are a sink and a gate; the encoder reads the
base's own features in the place of token embeddings.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules import ChunkedCrossAttention, NeighborEncoder
from retro.modules.encoder import chunks_of
from retro.modules.feed_forward import ResidualLinear
from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig, attention_sizes
from retro.retrofit.hooks import HookPoint, RetrofitContext
from retro.retrofit.matching import Matching, attending, neighbor_features
from retro.retrofit.pointer import opened
from retro.retrofit.starts import Observed, normed, ridge

START_SINK = 9.0  # s, half of tau


class PaperForm(nn.Module):
    """Encoder and CCA over a frozen base, in one of two starts."""

    mixes_logits = False

    def __init__(self, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy):
        super().__init__()
        self.config = config
        matching = {"log_sharpness": 30, "lags": 30, "sink": 30} if config.start == "reading" else {}
        self.lr_ratios = {**matching, "gate": 30, "encoder": 0.3, "cca": 0.3}
        self.hook_points = [HookPoint(layer, "attention") for layer in config.cca_layers]
        self.start_points = self.hook_points if config.start == "reading" else []
        self.encoder_embedding = _encoder_embedding(config, base)
        self.encoder = _encoder(config)
        cross_attention = ReadingCrossAttention if config.start == "reading" else GatedCrossAttention
        self.cca = nn.ModuleDict({str(layer): cross_attention(config) for layer in config.cca_layers})
        for layer, cca in self.cca.items():
            cca.to(next(anatomy.layer(base, int(layer)).parameters()).device)
        first = next(anatomy.layer(base, config.cca_layers[0]).parameters()).device
        self.encoder.to(first)
        if self.encoder_embedding is not None:
            self.encoder_embedding.to(first)

    @torch.no_grad()
    def start(self, observed: Observed) -> None:
        """Normal of `initializer_range`; what writes into a stream 0, or small with a random start; gates 0."""
        std, reading = self.config.initializer_range, self.config.start == "reading"
        for module in self.modules():
            if isinstance(module, ResidualLinear):
                nn.init.normal_(module.weight, std=0.0 if reading else std / (2 * self.config.num_hidden_layers) ** 0.5)
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for layer, cca in self.cca.items():
            cca.gate.zero_()
            if reading:
                cca.start(observed, HookPoint(int(layer), "attention"))

    def update(
        self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext
    ) -> Float[Tensor, "b n d"] | None:
        cca = self.cca[str(point.layer)]
        h = h.to(cca.gate.dtype)
        if point == self.hook_points[0]:
            self._encode_neighbors(h, context)
        encoded = context.state["encoded"] if context.cache is None else context.step.encoded
        encoded = None if encoded is None else encoded.to(h.device)
        return cca(h, encoded, context, f"cca.{point.layer}")

    def mixture(self, context: RetrofitContext) -> None:
        """None: what there was to say is in the stream."""

    def _encode_neighbors(self, h: Float[Tensor, "b n d"], context: RetrofitContext) -> None:
        """E of the run's neighbors; with a cache only of those of chunks that the new tokens complete."""
        cache, step = context.cache, context.step
        if cache is None:
            conditions, mask = chunks_of(h, self.config.chunk_len), context.condition_mask
            context.state["encoded"] = self._encode(
                context, context.neighbor_ids, context.neighbor_mask, conditions, mask
            )
            return
        reads_chunks = self.encoder.condition_norm is not None
        conditions = cache.conditions(h, step) if reads_chunks else None
        if step.found:
            if conditions is None:
                conditions = h.new_zeros(len(step.neighbor_ids), 0, h.shape[2])
            ids, mask = step.neighbor_ids[:, None], step.neighbor_mask[:, None]
            step.encoded = self._encode(context, ids, mask, conditions[:, None])[:, 0]

    def _encode(
        self,
        context: RetrofitContext,
        neighbor_ids: Int[Tensor, "b l k r"],
        neighbor_mask: Bool[Tensor, "b l k r"],
        conditions: Float[Tensor, "b l m d"],
        condition_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r c"]:
        device = conditions.device
        if self.config.start == "reading":
            read = neighbor_features(context, self.config.key_layer).to(conditions)
            embedded = normed(read, self.config.rms_norm_eps).unflatten(0, neighbor_ids.shape[:2])
        else:
            shares = self.config.encoder_shares_embeddings
            embedded = context.embed(neighbor_ids).to(conditions) if shares else neighbor_ids.to(device)
        if self.encoder_embedding is not None:
            embedded = self.encoder_embedding(embedded)
        condition_mask = None if condition_mask is None else condition_mask.to(device)
        return self.encoder(embedded, neighbor_mask.to(device), conditions, condition_mask)


class ReadingCrossAttention(nn.Module):
    """CCA of the reading start: one head as wide as the stream, that matches and reads on."""

    def __init__(self, config: RetrofitConfig):
        super().__init__()
        d, device = config.hidden_size, torch.device("cpu")
        self.config = config
        self.matching = Matching(d, d, config.key_lags, config.rms_norm_eps, device)
        self.sink = nn.Parameter(torch.empty(1))
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def start(self, observed: Observed, point: HookPoint) -> None:
        """W_k and W_v are I, W_q and W_o W_v linear maps by least squares.

        Where the output embeddings are not a matrix of the stream's width, W_o stays random.
        """
        stream, features, center = observed.streams[point], observed.features, observed.center
        directions = F.normalize(features - center, dim=-1)
        self.matching.start(center, ridge(normed(stream, self.config.rms_norm_eps), directions))
        self.sink.fill_(START_SINK)
        nn.init.eye_(self.value.weight)
        embeddings, d = observed.embeddings, self.config.hidden_size
        if embeddings is not None and embeddings.shape[1] == d:
            mean = embeddings.mean(0, dtype=torch.float32).cpu()
            directions = F.normalize(embeddings[observed.tokens.to(embeddings.device)].float().cpu() - mean, dim=-1)
            self.out.weight.copy_(ridge(features, directions * d**0.5 * stream.square().mean().sqrt())[0])

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        encoded: Float[Tensor, "b l k r c"] | Float[Tensor, "c k r c"] | None,
        context: RetrofitContext,
        name: str,
    ) -> Float[Tensor, "b n d"] | None:
        """What is added to h; `encoded` is None where a step with a cache brings no neighbors."""
        new = None
        if encoded is not None:
            encoded = encoded.flatten(0, -4)
            new = {"keys": self.matching.keys(encoded), "values": self.value(encoded)}
        found = attending(context, name, self.matching.queries(h), new, self.config.key_lags, self.config.chunk_len)
        if found is None:
            return None
        scores = self.matching(found.queries, found.given["keys"], found.given["mask"])
        sink = self.sink.expand(*scores.shape[:2], 1)
        attention = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] * found.readable[..., None]
        values = rearrange(found.given["values"][..., 1:, :], "c k r d -> c (k r) d")
        return opened(self.gate) * found.place(self.out(attention @ values))


class GatedCrossAttention(nn.Module):
    """tanh(g) CCA(norm(H), E), g = 0 at the start: one number, or one per channel."""

    def __init__(self, config: RetrofitConfig):
        super().__init__()
        heads, kv_heads, head_dim = attention_sizes(config.base_config.get_text_config())
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attention = ChunkedCrossAttention(
            config.hidden_size,
            context_dim=config.encoder_hidden_size,
            chunk_len=config.chunk_len,
            num_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
        self.gate = nn.Parameter(torch.zeros(config.hidden_size if config.gate == "channel" else 1))

    def forward(
        self, h: Float[Tensor, "b n d"], encoded: Float[Tensor, "..."] | None, context: RetrofitContext, name: str
    ) -> Float[Tensor, "b n d"] | None:
        """What is added to h. With a cache what CCA reads is held there, and `encoded` None where nothing is new."""
        if context.cache is None:
            mask, documents = (
                None if x is None else x.to(h.device) for x in (context.neighbor_mask, context.document_ids)
            )
            return self.gate.tanh() * self.cross_attention(self.norm(h), encoded, mask, documents)
        if not context.step.reads:
            return None
        read = partial(context.cache.read, name, context.step)
        return self.gate.tanh() * read(self.cross_attention, self.norm(h))


def _encoder_embedding(config: RetrofitConfig, base: nn.Module) -> nn.Module | None:
    """From token ids, or with shared embeddings from those, to the encoder's width; None where they fit."""
    if config.start == "reading":
        return None
    width = config.encoder_hidden_size
    if not config.encoder_shares_embeddings:
        return nn.Embedding(config.vocab_size, width)
    shared = base.get_input_embeddings()
    shared_width = getattr(shared, "embedding_dim", None) or shared.weight.shape[-1]
    return None if shared_width == width else nn.Linear(shared_width, width, bias=False)


def _encoder(config: RetrofitConfig) -> NeighborEncoder:
    return NeighborEncoder(
        dim=config.encoder_hidden_size,
        inner_dim=config.encoder_intermediate_size or 0,
        num_layers=config.encoder_num_layers,
        condition_dim=config.hidden_size,
        cross_attention_layers=config.encoder_cross_attention_layers or [],
        attention=dict(num_heads=config.encoder_num_attention_heads, head_dim=config.encoder_head_dim),
        feed_forward=dict(activation="gelu", gated=False),
        norm_eps=config.rms_norm_eps,
    )
