"""What a tokenizer loses of texts, found out while a store is built."""

from __future__ import annotations

import logging
from collections import Counter
from os.path import commonprefix
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

from retro.text.chunks import decode_chunks
from retro.text.documents import Document

LOSSES = ("unknown_tokens", "tried_documents", "lossy_documents")
_TRIED_DOCUMENTS = 32  # of a part of the inputs, whose tokens are turned back into text; and all with unknown tokens
log = logging.getLogger(__name__)


def look_for_losses(
    tokenizer: Any, document: Document, ids: Int64[ndarray, " t"], count: Counter[str]
) -> dict[str, str] | None:
    """Count unknown tokens, and documents that their tokens do not give back: of such a one, where it differs."""
    unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
    count["unknown_tokens"] += unknown
    if not unknown and count["tried_documents"] >= _TRIED_DOCUMENTS:
        return None
    count["tried_documents"] += 1
    (back,) = decode_chunks(tokenizer, [ids])
    if back == document.text:
        return None
    count["lossy_documents"] += 1
    at = max(len(commonprefix([back, document.text])) - 10, 0)
    shown = {"text": document.text[at : at + 40], "read_back": back[at : at + 40]}
    return {"place": document.place or document.id, **shown}


def warn_of_losses(tokenizer: str, counts: dict[str, Any], lost: dict[str, str] | None) -> None:
    """Say what of the texts cannot be read back from the tokens, where anything cannot."""
    if lost:
        log.warning(
            "the tokenizer %s does not give texts back: in %d of %d documents tried, and %d tokens are unknown; %s "
            "reads back %r in place of %r. Bits per byte are then of text that no model sees; take a tokenizer without "
            "losses, such as `retro tokenizer` trains",
            *(tokenizer, counts["lossy_documents"], counts["tried_documents"], counts["unknown_tokens"]),
            *(lost["place"], lost["read_back"], lost["text"]),
        )
