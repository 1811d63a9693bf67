"""What several verbs share: arguments, writing results, reading documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from retro.text.documents import Document

ModelFolder = Annotated[str, Parameter(help="Folder of a trained model.")]
StoreFolder = Annotated[str, Parameter(help="Folder of the datastore.")]
Host = Annotated[str, Parameter(help="Address to listen on; 127.0.0.1 answers this machine only.")]
Port = Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")]
ApiKeyFile = Annotated[
    str | None, Parameter(help="File with the bearer token to ask for. Default: that of RETRO_API_KEY, else none.")
]
_INDEX = (
    "The index to search: auto, exact, scann, faiss, tfidf, bm25, several joined by +, or FIRST>SECOND to re-rank; "
    "scann and faiss take codes, as in faiss:ivf-pq. "
)
IndexKind = Annotated[str, Parameter(help=f"{_INDEX}auto is the best one built, else exact search.")]
OwnIndex = Annotated[
    str | None, Parameter(help=f"{_INDEX}Default: auto, or the kind of the model's training if that is lexical.")
]
DocumentCount = Annotated[int | None, Parameter(help="Read so many documents. Default: all.")]
RESULTS = Group("Results", sort_key=1000)
JsonFile = Annotated[str | None, Parameter(group=RESULTS, help="File to write the result to, as JSON.")]
CsvFile = Annotated[str | None, Parameter(group=RESULTS, help="File to write the table to, as CSV.")]
PlotFile = Annotated[
    str | None,
    Parameter(
        group=RESULTS,
        help="File to draw the result to (.png, .svg or .pdf), with the table beside it as .csv and .json.",
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


@dataclass
class Outputs:
    """The files that a verb was asked for; refused, before anything is measured, if they cannot be written."""

    json: str | None = None
    csv: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        from retro.evaluation.plots import check_plot

        if self.plot:
            check_plot(self.plot)
        for file in (self.json, self.csv):
            if file and not Path(file).parent.is_dir():
                raise ValueError(f"the folder of {file} is not there; make it first.")

    def write(self, result: dict[str, Any], rows: Any = None, draw: Any = None) -> None:
        """Write a result, its table and its plot."""
        from retro.evaluation.plots import write_csv

        write_json(self.json, result)
        if rows is not None and self.csv:
            write_csv(self.csv, rows)
        if draw is not None and self.plot:
            draw(result, self.plot)
            write_json(str(Path(self.plot).with_suffix(".json")), result)
            write_csv(Path(self.plot).with_suffix(".csv"), rows)


def held_out(inputs: Sequence[str], documents: int | None = None) -> list[Document]:
    """The first documents with text of inputs; the first record that is no document is an error."""
    from itertools import islice

    from retro.text.corpus import read_documents
    from retro.text.documents import Document

    def only_documents(records: Iterable[Any]) -> Iterator[Document]:
        for record in records:
            if not isinstance(record, Document):
                raise ValueError(f"{record.file}, line {record.line}: {record.reason}")
            if record.text.strip():
                yield record

    check_count(documents)
    return list(islice(only_documents(read_documents(inputs)), documents))


def check_count(documents: int | None) -> None:
    """Raise ValueError for a number of documents below 1."""
    if documents is not None and documents < 1:
        raise ValueError(f"--documents is {documents}; give at least 1.")
