"""Padding: on the left as Hugging Face does it, chunks that start at each row's first real token, a data collator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from retro.modules.kernels import reads_values, refuse


def pad_left(
    prompts: Sequence[Sequence[int] | np.ndarray], padding: int
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Prompts of different lengths as one batch, and its attention mask."""
    n = max(map(len, prompts))
    ids = torch.tensor([[padding] * (n - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (n - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


_HOLES = "is 0 between real tokens; chunks are counted in tokens that follow each other, so leave these out of the row."


def check_prompts(inputs: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what generate() takes no prompts from: all but tensors [b, n] of at least one token."""
    prompts = kwargs.get("input_ids") if inputs is None else inputs
    if prompts is None or kwargs.get("inputs_embeds") is not None:
        return
    found = f"have shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else f"are a {type(prompts).__name__}"
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"the prompts {found}; give a tensor of token ids [b, n] with n above 0, as input_ids.")


class Alignment:
    """Left-padded rows, turned for as long as a model runs: chunks and positions start at each row's first real token.

        given   . . a b c      `left`   a b c . .      `right` turns them back

    Rows that are padded on the right, or not at all, stay as they are. So do rows that go on after a cache: it knows
    how they are padded. ValueError for a mask of another shape, and for one with holes: chunks have none. In graphs and
    in training on a GPU, which read no value, rows are turned, if only by 0, and holes a RuntimeError as they are met.
    """

    def __init__(self, attention_mask: Tensor | None, has_cache: bool = False):
        self.is_turned, self._num_left, self._shape = False, None, None
        if attention_mask is None:
            return
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; give [b, n], 1 = a real token.")
        if has_cache:
            return
        self._shape, real = attention_mask.shape, attention_mask != 0
        self._num_left = real.int().argmax(-1)  # [b]
        has_hole = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1
        if not reads_values(real):
            refuse(has_hole.any(), f"attention_mask {_HOLES}")
            self.is_turned = True
            return
        is_late, has_hole = torch.stack([~real[:, 0], has_hole]).tolist()
        if any(has_hole):
            raise ValueError(f"attention_mask of row {has_hole.index(True)} {_HOLES}")
        self.is_turned = any(is_late)

    def left(self, *tensors: Shaped[Tensor, "b _ ..."] | None) -> list[Shaped[Tensor, "b _ ..."] | None]:
        """Each with every row's first real token first, and its left padding at the end."""
        for x in tensors:
            if x is not None and self._shape not in (None, x.shape[:2]):
                raise ValueError(f"attention_mask has shape {list(self._shape)}; it must be {list(x.shape[:2])}.")
        return [x if x is None or not self.is_turned else _turn(x, self._num_left) for x in tensors]

    def right(self, x: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "b n ..."]:
        """Undo `left`."""
        return _turn(x, -self._num_left) if self.is_turned else x

    def right_square(self, x: Shaped[Tensor, "b h n n"]) -> Shaped[Tensor, "b h n n"]:
        """Undo `left` of queries and keys."""
        return self.right(self.right(x.movedim(2, 1)).movedim(3, 1)).permute(0, 3, 2, 1)


def _turn(x: Tensor, by: Int[Tensor, " b"]) -> Tensor:
    n = x.shape[1]
    source = (torch.arange(n, device=x.device) + by[:, None]) % n  # [b, n]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], source]


@dataclass
class DataCollatorWithNeighbors:
    """Rows of different lengths as one batch, for a Trainer: padded on the right, their neighbors filled up as missing.

    A row has `input_ids` [n], and may have `labels` (default: its tokens), `attention_mask` and `document_ids` [n], and
    `neighbor_ids` and `neighbor_mask` [l, k, r] of its whole chunks; lists, arrays or tensors.

    Args:
        chunk_len: m, the model's `config.chunk_len`.
        pad_to_multiple_of: Rows become as long as a multiple of it.

    Raises ValueError for a row with anything else, or with more neighbors than it has whole chunks.
    """

    chunk_len: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        length += -length % self.pad_to_multiple_of
        filled = [self._with_defaults(number, row) for number, row in enumerate(rows)]
        batch = {name: _filled([row[name] for row in filled], (length,), fill) for name, fill in _FILL.items()}
        if any("document_ids" in row for row in filled):
            given = [row.get("document_ids", torch.zeros_like(row["input_ids"])) for row in filled]
            batch["document_ids"] = _filled(given, (length,), -1)
        if any("neighbor_ids" in row for row in rows):
            ids = [torch.as_tensor(row["neighbor_ids"]) for row in filled]
            shape = (length // self.chunk_len, *(max(x.shape[axis] for x in ids) for axis in (1, 2)))
            batch["neighbor_ids"] = _filled(ids, shape, 0)
            batch["neighbor_mask"] = _filled([row["neighbor_mask"] for row in filled], shape, 0).bool()
        return batch

    def _with_defaults(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        for name in row:
            if name not in (*_FILL, "document_ids", "neighbor_ids", "neighbor_mask"):
                raise ValueError(f"row {number} has {name}, which is not padded here; remove that column.")
        row = {name: value for name, value in row.items() if value is not None}
        tokens = torch.as_tensor(row["input_ids"])
        ids = torch.as_tensor(row.get("neighbor_ids", torch.zeros(0, 0, 0, dtype=torch.long)))
        if ids.ndim != 3 or len(ids) > len(tokens) // self.chunk_len:
            raise ValueError(
                f"row {number} has {len(tokens)} tokens and neighbor_ids {list(ids.shape)}; give [l, k, r] with one "
                f"row for each whole chunk of {self.chunk_len} tokens."
            )
        present = torch.ones_like(ids, dtype=torch.bool)
        defaults = {"labels": tokens, "attention_mask": torch.ones_like(tokens), "neighbor_mask": present}
        return defaults | row | {"input_ids": tokens, "neighbor_ids": ids}


_FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def _filled(values: Sequence[Any], shape: tuple[int, ...], fill: int) -> Tensor:
    """Values of different sizes as one tensor [b, *shape], filled up at the end of each axis."""
    out = torch.full((len(values), *shape), fill)
    for line, value in zip(out, values, strict=True):
        value = torch.as_tensor(value)
        line[tuple(slice(size) for size in value.shape)] = value
    return out
