"""The pointer form: a token may copy what followed where a neighbor reads most like the text before it.

The base's own features say where that is. h(t) is its residual stream after layer `key_layer`, of the text and of each
neighbor read alone:

    q_t = norm(W_q h(t) + b_q),  k_j = norm(W_k h(j) + b_k)
    c(t, j) = sum_i w_i q_{t-i} . k_{j-i},  i = 0..key_lags       a run of matches counts
    a_t = softmax_j(tau c(t, j))                                   over the tokens j of all neighbors of t's chunk
    p_copy(y) = sum of a_t(j) over the j whose next token is y
    g_t = tanh|alpha| sigmoid(w_g . rmsnorm(h_last(t)) + b + c_g max_j c(t, j) + d log sum_j a_t(j) p(y_j))
    p'(y) = (1 - g_t) p(y) + g_t p_copy(y)                         p: the base's distribution

A token reads the neighbors that CCA would read: E_u of the last whole chunk of its document. alpha starts at 0, where
the logits are the base's bit for bit.

Differs: the paper's CCA adds encoded neighbors to the residual stream inside the decoder, through an encoder and
projections that start at random; in 20,000 tokens it gained as much from random neighbors as from true ones, on
SmolLM2-135M. Here what is new starts as a working pointer: keys one token back of their values, as an induction head
has them (Olsson et al. 2022); a copy distribution mixed in by a gate (See et al. 2017, pointer-generator); the base's
own features as keys and the next tokens as values (Khandelwal et al. 2020, kNN-LM).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro.modules.cross_attention import in_sequence, may_read
from retro.modules.loss import SLICE_TOKENS
from retro.retrofit.anatomy import Anatomy, hidden_after
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.hooks import HookPoint, RetrofitContext

START_SHARPNESS = 18.0  # tau
LAG_DECAY = 0.7
PROBE_SHAPE = (8, 64)  # rows and tokens of the text that the features are centered on at the start
GATE_LIMIT = 1 - 2**-10  # a token that no neighbor holds keeps a probability
LEAST_LOG_P = -80.0  # float32 could not hold the inverse of less


class PointerForm(nn.Module):
    """The pointer's weights: two linear maps, the lags, the sharpness and the gate. It writes to the logits only."""

    mixes_logits = True

    def __init__(self, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy):
        super().__init__()
        self.config, self.last_layer = config, anatomy.num_layers
        self.hook_points = [HookPoint(layer, "end") for layer in sorted({config.key_layer, anatomy.num_layers})]
        device = next(base.get_output_embeddings().parameters()).device
        self.query = nn.Linear(config.hidden_size, config.hidden_size, device=device)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, device=device)
        self.lags = nn.Parameter(torch.empty(config.key_lags + 1, device=device))
        self.log_sharpness = nn.Parameter(torch.empty(1, device=device))
        self.gate = CopyGate(config.hidden_size, config.rms_norm_eps, device)

    @torch.no_grad()
    def start(self, base: nn.Module, anatomy: Anatomy) -> None:
        """W_q and W_k are I, and their biases center the features; earlier lags weigh less; the gate is shut.

        The center is the mean over random tokens, the same for every start: training moves it on. On SmolLM2-135M the
        mean over real text gave 0.1 and 0.5% fewer bits at 14,000 tokens (two seeds), and no more than noise at 57,000.
        """
        center = _center(base, anatomy, self.config)
        for linear in (self.query, self.key):
            nn.init.eye_(linear.weight)
            linear.bias.copy_(-center)
        decay = LAG_DECAY ** torch.arange(len(self.lags))
        self.lags.copy_(decay / decay.sum())
        self.log_sharpness.fill_(math.log(START_SHARPNESS))
        self.gate.start()

    def update(self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext) -> None:
        """Keep the stream as it is here."""
        context.state[point.layer] = h

    def mixture(self, context: RetrofitContext) -> CopyMixture | None:
        """What each token of the text may copy, how likely, and how far it is believed."""
        if context.cache is not None:
            return self._mixture_held(context)
        neighbor_ids, neighbor_mask, documents = (
            x if x is None else x.to(self.lags.device)
            for x in (context.neighbor_ids, context.neighbor_mask, context.document_ids)
        )
        m, (b, num_chunks), n = self.config.chunk_len, neighbor_ids.shape[:2], context.state[self.last_layer].shape[1]
        ids, mask = (rearrange(x, "b l k r -> (b l) k r") for x in (neighbor_ids, neighbor_mask))
        queries = _attending_chunks_with_lags(self._queries(context), m, num_chunks, self.config.key_lags)
        readable = may_read(neighbor_mask[..., 1:], m, documents)  # [b, l, m]
        copied = self._copied(
            rearrange(queries, "b l t d -> (b l) t d"),
            self._keys(ids, mask, context),
            ids,
            mask,
            readable.flatten(0, 1),
        )
        copied = (in_sequence(rearrange(x, "(b l) m c -> b l m c", b=b), n) for x in copied)
        return self._mixed(*copied, in_sequence(readable[..., None], n), context)

    def _mixture_held(self, context: RetrofitContext) -> CopyMixture | None:
        """The same for new tokens: of the neighbors the cache holds keys and tokens, of the text the lagged queries."""
        cache, step, lags = context.cache, context.step, self.config.key_lags
        new = self._queries(context)
        before = cache.rows.get("queries", new.new_zeros(new.shape[0], lags, new.shape[2]))
        queries = torch.cat([before, new], dim=1)
        cache.rows["queries"] = queries[:, queries.shape[1] - lags :].detach()
        if context.keep is not None:
            step.keep_last(context.keep)
        ids = mask = keys = None
        if step.found:
            ids, mask = step.neighbor_ids.to(new.device), step.neighbor_mask.to(new.device)
            keys = self._keys(ids, mask, context)
        if step.is_decode:
            return self._mixture_of_decode(queries, keys, ids, context) if step.reads else None
        chunks = step.attending_chunks(new.device, context.keep)
        if not len(chunks.rows):
            return None
        given = [cache.gather(*x, chunks, step) for x in (("keys", keys), ("ids", ids), ("mask", mask))]
        self._hold(keys, ids, context)
        columns = chunks.columns[:, :1] + torch.arange(lags + self.config.chunk_len, device=new.device)
        rows = queries[chunks.rows[:, None], columns.clamp(0, queries.shape[1] - 1)]
        readable = given[2][..., 1:].flatten(1).any(-1)[:, None].expand_as(chunks.columns)
        scattered = (
            step.scatter(x, chunks, context.keep) for x in (*self._copied(rows, *given, readable), readable[..., None])
        )
        return self._mixed(*scattered, context)

    def _mixture_of_decode(self, queries, keys, ids, context: RetrofitContext) -> CopyMixture:
        cache, step, device = context.cache, context.step, queries.device
        self._hold(keys, ids, context)
        keys, ids, mask = (cache.rows[name].to(device) for name in ("keys", "ids", "mask"))
        readable = mask[..., 1:].flatten(1).any(-1, keepdim=True)
        if step.unread is not None:
            readable = readable & ~step.unread.to(device)[:, None]
        copied = self._copied(queries, keys, ids, mask, readable)
        return self._mixed(*copied, readable[..., None], context)

    def _hold(self, keys: Tensor | None, ids: Tensor | None, context: RetrofitContext) -> None:
        if keys is not None:
            context.cache.hold("keys", keys, context.step)
            context.cache.hold("ids", ids, context.step)

    def _queries(self, context: RetrofitContext) -> Float[Tensor, "b n d"]:
        return F.normalize(self.query(context.state[self.config.key_layer].to(self.lags)), dim=-1)

    def _keys(
        self, neighbor_ids: Int[Tensor, "c k r"], neighbor_mask: Bool[Tensor, "c k r"], context: RetrofitContext
    ) -> Float[Tensor, "c k r d"]:
        read = context.hidden_after(neighbor_ids.flatten(0, 1), neighbor_mask.flatten(0, 1), self.config.key_layer)
        keys = F.normalize(self.key(read.to(self.lags)), dim=-1)
        return rearrange(keys, "(c k) r d -> c k r d", k=neighbor_ids.shape[1])

    def _copied(
        self,
        queries: Float[Tensor, "c t d"],
        keys: Float[Tensor, "c k r d"],
        neighbor_ids: Int[Tensor, "c k r"],
        neighbor_mask: Bool[Tensor, "c k r"],
        readable: Bool[Tensor, "c w"],
    ) -> tuple[Int[Tensor, "c w j"], Float[Tensor, "c w j"], Float[Tensor, "c w 1"]]:
        """Tokens that w = t - lags tokens may copy, how likely, and the best match; j = k (r - 1).

        Lags never cross the beginning of a neighbor. Nor that of the text or document, since they are fewer than the
        tokens of a chunk: a token that reads E_u has all of C_u before it.
        """
        w = queries.shape[1] - self.config.key_lags
        dots, matches = torch.einsum("ctd, ckrd -> ctkr", queries, keys), 0.0
        for lag, weight in enumerate(self.lags):
            start = len(self.lags) - 1 - lag
            matches = matches + weight * F.pad(dots[:, start : start + w], (lag, 0))[..., : dots.shape[-1]]
        matches = rearrange(matches[..., :-1], "c w k r -> c w (k r)")  # key j has a value, token j + 1
        no_key, least = ~rearrange(neighbor_mask[..., 1:], "c k r -> c 1 (k r)"), torch.finfo(matches.dtype).min
        attention = (self.log_sharpness.exp() * matches).masked_fill(no_key, least).softmax(-1) * readable[..., None]
        best = torch.where(readable, matches.masked_fill(no_key, least).amax(-1), 0.0)
        return repeat(neighbor_ids[..., 1:], "c k r -> c w (k r)", w=w), attention, best[..., None]

    def _mixed(self, tokens, attention, best, readable, context: RetrofitContext) -> CopyMixture:
        last = context.state[self.last_layer][:, -tokens.shape[1] :].to(attention)
        belief = self.gate(last, best[..., 0]).masked_fill(~readable[..., 0], -torch.inf)
        return CopyMixture(tokens, attention, belief, self.gate.likelihood, self.gate.opened())


class CopyGate(nn.Module):
    """tanh|alpha| sigmoid(w_g . rmsnorm(h) + b + c_g best match + d log agreement), in two parts.

    It starts as opening (alpha) 0, hidden (w_g) 0, bias (b) -8, match (c_g) 10, likelihood (d) 0. The sign of alpha
    means nothing: it is never dead, and the gate never negative.
    """

    def __init__(self, dim: int, norm_eps: float, device: torch.device):
        super().__init__()
        self.norm_eps = norm_eps
        self.hidden = nn.Parameter(torch.empty(dim, device=device))
        self.bias, self.match, self.likelihood, self.opening = (
            nn.Parameter(torch.empty(1, device=device)) for _ in range(4)
        )

    def start(self) -> None:
        values = {"hidden": 0.0, "bias": -8.0, "match": 10.0, "likelihood": 0.0, "opening": 0.0}
        for name, value in values.items():
            getattr(self, name).fill_(value)

    def forward(self, h: Float[Tensor, "b n d"], best: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """What the sigmoid is taken of, but for the part that needs the base's distribution."""
        normed = F.rms_norm(h, h.shape[-1:], eps=self.norm_eps)
        return normed @ self.hidden + self.bias + self.match * best

    def opened(self) -> Float[Tensor, "1"]:
        """tanh|alpha|, whose gradient at 0 is 1."""
        return torch.tanh(torch.where(self.opening >= 0, self.opening, -self.opening))


@dataclass
class CopyMixture:
    """The distribution to copy from at each position and what its gate needs, to be mixed with the base's logits.

    tokens, attention: what may be copied and how likely; 0 where nothing may be read. belief: the gate before its
    sigmoid, but for the likelihood part; -inf where nothing may be read.
    """

    tokens: Int[Tensor, "b n c"]
    attention: Float[Tensor, "b n c"]
    belief: Float[Tensor, "b n"]
    likelihood: Float[Tensor, "1"]
    opened: Float[Tensor, "1"]

    def edit(self, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
        """Logits of p' at the last s positions; their log-sum-exp is that of the base's."""
        b, length = logits.shape[:2]
        step, start = max(1, SLICE_TOKENS // b), self.attention.shape[1] - length
        return torch.cat([self._edit(logits[:, i : i + step], start + i) for i in range(0, length, step)], dim=1)

    def _edit(self, logits: Float[Tensor, "b s v"], start: int) -> Float[Tensor, "b s v"]:
        part = slice(start, start + logits.shape[1])
        log_p = logits.to(self.attention).log_softmax(-1)
        tokens, attention = self.tokens[:, part], self.attention[:, part]
        copied = torch.zeros_like(log_p).scatter_add(-1, tokens, attention)
        gate = self._gate(log_p.gather(-1, tokens), part)[..., None]
        return (logits.to(log_p) + _log_change(gate, copied, log_p)).to(logits.dtype)

    def log_likelihood(
        self, logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s"], start: int
    ) -> Float[Tensor, "b s"]:
        """log p'(target) at positions start, start + 1, ...; nothing of the vocabulary's size is kept for gradients."""
        part = slice(start, start + logits.shape[1])
        logits = logits.to(self.attention)
        log_sum = logits.logsumexp(-1, keepdim=True)
        tokens, attention = self.tokens[:, part], self.attention[:, part]
        log_p = (logits.gather(-1, targets[..., None]) - log_sum)[..., 0]
        copied = (attention * (tokens == targets[..., None])).sum(-1)
        gate = self._gate(logits.gather(-1, tokens) - log_sum, part)
        return log_p + _log_change(gate, copied, log_p)

    def _gate(self, log_p: Float[Tensor, "b s c"], part: slice) -> Float[Tensor, "b s"]:
        """g, from the base's log-probabilities of what may be copied."""
        agreement = (self.attention[:, part] * log_p.exp()).sum(-1)
        belief = self.belief[:, part] + self.likelihood * torch.log(agreement + 1e-6)
        return (self.opened * belief.sigmoid()).clamp(max=GATE_LIMIT)


def _log_change(
    gate: Float[Tensor, "*#s"], copied: Float[Tensor, "*#s"], log_p: Float[Tensor, "*#s"]
) -> Float[Tensor, "*#s"]:
    """log(p' / p) = log(1 - g + g p_copy / p), exactly 0 for g = 0; log(g p_copy / p) where p is too small for that."""
    held = log_p.clamp(min=LEAST_LOG_P)
    ratio = copied * torch.exp(-held)
    return torch.log1p(gate * (ratio - 1)) + (held - log_p) * (gate * copied > 0)


def _attending_chunks_with_lags(
    h: Float[Tensor, "b n d"], chunk_len: int, num_chunks: int, num_lags: int
) -> Float[Tensor, "b l t d"]:
    """The attending chunks, each with the `num_lags` tokens before it; t = num_lags + m, the end padded with zeros."""
    first = chunk_len - 1 - num_lags
    padded = F.pad(h[:, first:], (0, 0, 0, num_lags + num_chunks * chunk_len - (h.shape[1] - first)))
    return rearrange(padded.unfold(1, num_lags + chunk_len, chunk_len), "b l d t -> b l t d")


def _center(base: nn.Module, anatomy: Anatomy, config: RetrofitConfig) -> Float[Tensor, " d"]:
    """The mean feature of random tokens, the first of each row left out: its size is unlike all others'.

    Raises ValueError for a base whose layers do not give one stream of the base's width.
    """
    rows, length = PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        config.vocab_size, (rows, min(length, config.max_position_embeddings or length)), generator=generator
    )
    ids = ids.to(base.get_input_embeddings().weight.device)
    features = hidden_after(base, anatomy, ids, torch.ones_like(ids, dtype=torch.bool), config.key_layer)
    if features.shape != (*ids.shape, config.hidden_size):
        raise ValueError(
            f"{type(base).__name__} cannot be fitted: layer {config.key_layer} gives {list(features.shape)}, not one "
            f"stream of its width {config.hidden_size}."
        )
    return features[:, 1:].float().mean((0, 1))
