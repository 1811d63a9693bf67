"""The pointer form: a token may copy what followed where a neighbor reads most like the text before it.

With the matches c(t, j) of retro.retrofit.matching, over features of layer `key_layer` of both:

    a_t = softmax_j(tau c(t, j) + gamma log p(y_j))                over the tokens j of all neighbors of t's chunk
    p_copy(y) = sum of a_t(j) over the j whose next token y_j is y
    g_t = tanh|alpha| sigmoid(w_g . rmsnorm(h_last(t)) + b + c_g max_j c(t, j) + d log sum_j a_t(j) p(y_j))
    p'(y) = (1 - g_t) p(y) + g_t p_copy(y)                         p: the base's distribution

A token reads the neighbors that CCA would read: E_u of the last whole chunk of its document. alpha starts at 0, where
the logits are the base's bit for bit.

Differs: nothing of this is in the paper. It is a copy distribution mixed in by a gate (See et al. 2017,
pointer-generator), with the base's own features as keys and the next tokens as values (Khandelwal et al. 2020, kNN-LM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from retro.modules.loss import SLICE_TOKENS
from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.hooks import HookPoint, RetrofitContext
from retro.retrofit.matching import Matching, attending, neighbor_features
from retro.retrofit.starts import Observed, normed

GATE_LIMIT = 1 - 2**-10  # a token that no neighbor holds keeps a probability
LEAST_LOG_P = -80.0  # float32 could not hold the inverse of less
LEAST_PRIOR = -15.0  # log p(y_j) counts no less in the attention


class PointerForm(nn.Module):
    """The pointer's weights: what it matches with, gamma (`prior`) and the gate. It writes to the logits only."""

    mixes_logits = True
    start_points = ()
    lr_ratios = {"log_sharpness": 30, "lags": 30, "prior": 30, "gate.opening": 100, "gate.hidden": 1, "gate": 30}

    def __init__(self, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy):
        super().__init__()
        self.config, self.last_layer = config, anatomy.num_layers
        self.hook_points = [HookPoint(layer, "end") for layer in sorted({config.key_layer, anatomy.num_layers})]
        head, d = base.get_output_embeddings(), config.hidden_size
        device = [*head.parameters(), *head.buffers()][0].device  # packed weights are buffers
        self.matching = Matching(d, d, config.key_lags, config.rms_norm_eps, device)
        self.prior = nn.Parameter(torch.empty(1, device=device))
        self.gate = CopyGate(d, config.rms_norm_eps, device)

    @torch.no_grad()
    def start(self, observed: Observed) -> None:
        """W_q and W_k are I, and their biases center the features; the gate is shut."""
        self.matching.start(observed.center)
        self.prior.zero_()
        self.gate.start()

    def update(self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext) -> None:
        """Keep the stream as it is here."""
        context.state[point] = h

    def mixture(self, context: RetrofitContext) -> CopyMixture | None:
        """What each token of the text may copy, how likely, and how far it is believed."""
        key, last = (context.state[HookPoint(layer, "end")] for layer in (self.config.key_layer, self.last_layer))
        step, new = context.step, None
        if step is not None and context.keep is not None and "features" not in context.state:
            step.keep_last(context.keep)
        if step is None or step.found:
            features = neighbor_features(context, self.config.key_layer)
            ids = context.neighbor_ids.flatten(0, 1) if step is None else step.neighbor_ids
            device = self.prior.device
            new = {"keys": self.matching.keys(features.to(device)), "ids": ids.to(device)}
        queries, m = self.matching.queries(key.to(self.prior)), self.config.chunk_len
        found = attending(context, "pointer", queries, new, self.config.key_lags, m, context.keep)
        if found is None:
            return None
        scores = self.matching(found.queries, found.given["keys"], found.given["mask"])
        best = scores.amax(-1) / self.matching.log_sharpness.exp()
        tokens = repeat(found.given["ids"][..., 1:], "c k r -> c w (k r)", w=scores.shape[1])
        best = best.masked_fill(~found.readable, 0.0)[..., None]
        tokens, scores, best, readable = map(found.place, (tokens, scores, best, found.readable[..., None]))
        last = last[:, -tokens.shape[1] :].to(scores)
        belief = self.gate(last, best[..., 0]).masked_fill(~readable[..., 0], -torch.inf)
        return CopyMixture(tokens, scores, belief, self.prior, self.gate.likelihood, self.gate.opened())


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
        return normed(h, self.norm_eps) @ self.hidden + self.bias + self.match * best

    def opened(self) -> Float[Tensor, "1"]:
        return opened(self.opening)


def opened(gate: Float[Tensor, "*g"]) -> Float[Tensor, "*g"]:
    """tanh|g|, whose gradient at 0 is 1: what a gate lets through is never turned round, and the gate never dead."""
    return torch.tanh(torch.where(gate >= 0, gate, -gate))


@dataclass
class CopyMixture:
    """The distribution to copy from at each position and what its gate needs, to be mixed with the base's logits.

    tokens, scores: what may be copied, and tau c. belief: the gate before its sigmoid, but for the likelihood part;
    -inf where nothing may be read.
    """

    tokens: Int[Tensor, "b n c"]
    scores: Float[Tensor, "b n c"]
    belief: Float[Tensor, "b n"]
    prior: Float[Tensor, "1"]
    likelihood: Float[Tensor, "1"]
    opened: Float[Tensor, "1"]

    def edit(self, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
        """Logits of p' at the last s positions; their log-sum-exp is that of the base's."""
        b, length = logits.shape[:2]
        step, start = max(1, SLICE_TOKENS // b), self.scores.shape[1] - length
        return torch.cat([self._edit(logits[:, i : i + step], start + i) for i in range(0, length, step)], dim=1)

    def _edit(self, logits: Float[Tensor, "b s v"], start: int) -> Float[Tensor, "b s v"]:
        part = slice(start, start + logits.shape[1])
        log_p, tokens = logits.to(self.scores).log_softmax(-1), self.tokens[:, part]
        attention, gate = self._attention_and_gate(log_p.gather(-1, tokens), part)
        copied, gate = torch.zeros_like(log_p).scatter_add(-1, tokens, attention), gate[..., None]
        return (logits.to(log_p) + _log_change(gate, copied, log_p)).to(logits)

    def log_likelihood(
        self, logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s"], start: int
    ) -> Float[Tensor, "b s"]:
        """log p'(target) at positions start, start + 1, ...; nothing of the vocabulary's size is kept for gradients."""
        part = slice(start, start + logits.shape[1])
        logits, targets = logits.to(self.scores), targets.to(self.scores.device)
        log_sum = logits.logsumexp(-1, keepdim=True)
        tokens, log_p = self.tokens[:, part], (logits.gather(-1, targets[..., None]) - log_sum)[..., 0]
        attention, gate = self._attention_and_gate(logits.gather(-1, tokens) - log_sum, part)
        copied = (attention * (tokens == targets[..., None])).sum(-1)
        return log_p + _log_change(gate, copied, log_p)

    def _attention_and_gate(
        self, log_p: Float[Tensor, "b s c"], part: slice
    ) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b s"]]:
        """a and g, from the base's log-probabilities of what may be copied."""
        attention = (self.scores[:, part] + self.prior * log_p.clamp(min=LEAST_PRIOR)).softmax(-1)
        agreement = (attention * log_p.exp()).sum(-1)
        belief = self.belief[:, part] + self.likelihood * torch.log(agreement + 1e-6)
        return attention, (self.opened * belief.sigmoid()).clamp(max=GATE_LIMIT)


def _log_change(
    gate: Float[Tensor, "*#s"], copied: Float[Tensor, "*#s"], log_p: Float[Tensor, "*#s"]
) -> Float[Tensor, "*#s"]:
    """log(p' / p) = log(1 - g + g p_copy / p), exactly 0 for g = 0; log(g p_copy / p) where p is too small for that."""
    held = log_p.clamp(min=LEAST_LOG_P)
    ratio = copied * torch.exp(-held)
    return torch.log1p(gate * (ratio - 1)) + (held - log_p) * (gate * copied > 0)
