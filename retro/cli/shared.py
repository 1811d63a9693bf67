"""What several verbs share: options, opening models and data, writing results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KINDS = "auto, exact, scann[:CODES], faiss[:CODES], tfidf, bm25, several joined by +, or FIRST>SECOND"
OWN_INDEX = "default: auto, or that of the model's training if it goes by words"


def verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
    """Add a verb; its function's docstring is its description."""
    parser = verbs.add_parser(name, help=help, description=(run.__doc__ or "").strip())
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")


def write_json(file: str | None, value: Any) -> None:
    if file:
        Path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stamp(store: Any) -> dict[str, Any]:
    """What a result was made with."""
    from retro.provenance import versions

    return {"store_fingerprint": store.fingerprint, "versions": versions()}


FILTERS = ("deduplicate", "decontaminate", "min_date", "max_date", "undated", "quality", "subsample")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Options of what is kept out of the neighbors."""
    group = parser.add_argument_group("filters", "what is kept out of the neighbors; rules with > or < want quotes")
    group.add_argument("--deduplicate", action="store_true", default=None, help="no two neighbors of the same text")
    about = "no neighbor that resembles the query: longest_run>=13 (words), jaccard>=0.8, overlap>=0.8; may be repeated"
    group.add_argument("--decontaminate", action="append", metavar="MEASURE", help=about)
    add_document_filters(group)


def add_document_filters(group: Any) -> None:
    """Options about a document's record, when a store is built and when it is searched."""
    group.add_argument("--min-date", metavar="DATE", help="year, month or day (2015-06-30) of the oldest document")
    group.add_argument("--max-date", metavar="DATE", help="that of the newest")
    group.add_argument("--undated", choices=["drop", "keep"], help="documents without a date; default: drop")
    about = "about a field of the documents, such as 'extra.score>=0.5' or language==en; may be repeated"
    group.add_argument("--quality", action="append", metavar="RULE", help=about)
    group.add_argument("--subsample", nargs=2, type=float, metavar=("P", "SEED"), help="a share P of the documents")


def given_filters(args: argparse.Namespace) -> dict[str, Any]:
    """What a Retriever is given of `add_filters`."""
    return {name: getattr(args, name) for name in FILTERS if getattr(args, name) is not None}


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Options of who does a long job."""
    about = (
        "who does the work: processes of this machine, the ranks of a Slurm array, srun or torchrun, or a Ray cluster"
    )
    parser.add_argument(
        "--executor", default="local", choices=["local", "ranks", "ray"], help=f"{about}; default local"
    )
    about = "processes, or tasks at a time on Ray; default: one for each GPU, or else for each core"
    parser.add_argument("--workers", type=int, metavar="N", help=about)


def add_limits(parser: argparse.ArgumentParser, limits: type) -> None:
    """Options of a server's limits, by the names of their fields."""
    from dataclasses import fields

    group = parser.add_argument_group("limits")
    for limit in fields(limits):
        about = f"{limit.metadata['help']}; default {limit.default}"
        name, kind = limit.name.replace("_", "-"), type(limit.default)
        group.add_argument(f"--{name}", type=kind, default=limit.default, metavar="N", help=about)


def given_limits(args: argparse.Namespace, limits: type) -> Any:
    """The limits that `add_limits` was given."""
    from dataclasses import fields

    return limits(**{limit.name: getattr(args, limit.name) for limit in fields(limits)})


def add_listening(parser: argparse.ArgumentParser, port: int) -> None:
    """Options of where a server listens and whom it answers."""
    about = "address to listen on; default: 127.0.0.1, this machine only"
    parser.add_argument("--host", default="127.0.0.1", help=about)
    parser.add_argument("--port", type=int, default=port, metavar="N", help=f"default {port}; 0 takes a free one")
    about = "file with the bearer token to ask for; default: RETRO_API_KEY, else none"
    parser.add_argument("--api-key-file", metavar="FILE", help=about)


def add_reading(
    parser: argparse.ArgumentParser, lm: bool = True, k: bool = True, index: str = "auto", default: str = OWN_INDEX
) -> None:
    """Options of everything that scores held-out documents. default: what to say of --index."""
    parser.add_argument("--store", required=True, help="datastore to read from")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="INPUT", help="held-out documents, as for retro build"
    )
    parser.add_argument("--documents", type=int, metavar="N", help="read so many documents; default: all")
    if lm:
        about = "folder or Hugging Face name of a plain LM to score beside it, whose tokenizer is the store's"
        parser.add_argument("--lm", metavar="MODEL", help=about)
    if k:
        parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens in a window; default: the model's, at most 2048"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows; default: half a window")
    parser.add_argument("--index", default=index, metavar="I", help=f"{KINDS}; {default}")
    parser.add_argument("--cache", metavar="DIR", help="where neighbors are kept; default: the store's neighbors/")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")


def add_files(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg, .pdf), with .csv and .json beside it")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before anything is measured, files that could not be written."""
    from retro.evaluation.plots import check_plot

    if args.plot:
        check_plot(args.plot)
    for file in (args.json, args.csv):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"the folder of {file} is not there; make it first.")


def write_measured(
    args: argparse.Namespace, kind: str, result: dict[str, Any], rows: Any = None, draw: Any = None
) -> None:
    """The files that a measuring verb was asked for."""
    from retro.evaluation.plots import write_csv, write_json

    result = {"kind": kind} | result | {"store": args.store, "data": getattr(args, "data", None)}
    if args.json:
        write_json(args.json, result)
    if rows is not None and args.csv:
        write_csv(args.csv, rows)
    if draw is not None and args.plot:
        draw(result, args.plot)
        write_json(Path(args.plot).with_suffix(".json"), result)
        write_csv(Path(args.plot).with_suffix(".csv"), rows)


def held_out(args: argparse.Namespace) -> list:
    from itertools import islice

    from retro.text.corpus import read_documents

    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents is {args.documents}; give at least 1.")
    return list(islice(only_documents(read_documents(args.data)), args.documents))


def only_documents(records: Any) -> Any:
    """Documents with text; the first record that is no document is an error."""
    from retro.text.documents import Document

    for record in records:
        if not isinstance(record, Document):
            raise ValueError(f"{record.file}, line {record.line}: {record.reason}")
        if record.text.strip():
            yield record


def add_recipe(parser: argparse.ArgumentParser, packaged: str, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or the name of a packaged one: {packaged}")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"e.g. {example}")


def run_recipe(main: Callable[[str, Sequence[str]], bool], args: argparse.Namespace) -> int:
    if not main(args.config, args.overrides):
        print("stopped; the same command goes on from the last checkpoint")
    return 0
