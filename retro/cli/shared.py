"""What several verbs share: arguments, writing results, reading documents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from retro.cli.options import taken
from retro.common.devices import DeviceSettings
from retro.common.values import check_fields

if TYPE_CHECKING:
    from retro.text.documents import Document

ModelFolder = Annotated[str, Parameter(help="Folder of a trained model.")]
StoreFolder = Annotated[str, Parameter(help="Folder of the datastore.")]
ReadStore = Annotated[str, Parameter(help="Folder of the datastore to read from, or address of a retrieval server.")]
HeldOut = Annotated[list[str], Parameter(help="Held-out documents, as for `retro build`.")]
Host = Annotated[str, Parameter(help="Address to listen on; 127.0.0.1 answers this machine only.")]
Port = Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")]
_KEY = "File with the bearer token to ask for. Default: that of RETRO_API_KEY, else none."
ApiKeyFile = Annotated[str | None, Parameter(help=_KEY)]
_INDEX = (
    "The index to search: auto, exact, scann, routed, faiss, tfidf, bm25, several joined by +, or FIRST>SECOND to "
    "re-rank, as tfidf>continuation; scann and faiss take codes, as in faiss:ivf-pq; tfidf:exact and bm25:exact miss "
    "nothing. "
)
IndexKind = Annotated[str, Parameter(help=f"{_INDEX}auto is the best one built, else exact search.")]
_OWN_INDEX = f"{_INDEX}Default: auto, or the kind of the model's training if that is lexical."
OwnIndex = Annotated[str | None, Parameter(help=_OWN_INDEX)]

_BASE = "Of a RETRO-fitted model: folder or Hugging Face name of its base. Default: what the model's folder names."
Base = Annotated[str | None, Parameter(help=_BASE)]


def use_device(given: dict[str, Any]) -> None:
    """Let the verb's models run where and in which type was given, which is taken out of `given`."""
    DeviceSettings(**taken(given, DeviceSettings)).use()


def check_file(file: str | None) -> None:
    """Before anything is done, make the folder of a file to write; ValueError for one that could not be written."""
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{file!r} is a folder; name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written; name another file.")


JsonFile = Annotated[
    str | None,
    Parameter(help="File to write the result to, as JSON.", validator=lambda hint, file: check_file(file)),
]


RunFile = Annotated[
    str | None,
    Parameter(
        help="File to write the rankings of documents to: in TREC's form, or in .json as BEIR and MTEB read them.",
        validator=lambda hint, file: check_file(file),
    ),
]


def write_json(file: str | None, value: Any) -> None:
    """Write a result, if it was asked for."""
    if file:
        from retro.common.files import write_result

        write_result(file, value)


def stamp(store: Any) -> dict[str, Any]:
    """What a result was made with."""
    from retro.provenance import versions

    return {"store_fingerprint": store.fingerprint, "versions": versions()}


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """Where the result is written.

    Arguments:
        json: File to write the result to, as JSON.
        csv: File to write the table to, as CSV.
        plot: File to draw the result to (.png, .svg or .pdf), with the table beside it as .csv and .json.
    """

    json: str | None = None
    csv: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.plot:
            from retro.evaluation.plots import check_plot

            check_plot(self.plot)
        for file in (self.json, self.csv, self.plot):
            check_file(file)

    def show(self, result: dict[str, Any], draw: Any = None) -> None:
        """Print a result; write it, its table and its plot, as far as they were asked for."""
        from retro.evaluation.tables import as_text, tables_of, write_csv

        tables = tables_of(result)
        print(as_text(tables))
        records = [record for table in tables for record in table.data]
        write_json(self.json, result)
        if self.csv:
            write_csv(self.csv, records)
        if self.plot:
            draw(result, self.plot)
            write_json(str(Path(self.plot).with_suffix(".json")), result)
            write_csv(Path(self.plot).with_suffix(".csv"), records)


def held_out(inputs: Sequence[str], documents: int | None = None) -> list[Document]:
    """The first documents with text of inputs; the first record that is no document is an error."""
    from retro.text.corpus import read_documents

    return first((document for document in read_documents(inputs) if document.text.strip()), documents)


def first(records: Any, count: int | None) -> list:
    """The first records, all without a count; ValueError for a count below 1."""
    from itertools import islice

    if count is not None and count < 1:
        raise ValueError(f"--documents is {count}; give at least 1.")
    return list(islice(records, count))
