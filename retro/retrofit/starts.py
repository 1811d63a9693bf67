"""What the starts of a form are taken from: what the frozen base makes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retro.common.modes import evaluating
from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.hooks import HookPoint, LayerReached, RetrofitContext, active, add_hooks

PROBE_SHAPE = (8, 64)  # rows and tokens of the text where none is given: random tokens
RIDGE = 1e-2  # of the mean square of a channel
ROWS_AT_ONCE = 4


@dataclass
class Observed:
    """Of q rows of n tokens, the first of each row left out, whose features are unlike all others'.

    tokens: [q (n - 1)]. features: the stream after `key_layer`, of square 1, None without such a layer. streams: those
    at the points that the start reads. embeddings: what the base's logits are a product with, None where it is not a
    matrix.
    """

    tokens: Int[Tensor, " t"]
    features: Float[Tensor, "t d"] | None
    streams: dict[HookPoint, Float[Tensor, "t d"]]
    embeddings: Float[Tensor, "v d"] | None

    @property
    def center(self) -> Float[Tensor, " d"]:
        """The mean feature."""
        return self.features.mean(0)


@dataclass
class _Recorder:
    """Takes the place of a form in a run: keeps the stream at some points, and ends the run at the last of them."""

    hook_points: list[HookPoint]
    width: int
    streams: dict[HookPoint, list[Tensor]] = field(default_factory=dict)

    def update(self, point: HookPoint, h: Tensor, context: RetrofitContext) -> None:
        if h.ndim != 3 or h.shape[2] != self.width:
            raise ValueError(
                f"the base cannot be fitted: layer {point.layer} gives {list(h.shape)}, not one stream of its width "
                f"{self.width}."
            )
        self.streams.setdefault(point, []).append(h[:, 1:].float().flatten(0, 1).cpu())
        if point == self.hook_points[-1]:
            raise LayerReached


@torch.no_grad()
def observe(
    base: nn.Module,
    anatomy: Anatomy,
    config: RetrofitConfig,
    start_points: Sequence[HookPoint],
    text: Int[Tensor, "q n"] | None,
) -> Observed:
    """What the base makes of a text, or without one of random tokens, the same every time; without neighbors.

    It runs once over the text, up to the last layer that is read. Of rows longer than the base's positions only the
    beginning is read. Raises ValueError for rows without a second token, and for a base whose layers do not give one
    stream of its width.
    """
    if text is not None and (not isinstance(text, Tensor) or text.is_floating_point()):
        raise ValueError(f"text is {type(text).__name__} {str(text)[:40]!r}; give a tensor of token ids, [q, n].")
    if text is not None and (text.ndim != 2 or text.shape[0] < 1 or text.shape[1] < 2):
        raise ValueError(f"text has shape {list(text.shape)}; give rows of at least 2 tokens, [q, n].")
    device = base.get_input_embeddings().weight.device
    text = (_random_tokens(config) if text is None else text[:, : config.max_position_embeddings]).to(device)
    after_key_layer = None if config.key_layer is None else HookPoint(config.key_layer, "end")
    points = sorted({*start_points, after_key_layer} - {None})
    streams = _streams(base, anatomy, points, config.hidden_size, text)
    features = None if after_key_layer is None else normed(streams[after_key_layer], config.rms_norm_eps)
    return Observed(
        tokens=text[:, 1:].flatten().cpu(),
        features=features,
        streams={point: streams[point] for point in start_points},
        embeddings=_matrix(base.get_output_embeddings()),
    )


def _streams(
    base: nn.Module, anatomy: Anatomy, points: list[HookPoint], width: int, text: Int[Tensor, "q n"]
) -> dict[HookPoint, Float[Tensor, "t d"]]:
    """The stream at each of the points, which are in the order of the base's run."""
    if not points:
        return {}
    key, recorder = object(), _Recorder(points, width)
    handles = add_hooks(base, anatomy, points, key)
    try:
        for rows in text.split(ROWS_AT_ONCE):
            with evaluating(base), active(RetrofitContext(form=recorder, key=key)), suppress(LayerReached):
                base(input_ids=rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {point: torch.cat(parts) for point, parts in recorder.streams.items()}


def _random_tokens(config: RetrofitConfig) -> Int[Tensor, "q n"]:
    rows, length = PROBE_SHAPE
    shape = (rows, min(length, config.max_position_embeddings or length))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def _matrix(module: Any) -> Float[Tensor, "v d"] | None:
    """The weight [out, in] of a linear map that is not quantized."""
    weight = getattr(module, "weight", None)
    return weight.detach() if weight is not None and weight.is_floating_point() and weight.ndim == 2 else None


def normed(x: Float[Tensor, "*s d"], eps: float) -> Float[Tensor, "*s d"]:
    """RMSNorm without weights."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)


def ridge(x: Float[Tensor, "t i"], y: Float[Tensor, "t o"]) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Weight and bias of the linear map from x to y with the least squared error, and a small penalty."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    square = x.T @ x
    penalty = RIDGE * square.diagonal().mean().clamp(min=1e-12) * torch.eye(len(square))
    weight = torch.linalg.solve(square + penalty, x.T @ y).T
    return weight, mean_y - weight @ mean_x
