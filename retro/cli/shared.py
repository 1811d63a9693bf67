"""What several verbs share: options, opening models and data, writing results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

KINDS = "auto, exact, scann, faiss, tfidf, bm25, or several joined by +"


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


def open_model(folder: str, store: Any = None, index: str = "auto") -> tuple[Any, Any]:
    """A trained model and, with a store, a retriever over it, refused if the store is another tokenizer's."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from retro.provenance import check_store
    from retro.retrieval import Retriever, Store

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); give the folder of a trained model.")
    retriever = None
    if store is not None:
        store = store if isinstance(store, Store) else Store.open(store)
        check_store(folder, store)
    device = torch.accelerator.current_accelerator() or "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(
            f"{folder} holds a damaged model ({error}); copy it again from where it was trained."
        ) from None
    if store is not None:
        retriever = Retriever(store, index, retrieved_len=getattr(model.config, "retrieved_len", 2 * store.chunk_len))
    return model, retriever


def add_reading(parser: argparse.ArgumentParser, lm: bool = True, k: bool = True, index: str = "auto") -> None:
    """Options of everything that scores held-out documents."""
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
    parser.add_argument("--index", default=index, metavar="I", help=f"{KINDS}; default: {index}")
    parser.add_argument("--cache", metavar="DIR", help="where neighbors are kept; default: the store's neighbors/")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")


def add_files(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg, .pdf), with .csv and .json beside it")


def check_files(args: argparse.Namespace) -> None:
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

    from retro.corpus import read_documents

    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents is {args.documents}; give at least 1.")
    return list(islice(only_documents(read_documents(args.data)), args.documents))


def open_lm(name: str | Path | None, store: Any) -> Any:
    """Any causal LM whose tokenizer is the store's: a trained folder of this library, or what `open_base` opens."""
    import torch

    from retro.provenance import FILE, check_store
    from retro.retrofit.bases import base_tokenizer, open_base

    if name is None:
        return None
    folder = Path(name)
    if folder.is_dir() and ((folder / FILE).is_file() or not (folder / "config.json").is_file()):
        model = open_model(name)[0]
        check_store(name, store)
        return model
    store.check_tokenizer(base_tokenizer(name))
    return open_base(name).to(torch.accelerator.current_accelerator() or "cpu")


def only_documents(records: Any) -> Any:
    """Documents with text; the first record that is no document is an error."""
    from retro.corpus import Document

    for record in records:
        if not isinstance(record, Document):
            raise ValueError(f"{record.file}, line {record.line}: {record.reason}")
        if record.text.strip():
            yield record


def add_recipe(parser: argparse.ArgumentParser, packaged: str, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or the name of a packaged one: {packaged}")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"e.g. {example}")


def run_recipe(module: str, args: argparse.Namespace) -> int:
    if not import_module(module).main(args.config, args.overrides):
        print("stopped; the same command goes on from the last checkpoint")
    return 0
