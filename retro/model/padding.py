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


def align_left(
    x: Shaped[Tensor, "b n *d"] | None, attention_mask: Int[Tensor, "b n"]
) -> Shaped[Tensor, "b n *d"] | None:
    """Turn each row so that its first real token comes first; left padding goes to the end."""
    return None if x is None else _turn(x, _num_left(attention_mask))


def align_right(x: Shaped[Tensor, "b n *d"], attention_mask: Int[Tensor, "b n"]) -> Shaped[Tensor, "b n *d"]:
    """Undo `align_left`."""
    return _turn(x, -_num_left(attention_mask))


def _num_left(attention_mask: Int[Tensor, "b n"]) -> Int[Tensor, " b"]:
    return attention_mask.int().argmax(-1)


def _turn(x: Tensor, by: Int[Tensor, " b"]) -> Tensor:
    n = x.shape[1]
    source = (torch.arange(n, device=x.device) + by[:, None]) % n  # [b, n]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], source]
