"""Where a neighbor reads most like the text so far: what the pointer and CCA's reading start look with.

h(t) is the base's residual stream, brought to square 1 (RMSNorm without weights): of the text after some layer, and of
each neighbor, read alone, after `key_layer`, or what an encoder makes of that:

    q_t = norm(W_q h(t) + b_q),  k_j = norm(W_k h(j) + b_k)
    c(t, j) = sum_i w_i q_{t-i} . k_{j-i},  i = 0..key_lags       a run of matches counts

What follows in a neighbor stands one token on, so that key j goes with the value of token j + 1, as an induction head
has it (Olsson et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from retro.modules.cross_attention import in_sequence, may_read
from retro.modules.kernels import refuse
from retro.retrofit.hooks import RetrofitContext
from retro.retrofit.starts import normed

START_SHARPNESS = 18.0  # tau
LAG_DECAY = 0.7


class Matching(nn.Module):
    """The two linear maps, the weights w of the lags, and the sharpness tau by which matches are multiplied."""

    def __init__(self, dim: int, context_dim: int, num_lags: int, norm_eps: float, device: torch.device):
        super().__init__()
        self.norm_eps = norm_eps
        self.query = nn.Linear(dim, context_dim, device=device)
        self.key = nn.Linear(context_dim, context_dim, device=device)
        self.lags = nn.Parameter(torch.empty(num_lags + 1, device=device))
        self.log_sharpness = nn.Parameter(torch.empty(1, device=device))

    @property
    def num_lags(self) -> int:
        return len(self.lags) - 1

    @torch.no_grad()
    def start(self, center: Float[Tensor, " c"], query_map: tuple[Tensor, Tensor] | None = None) -> None:
        """W_k is I and its bias centers the features; W_q and its bias are `query_map`, or else the same.

        Earlier lags weigh less.
        """
        nn.init.eye_(self.key.weight)
        self.key.bias.copy_(-center)
        weight, bias = (self.key.weight, self.key.bias) if query_map is None else query_map
        self.query.weight.copy_(weight)
        self.query.bias.copy_(bias)
        decay = LAG_DECAY ** torch.arange(len(self.lags))
        self.lags.copy_(decay / decay.sum())
        self.log_sharpness.fill_(math.log(START_SHARPNESS))

    def queries(self, h: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        return F.normalize(self.query(self._normed(h)), dim=-1)

    def keys(self, features: Float[Tensor, "c k r d"]) -> Float[Tensor, "c k r d"]:
        return F.normalize(self.key(self._normed(features)), dim=-1)

    def _normed(self, x: Tensor) -> Tensor:
        return normed(x.to(self.lags), self.norm_eps)

    def forward(
        self, queries: Float[Tensor, "c t d"], keys: Float[Tensor, "c k r d"], mask: Bool[Tensor, "c k r"]
    ) -> Float[Tensor, "c w j"]:
        """tau c for w = t - lags tokens and the j = k (r - 1) keys that have a value; the least number for others.

        Lags never cross the beginning of a neighbor. Nor that of the text or document, since they are fewer than the
        tokens of a chunk: a token that reads E_u has all of C_u before it.
        """
        w = queries.shape[1] - self.num_lags
        dots, matches = torch.einsum("ctd, ckrd -> ctkr", queries, keys), 0.0
        for lag, weight in enumerate(self.lags):
            start = self.num_lags - lag
            matches = matches + weight * F.pad(dots[:, start : start + w], (lag, 0))[..., : dots.shape[-1]]
        matches = self.log_sharpness.exp() * rearrange(matches[..., :-1], "c w k r -> c w (k r)")
        no_value = ~rearrange(mask[..., 1:], "c k r -> c 1 (k r)")
        return matches.masked_fill(no_value, torch.finfo(matches.dtype).min)


def check_neighbor_mask(mask: Bool[Tensor, "*s r"]) -> None:
    """ValueError for a neighbor with real tokens behind others: the base reads each from its first token on."""
    behind = mask[..., 1:].bool() & ~mask[..., :-1].bool()
    refuse(behind.any(), "neighbor_mask is False before a real token; let each neighbor start with its real tokens.")


def neighbor_features(context: RetrofitContext, layer: int) -> Float[Tensor, "c k r d"]:
    """The base's stream after a layer over the neighbors of each chunk, read alone, once a run; c as in `attending`."""
    if "features" not in context.state:
        ids, mask = context.neighbor_ids, context.neighbor_mask
        if context.step is not None:
            ids, mask = context.step.neighbor_ids[None], context.step.neighbor_mask[None]
        read = _read_real(context, ids.flatten(0, 2), mask.flatten(0, 2), layer)
        context.state["features"] = rearrange(read, "(c k) r d -> c k r d", k=ids.shape[2])
    return context.state["features"]


def _read_real(context: RetrofitContext, ids: Tensor, mask: Tensor, layer: int) -> Float[Tensor, "q r d"]:
    """The stream over the texts that have a real token; 0 for the others, which are not run."""
    if torch.compiler.is_compiling():  # a graph has fixed shapes
        return context.hidden_after(ids, mask, layer)
    real = mask.any(-1).nonzero()[:, 0]
    if len(real) == len(ids):
        return context.hidden_after(ids, mask, layer)
    real = real if len(real) else real.new_zeros(1)
    some = context.hidden_after(ids[real], mask[real], layer)
    return some.new_zeros(len(ids), *some.shape[1:]).index_copy(0, real.to(some.device), some)


@dataclass
class Attending:
    """Attending chunks of a run, or rows of one new token each: what is matched, and where its results belong.

    queries: of their w tokens and of the lags before them. given: what belongs to the neighbors of each. readable:
    which of the w tokens may read them. place: puts values of the w tokens into the run.
    """

    queries: Float[Tensor, "c t d"]
    given: dict[str, Tensor]
    readable: Bool[Tensor, "c w"]
    place: Callable[[Shaped[Tensor, "c w *e"]], Shaped[Tensor, "b n *e"]]


def attending(
    context: RetrofitContext,
    name: str,
    queries: Float[Tensor, "b n d"],
    new: dict[str, Tensor] | None,
    num_lags: int,
    chunk_len: int,
    keep: int | None = None,
) -> Attending | None:
    """The attending chunks of a run, each with the `num_lags` tokens before it; None where nothing is read.

    new: what belongs to the neighbors, a row for each chunk; with a cache a row for each chunk of `step.found`, None if
    there is none. `name` tells what is kept in the cache apart. keep: with a cache, of how many last tokens the results
    are wanted; None for all.
    """
    if context.cache is not None:
        return _attending_held(context, name, queries, new, num_lags, chunk_len, keep)
    mask, documents = context.neighbor_mask.to(queries.device), context.document_ids
    documents = None if documents is None else documents.to(queries.device)
    (b, num_chunks), n, first = mask.shape[:2], queries.shape[1], chunk_len - 1 - num_lags
    padded = F.pad(queries[:, first:], (0, 0, 0, num_lags + num_chunks * chunk_len - (n - first)))
    windows = rearrange(padded.unfold(1, num_lags + chunk_len, chunk_len), "b l d t -> (b l) t d")
    readable = may_read(mask[..., 1:], chunk_len, documents).flatten(0, 1)
    given = {**new, "mask": mask.flatten(0, 1)}
    return Attending(windows, given, readable, lambda x: in_sequence(x.unflatten(0, (b, num_chunks)), n))


def _attending_held(
    context: RetrofitContext,
    name: str,
    queries: Tensor,
    new: dict[str, Tensor] | None,
    num_lags: int,
    chunk_len: int,
    keep: int | None,
) -> Attending | None:
    """The same for new tokens: of the neighbors the cache holds what is not new, of the text the lagged queries."""
    cache, step, device = context.cache, context.step, queries.device
    windows = torch.cat([cache.before(f"{name}.queries", queries, step, num_lags), queries], dim=1)
    cache.record(f"{name}.queries", queries, step, chunk_len + num_lags)
    new = {} if new is None else {f"{name}.{part}": x for part, x in new.items()}
    if step.is_decode:
        for part, x in new.items():
            cache.hold(part, x, step)
        return _attending_row(context, name, windows) if step.reads else None
    chunks = step.attending_chunks(device, keep)
    parts = list(new) or _parts_held(context, name)
    given = {}
    if len(chunks.rows):
        given = {part: cache.gather(part, new.get(part), chunks, step) for part in parts}
        given["mask"] = cache.gather("mask", step.neighbor_mask, chunks, step)
    for part, x in new.items():
        cache.hold(part, x, step)
    if not given:
        return None
    given = {part.rpartition(".")[2]: x.to(device) for part, x in given.items()}
    columns = chunks.columns[:, :1] + torch.arange(num_lags + chunk_len, device=device)
    windows = windows[chunks.rows[:, None], columns.clamp(0, windows.shape[1] - 1)]
    readable = given["mask"][..., 1:].flatten(1).any(-1)[:, None].expand_as(chunks.columns)
    return Attending(windows, given, readable, lambda x: step.scatter(x, chunks, keep))


def _attending_row(context: RetrofitContext, name: str, windows: Float[Tensor, "b t d"]) -> Attending:
    """Of a decode step: one token of each row, and what the cache holds for the row."""
    cache, step, device = context.cache, context.step, windows.device
    parts = (*_parts_held(context, name), "mask")
    given = {part.rpartition(".")[2]: cache.rows[part].to(device) for part in parts}
    readable = given["mask"][..., 1:].flatten(1).any(-1, keepdim=True)
    if step.unread is not None:
        readable = readable & ~step.unread.to(device)[:, None]
    return Attending(windows, given, readable, lambda x: x)


def _parts_held(context: RetrofitContext, name: str) -> list[str]:
    """What the cache holds of the neighbors under a name: all but the lagged queries."""
    return [part for part in context.cache.rows if part.startswith(f"{name}.") and not part.endswith(".queries")]
