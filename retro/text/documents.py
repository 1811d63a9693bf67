"""What is read: documents, records that are none, inputs and partitions of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """One document; `place` says where it was read ("file:line")."""

    id: str
    text: str
    title: str = ""
    source: str = ""
    date: str | None = None
    extra: dict = field(default_factory=dict, hash=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reject:
    """A record that is no document: where it stands (line from 1), why, and its beginning."""

    file: str
    line: int
    reason: str
    raw: str = ""


@dataclass(frozen=True)
class Input:
    """One input, frozen: a name without absolute paths, what kind it is, how large, and its checksum.

    kind is one that `retro.text.formats` reads; path is where it is now (for a dataset, what to load).
    """

    name: str
    kind: str
    path: str
    split: str = ""
    config: str = ""


@dataclass(frozen=True)
class InputPartition:
    """A range of one input's records.

    start, stop: bytes of a file of lines, lines of a compressed one, row groups of a Parquet file, batches of an Arrow
    one, rows of a dataset; None is the end. first: the number of the first record. bytes: about how much there is.
    """

    item: Input
    start: int = 0
    stop: int | None = None
    first: int = 1
    bytes: int = 0


# Records


def has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
