"""Tokens to text, one token at a time, and text made safe to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

_BROKEN = "\ufffd"  # what decoders give for bytes that are no whole character
_MOST_BYTES = 4  # of a character: the first of so many tokens that do not make one is part of none
_BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # embeddings, overrides and isolates
_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
_SHOWN |= {code: f"[U+{code:04X}]" for code in [*range(0x80, 0xA0), *_BIDI]}


def visible(text: str) -> str:
    """The text with control characters and those that turn the direction of writing replaced by marks one can see."""
    return text.translate(_SHOWN)


class IncrementalDetokenizer:
    """The text that each further token adds; a character is given whole, with the token that completes it.

    A token alone does not decode as it does in its text (spaces, characters of several tokens), so that each one is
    decoded together with those before it.
    """

    def __init__(self, tokenizer: Any, token_ids: Iterable[int] = ()) -> None:
        """token_ids: what stands before the first token that is added."""
        self.tokenizer = tokenizer
        self._ids = [int(token) for token in token_ids]
        self._num_given = len(self._ids)

    def add(self, token_id: int) -> str:
        self._ids.append(int(token_id))
        new, held = self._new(), self._ids[self._num_given :]
        if new and not new.endswith(_BROKEN):
            self._ids, self._num_given = held, len(held)
            return new
        if new and len(held) == _MOST_BYTES:
            self._ids, self._num_given = held[1:], 0
            return self._decoded(held[:1])
        return ""

    def rest(self) -> str:
        """What was held back at the end: a character that no token completed."""
        new = self._new()
        self._num_given = len(self._ids)
        return new

    def named(self, token_id: int) -> tuple[str, bytes | None]:
        """What a token would add as the next one, and its own bytes; one that completes no text goes by its spelling,
        or by its bytes, as OpenAI writes them, and special tokens have none."""
        before = self._ids, self._num_given
        pending = not set(self._ids[self._num_given :]) <= set(self.tokenizer.all_special_ids)
        self._ids = list(self._ids)
        text = self.add(token_id)
        self._ids, self._num_given = before
        if text and not pending:
            return text, text.encode()
        spelled = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if token_id in self.tokenizer.all_special_ids:
            return spelled, None
        own = _own_bytes(spelled)
        return text or ("bytes:" + "".join(f"\\x{byte:02x}" for byte in own) if own else spelled), own

    def _new(self) -> str:
        before, both = self._decoded(self._ids[: self._num_given]), self._decoded(self._ids)
        if both.startswith(before):
            return both[len(before) :]
        return self._decoded(self._ids[self._num_given :])  # what follows breaks the decoding of what stands before it

    def _decoded(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _own_bytes(spelled: str) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, or of one that falls back to bytes; None for another."""
    if fallback := re.fullmatch("<0x([0-9A-Fa-f]{2})>", spelled):
        return bytes.fromhex(fallback[1])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in spelled) if letters.keys() >= set(spelled) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies spell bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined they are the text. Special tokens add nothing."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    texts = [detokenizer.add(token) for token in token_ids]
    if texts:
        texts[-1] += detokenizer.rest()
    return texts


class TextStream:
    """A streamer for generate() with one row: hands on the prompt, then the text as its characters become whole.

    Differs: Hugging Face's TextStreamer holds words back until a space, and may show a broken character at a line end.
    """

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], Any], on_prompt: Callable[[str], Any] = lambda text: None
    ) -> None:
        self.tokenizer, self.on_text, self.on_prompt = tokenizer, on_text, on_prompt
        self._detokenizer: IncrementalDetokenizer | None = None

    def put(self, token_ids: Any) -> None:
        """The prompt [1, n] first, then each new token. Raises ValueError for several rows."""
        if token_ids.ndim > 1 and token_ids.shape[0] > 1:
            raise ValueError(f"a batch of {token_ids.shape[0]} rows cannot be streamed as one text; stream one prompt.")
        ids = token_ids.flatten().tolist()
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(self.tokenizer, ids)
            self.on_prompt("".join(token_texts(self.tokenizer, ids)))
        else:
            self._hand_on("".join(map(self._detokenizer.add, ids)))

    def end(self) -> None:
        """Hand on what was held back; the next `put` brings a new prompt."""
        if self._detokenizer is not None:
            self._hand_on(self._detokenizer.rest())
        self._detokenizer = None

    def _hand_on(self, text: str) -> None:
        if text:
            self.on_text(text)
