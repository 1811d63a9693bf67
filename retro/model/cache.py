"""The cache of a RETRO: self-attention's own, and of the chunks only what later tokens need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticCache

from retro.model.fixed import FixedRows, FixedStep, in_all_rows
from retro.model.step import AttendingChunks, CachedStep, on_device
from retro.modules.attention import attendable
from retro.modules.cross_attention import ChunkedCrossAttention, cca_positions
from retro.modules.positions import rotary_table


class RetroCache(Cache):
    """What a RETRO keeps while it generates. It keeps no gradients; for torch.compile see retro.model.fixed.

    Columns of a batch, and positions in its rows::

        column   0 1 2 3 4 5 6 7 8 9    m = 4, length = 10, padding included
        row 0    a b c d|e f g h|i j    padding 0: position = column;     reading 2: E of "efgh"
        row 1    . . . A B C D|E F G    padding 3: position = column - 3; reading 1: E of "ABCD"

    Keys and values of no text may come before all columns, as in prefix tuning: `prefix` counts them.

    One step: `begin` says where the new tokens stand and which chunks they complete; `set_neighbors` takes what these
    found; in the layers `update` extends self-attention, `conditions` gives H_u to the encoder, `read` is CCA; `end`.

    Attributes:
        attention: The cache of self-attention. Default: one that grows, or what a retrofitted base makes itself.
        length: Columns so far, prefix and padding included; `padding` counts those before each row's first real token.
        reading: The number (from 1) of the chunk whose neighbors each row reads; 0 = none.
        rows: Tensors with one row for each of the batch. Of the last tokens, as rings in which position p stands at
            p % size: "hidden", m states at the first layer of P, and "tokens", 2m of them. Of the neighbors that are
            being read: "mask" and what a layer reads of them ("cca.6.keys", ...), replaced when they are.
    """

    def __init__(self, chunk_len: int, attention: Cache | None = None):
        self.chunk_len, self.attention = chunk_len, attention
        self.prefix = 0 if attention is None else int(attention.get_seq_length())
        self._forget()

    def reset(self) -> None:
        """Forget everything."""
        if self.attention is not None:
            self.attention.reset()
        self.prefix = 0
        self._forget()

    def _forget(self) -> None:
        self.length = self.prefix
        self.padding: list[int] = []
        self.reading: list[int] = []
        self.rows: dict[str, Tensor] = {}
        self.tables: dict = {}  # of positions; see `rotary_table` and RelativePositions
        self._furthest: list[int] = []  # how far each row had come before it was cropped
        self._decode_mask: tuple[Tensor | None] | None = None
        self._fixed: FixedRows | None = None
        self._unread: Tensor | None = None  # of fixed steps
        self._known_mask: Tensor | None = None  # of generate(), which puts nothing but 1s behind the prompt's

    # One step

    def begin(self, batch_size: int, length: int, attention_mask: Any = None, is_known: bool = False) -> CachedStep:
        """Where the next `length` tokens of each row stand.

        Arguments:
            attention_mask: [b, all columns so far], 0 only before a row's first real token; masks of other forms, which
                a base's generate() makes for itself, say nothing new and are left alone.
            is_known: whether it goes on with 1s, here and in the step itself. Then a GPU is not asked for each token.
        """
        if not self.padding:
            self.padding, self.reading, self._furthest = ([0] * batch_size for _ in range(3))
        if len(self.padding) != batch_size:
            raise ValueError(f"the cache holds {len(self.padding)} rows, and {batch_size} are given.")
        if is_known and length == 1 and self.length > max(self.padding):  # padding is over
            self._known_mask = attention_mask
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask is not self._known_mask:
            self.padding = self._padding(attention_mask, length)
        first = [self.length - self.prefix - padding for padding in self.padding]
        return CachedStep(self.chunk_len, length, first, held=self.reading, reading=list(self.reading))

    def _padding(self, attention_mask: Tensor, length: int) -> list[int]:
        columns = self.length + length
        if attention_mask.shape[1] > columns and not attention_mask[:, columns:].any():
            attention_mask = attention_mask[:, :columns]  # Bloom fills up to the size of a static cache
        if attention_mask.shape != (len(self.padding), columns):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; with a cache it must be "
                f"[{len(self.padding)}, {columns}], for all tokens so far."
            )
        real = attention_mask[:, self.prefix :] != 0
        padding = (columns - self.prefix - real.sum(-1)).tolist()
        for row, (now, before) in enumerate(zip(padding, self.padding, strict=True)):
            if self.length - self.prefix > before != now or (length > 1 and not real[row, now:].all()):
                raise ValueError(f"attention_mask of row {row} is 0 after a real token; pad on the left.")
        return padding

    def set_neighbors(
        self,
        step: CachedStep,
        neighbor_ids: Int[Tensor, "b l k r"] | None,
        neighbor_mask: Tensor | None,
        device: torch.device,
    ) -> None:
        """Give a step its neighbors, None for none, and move those that it needs to the device."""
        step.set_neighbors(neighbor_ids, neighbor_mask)
        if step.found:
            step.neighbor_ids = on_device(step.neighbor_ids, device)
            step.neighbor_mask = on_device(step.neighbor_mask, device)
        if step.is_decode and step.found:
            self.hold("mask", step.neighbor_mask, step)

    def end(self, step: CachedStep, input_ids: Int[Tensor, "b s"] | None) -> None:
        """Count the tokens of a step that is over."""
        self._fixed = None
        if input_ids is not None:
            self.record("tokens", input_ids, step, 2 * self.chunk_len)
        if step.found and not step.is_decode:
            self.hold("mask", step.neighbor_mask, step)
        self.length += step.length
        self.reading = step.reading

    def plan(
        self,
        step: CachedStep,
        neighbor_ids: Int[Tensor, "b l k r"] | None,
        neighbor_mask: Tensor | None,
        device: torch.device,
    ) -> FixedStep | None:
        """The step with its neighbors as a fixed one, counted as over; None where it cannot be one.

        That is for more than one token a row, without a static cache, and for the first neighbors or larger ones, for
        which there is no place yet.
        """
        if not (self.is_compileable and step.is_decode and self.length):
            return None
        step.set_neighbors(neighbor_ids, neighbor_mask)
        new = in_all_rows(step, self.rows.get("mask")) if step.found else ()
        if new is None:
            return None
        if self._fixed is None:
            padding = on_device(self.padding, device)
            self._fixed = FixedRows(self.chunk_len, self.attention, self.rows, self.tables, padding, self.length)
            self._unread = None
        if self._unread is None or step.completed:
            self._unread = on_device([not number for number in step.reading], device)
            self._decode_mask = None
        self.length, self.reading = self.length + 1, step.reading
        return FixedStep(self._fixed, self._unread, *(on_device(x, device) for x in new))

    def rotary_table(
        self, start: int, stop: int, dim: int, theta: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`rotary_table` of columns start .. stop - 1, from a table that doubles."""
        cos, sin = self.tables.get("rotary", (None, None))
        if cos is None or len(cos) < stop:
            every = torch.arange(max(64, 1 << (stop - 1).bit_length()), device=device)
            cos, sin = self.tables["rotary"] = tuple(x[0] for x in rotary_table(every, dim, theta))
        return cos[start:stop], sin[start:stop]

    # What is kept of every token

    def record(self, name: str, x: Shaped[Tensor, "b s *d"], step: CachedStep, size: int) -> None:
        """Keep the last `size` values of each row; that of position p stands at p % size."""
        x = x.detach()
        if name not in self.rows:
            self.rows[name] = x.new_zeros(x.shape[0], size, *x.shape[2:])
        ring, kept = self.rows[name], min(step.length, size)
        ends = [first + step.length for first in step.first]
        if kept == 1 and len(set(ends)) == 1:
            ring[:, (ends[0] - 1) % size] = x[:, -1]
            return
        positions = on_device(ends, x.device)[:, None] + torch.arange(-kept, 0, device=x.device)
        ring[torch.arange(x.shape[0], device=x.device)[:, None], positions % size] = x[:, -kept:]

    def before(self, name: str, x: Shaped[Tensor, "b s d"], step: CachedStep, count: int) -> Shaped[Tensor, "b c d"]:
        """What `record` keeps of each row's last `count` tokens before this step; arbitrary before its first token."""
        if name not in self.rows:
            return x.new_zeros(x.shape[0], count, x.shape[2])
        ring = self.rows[name]
        for row, first in enumerate(step.first):
            self._check_intact(row, max(first - count, 0), ring.shape[1])
        positions = on_device(step.first, ring.device)[:, None] + torch.arange(-count, 0, device=ring.device)
        return ring[torch.arange(x.shape[0], device=ring.device)[:, None], positions % ring.shape[1]].to(x)

    def tokens(
        self, step: CachedStep, input_ids: Int[Tensor, "b s"]
    ) -> Callable[[int, int, int], Int[np.ndarray, " t"]]:
        """What gives tokens (row, start, stop) by position: among the last 2m and the step's own."""
        own = input_ids.cpu().numpy()
        ring = self.rows["tokens"].cpu().numpy() if "tokens" in self.rows else None

        def tokens(row: int, start: int, stop: int) -> np.ndarray:
            positions = np.arange(start, stop)
            new, out = positions >= step.first[row], np.empty(stop - start, dtype=np.int64)
            out[new] = own[row, positions[new] - step.first[row]]
            if not new.all():
                if ring is None:
                    raise ValueError("the cache was begun with embeddings; retrieval needs input_ids from the start.")
                self._check_intact(row, start, ring.shape[1])
                out[~new] = ring[row, positions[~new] % ring.shape[1]]
            return out

        return tokens

    def conditions(self, h: Float[Tensor, "b s d"], step: CachedStep) -> Float[Tensor, "c m d"] | None:
        """H_u of each chunk of `step.found`, from the states held and the new ones, which are held from now on::

            m = 4, first = 6, C_2 = positions 4 .. 7     states   [ held, a ring ][ new      ]
                                                         position   4  5  2  3      6  7  8
                                                         column     0  1  2  3      4  5  6

        So H_2 = columns 0 1 4 5: p % m where p < first, m + p - first from there on.
        """
        m, device, conditions = self.chunk_len, h.device, None
        if step.found:
            for chunk in step.found:
                self._check_intact(chunk.row, (chunk.number - 1) * m, m)
            held = self.rows["hidden"].to(h) if "hidden" in self.rows else h.new_zeros(h.shape[0], m, h.shape[2])
            states = torch.cat([held, h], dim=1)
            where = [(chunk.row, step.first[chunk.row], chunk.number * m) for chunk in step.found]
            rows, first, ends = on_device(where, device).T[..., None]
            positions = ends + torch.arange(-m, 0, device=device)
            columns = torch.where(positions < first, positions % m, m + positions - first)
            conditions = states[rows, columns]
        self.record("hidden", h, step, m)
        return conditions

    def _check_intact(self, row: int, start: int, size: int) -> None:
        if start < self._furthest[row] - size:
            raise ValueError(
                f"tokens of row {row} were taken back across the start of a chunk, which can no longer be encoded; "
                "begin with a new cache."
            )

    # What is kept of the current neighbors

    def hold(self, name: str, new: Shaped[Tensor, "c *s"], step: CachedStep) -> None:
        """Keep for each row what belongs to the last of its chunks in `step.found`."""
        last = {chunk.row: i for i, chunk in enumerate(step.found)}
        new = new.detach()[on_device(list(last.values()), new.device)]
        if len(last) < len(step.first):
            held = self.rows.get(name)
            held = new.new_zeros(len(step.first), *new.shape[1:]) if held is None else held
            held, new = _same_shape(held, new)
            new = held.index_copy(0, on_device(list(last), new.device), new)
        self.rows[name] = new
        if name == "mask":
            self._decode_mask = None

    def gather(
        self, name: str, new: Shaped[Tensor, "c *s"] | None, chunks: AttendingChunks, step: CachedStep
    ) -> Tensor:
        """For each attending chunk what it reads: what its row holds, or what is new with this step."""
        held = self.rows.get(name)
        source = chunks.source.to((new if held is None else held).device)
        if new is None:
            return held[source]
        if held is None:
            return new[source - len(step.first)]
        return torch.cat(_same_shape(held, new))[source]

    def decode_mask(self, device: torch.device) -> Bool[Tensor, "b 1 1 kr"] | None:
        """Of a step: the neighbors' mask for attention; None where all is real."""
        if self._decode_mask is None:
            mask = self.rows["mask"].flatten(1).to(device)
            self._decode_mask = (None if mask.all() else attendable(mask[:, None]),)
        return self._decode_mask[0]

    def read(
        self, name: str, step: CachedStep, cca: ChunkedCrossAttention, h: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """CCA(H, E) of the new tokens; `name` tells the layers apart.

        A decode step reads what the cache holds; a longer one what each of its attending chunks reads, old or new.
        """
        names = (f"{name}.keys", f"{name}.values")
        new = cca.keys_and_values(step.encoded.to(h.device)) if step.found else (None, None)
        if step.is_decode:
            self._hold_both(names, new, step)
            keys, values = (self.rows[name] for name in names)
            positions = on_device(step.query_positions, h.device)
            out = cca.attend(h, keys, values, self.decode_mask(h.device), positions, self.tables)
            return out if step.unread is None else out.masked_fill(on_device(step.unread, h.device)[:, None, None], 0.0)
        chunks = step.attending_chunks(h.device)
        keys, values = (self.gather(name, x, chunks, step) for name, x in zip(names, new, strict=True))
        mask = self.gather("mask", step.neighbor_mask, chunks, step).to(h.device)
        self._hold_both(names, new, step)
        given = h[chunks.rows[:, None], chunks.columns.clamp(0, step.length - 1)]
        positions, _ = cca_positions(self.chunk_len, 1, device=h.device)
        out = cca.attend(given, keys, values, attendable(mask.flatten(1)[:, None]), positions, self.tables)
        return step.scatter(out, chunks)

    def _hold_both(self, names: tuple[str, str], new: tuple[Tensor | None, Tensor | None], step: CachedStep) -> None:
        for name, x in zip(names, new, strict=True):
            if x is not None:
                self.hold(name, x, step)

    # What Hugging Face asks of a cache

    @property
    def layers(self) -> list:
        return [] if self.attention is None else self.attention.layers

    @property
    def is_compileable(self) -> bool:
        """Whether its decode steps can be fixed; see retro.model.fixed."""
        held = self.attention
        return not self.prefix and type(held) is StaticCache and not held.offloading and held.is_compileable

    @property
    def max_cache_len(self) -> int:
        return -1  # PEFT's word for no limit

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.attention.update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Row i goes on from row beam_idx[i]."""
        chosen = beam_idx.tolist()
        if chosen == list(range(len(self.padding))):
            return
        if self.attention is not None:
            self.attention.reorder_cache(beam_idx)
        self._choose(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.attention is not None:
            self.attention.batch_repeat_interleave(repeats)
        self._choose([row for row in range(len(self.padding)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.attention is not None:
            self.attention.batch_select_indices(indices)
        self._choose(torch.arange(len(self.padding), device=indices.device)[indices].tolist())

    def _choose(self, rows: list[int]) -> None:
        self.padding, self.reading, self._furthest = (
            [values[row] for row in rows] for values in (self.padding, self.reading, self._furthest)
        )
        self.rows = {name: x[on_device(rows, x.device)] for name, x in self.rows.items()}
        self._decode_mask = self._fixed = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens; ValueError if that needs neighbors that are no longer held."""
        ends = [self.length - self.prefix - padding for padding in self.padding]
        for row, end in enumerate(ends):
            if "mask" in self.rows and (end + tokens_to_remove) // self.chunk_len < end // self.chunk_len:
                raise ValueError(
                    f"{-tokens_to_remove} tokens cannot be taken back: in row {row} they reach across the end of a "
                    "chunk, whose neighbors are no longer held."
                )
        self._fixed = None
        if self.attention is not None:
            self.attention.crop(tokens_to_remove)
        if tokens_to_remove:
            self._furthest = [max(pair) for pair in zip(self._furthest, ends, strict=True)]
            self.length += tokens_to_remove


def retro_cache(past_key_values: Cache, chunk_len: int, with_prefix: bool = True) -> RetroCache:
    """The cache itself, or one around a cache of another kind: empty, or with a prefix where there may be one.

    Raises ValueError for what is no cache, for a prefix that may not be, and for chunks of another length.
    """
    if not isinstance(past_key_values, RetroCache):
        if not isinstance(past_key_values, Cache) or not (with_prefix or past_key_values.get_seq_length() == 0):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}; give what a run with neighbors gave, or a new RetroCache.")
        return RetroCache(chunk_len, past_key_values)
    if past_key_values.chunk_len != chunk_len:
        raise ValueError(
            f"past_key_values is a RetroCache({past_key_values.chunk_len}), and the model's chunk_len is {chunk_len}."
        )
    return past_key_values


def cache_for(
    past_key_values: Cache | None,
    use_cache: bool | None,
    document_ids: Tensor | None,
    chunk_len: int,
    with_prefix: bool = True,
) -> RetroCache | None:
    """The cache that a forward pass goes on with: the one given, a new one if it is asked for, or None.

    Raises ValueError for a cache that does not fit, see `retro_cache`, and for documents beside a cache.
    """
    if past_key_values is None and not use_cache:
        return None
    if document_ids is not None:
        raise ValueError("document_ids is given with a cache; packed documents run without one.")
    if past_key_values is None:
        return RetroCache(chunk_len)
    return retro_cache(past_key_values, chunk_len, with_prefix)


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers that double: a new token costs one write, not a copy of all before it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and key_states.requires_grad:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._appended("keys", self.keys, key_states, length)
        self.values = self._appended("values", self.values, value_states, length)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor, length: int) -> Tensor:
        buffer, total = self._buffers.get(name), length + new.shape[-2]
        # a reordered cache holds tensors of its own, which no buffer backs
        if buffer is None or total > buffer.shape[-2] or (length and held.data_ptr() != buffer.data_ptr()):
            buffer = new.new_empty(*new.shape[:-2], max(64, 1 << (total - 1).bit_length()), new.shape[-1])
            if length:
                buffer[..., :length, :] = held
            self._buffers[name] = buffer
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]

    def reset(self) -> None:
        self._buffers = {}
        super().reset()


def _same_shape(one: Shaped[Tensor, "a ..."], other: Shaped[Tensor, "c ..."]) -> tuple[Tensor, Tensor]:
    """Both, padded with zeros at the end of each axis but the first, where k or r differ."""
    if one.shape[1:] == other.shape[1:]:
        return one, other
    shape = [max(sizes) for sizes in zip(one.shape[1:], other.shape[1:], strict=True)]
    return tuple(
        F.pad(x, [p for size, have in zip(shape[::-1], x.shape[:0:-1], strict=True) for p in (0, size - have)])
        for x in (one, other)
    )
