"""Left padding as Hugging Face does it, and the chunks that start at each row's first real token."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def pad_left(
    prompts: Sequence[Sequence[int] | np.ndarray], padding: int
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Prompts of different lengths as one batch, and its attention mask."""
    n = max(map(len, prompts))
    ids = torch.tensor([[padding] * (n - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (n - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class Alignment:
    """Left-padded rows, turned for as long as a model runs: chunks and positions start at each row's first real token.

        given   . . a b c      `left`   a b c . .      `right` turns them back

    Rows that are padded on the right, or not at all, stay as they are. So do rows that go on after a cache: it knows
    how they are padded.
    """

    def __init__(self, attention_mask: Int[Tensor, "b n"] | None, has_cache: bool = False):
        self.is_turned = not has_cache and attention_mask is not None and not bool(attention_mask[:, 0].all())
        self._num_left = attention_mask.int().argmax(-1) if self.is_turned else None  # [b]

    def left(self, *tensors: Shaped[Tensor, "b _ ..."] | None) -> list[Shaped[Tensor, "b _ ..."] | None]:
        """Each with every row's first real token first, and its left padding at the end."""
        return [x if x is None or not self.is_turned else _turn(x, self._num_left) for x in tensors]

    def right(self, x: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "b n ..."]:
        """Undo `left`."""
        return _turn(x, -self._num_left) if self.is_turned else x


def _turn(x: Tensor, by: Int[Tensor, " b"]) -> Tensor:
    n = x.shape[1]
    source = (torch.arange(n, device=x.device) + by[:, None]) % n  # [b, n]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], source]
