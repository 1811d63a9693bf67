"""The verbs that change or check a datastore: add, remove, compact, verify."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retro.cli.datastore import add_build_filters, print_counts
from retro.cli.shared import add_json, stamp, verb, write_json


def _add_store(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("store", metavar="STORE", help=help)


def _add_no_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-index", action="store_true", help="leave the indexes of the store as they are")


def _report(store: Any, file: str | None, did: dict[str, Any]) -> None:
    """Print and write what the store is after an update."""
    removed = len(store.removed_documents)
    print(
        f"{store.path}: generation {store.generation}, {store.num_live_documents} documents, "
        f"{store.num_live_chunks} chunks, {removed} removed document{'s' * (removed != 1)} still on disk"
    )
    counts = {"documents": store.num_live_documents, "chunks": store.num_live_chunks}
    about = {"store": str(store.path), "generation": store.generation, **counts}
    write_json(file, about | {"removed_documents": removed} | did | stamp(store))


# add


def add_add(verbs: Any) -> None:
    parser = verb(verbs, "add", add, "add documents to a datastore")
    _add_store(parser, "datastore to add to")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="as for retro build")
    parser.add_argument("--text-field", metavar="NAME", help="field or column that holds the text")
    parser.add_argument("--on-bad", choices=["error", "reject"], help="at a record that is no document")
    parser.add_argument("--batch-size", type=int, metavar="N", help="chunks per forward pass")
    group = parser.add_argument_group("filters", "documents left out; each is that of the build where it is not given")
    add_build_filters(group)
    about = "add to a datastore that was built with --decontaminate without looking at those documents"
    group.add_argument("--no-decontaminate", dest="decontaminate", action="store_const", const=[], help=about)
    parser.set_defaults(decontaminate=None)
    group = parser.add_argument_group("work", "who does it; the datastore is the same to the byte")
    about = "processes of this machine, or a Ray cluster; default: local"
    group.add_argument("--executor", choices=["local", "ray"], help=about)
    group.add_argument("--workers", type=int, metavar="N", help="default: one for each GPU, or else for each core")
    _add_no_index(parser)
    add_json(parser)


def add(args: argparse.Namespace) -> int:
    """Add documents, cut, embedded and filtered as the datastore was built."""
    from dataclasses import fields

    from retro.retrieval import BuildSettings, add_documents

    names = {field.name for field in fields(BuildSettings)} - {"store", "inputs"}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    store = add_documents(args.store, args.inputs, index=not args.no_index, progress=True, **given)
    added = store.manifest["updates"][-1]["counts"]
    print_counts(added, store.path / "rejects" / f"{store.generation:05d}")
    _report(store, args.json, {"counts": store.manifest["counts"], "added": added})
    return 0


# remove


def add_remove(verbs: Any) -> None:
    parser = verb(verbs, "remove", remove, "take documents out of a datastore")
    _add_store(parser, "datastore to take documents out of")
    parser.add_argument("ids", metavar="ID", nargs="*", help="ids of documents")
    parser.add_argument("--ids", dest="ids_file", metavar="FILE", help="a file of ids, one a line")
    _add_no_index(parser)
    add_json(parser)


def remove(args: argparse.Namespace) -> int:
    """Remove documents by id: no search returns them any more. `retro compact` then deletes their text from disk."""
    from retro.retrieval import remove_documents

    ids = [*args.ids, *(_ids_of(args.ids_file) if args.ids_file else [])]
    if not ids:
        raise ValueError("no id was given; name documents, or a file of ids with --ids")
    store = remove_documents(args.store, ids, index=not args.no_index)
    _report(store, args.json, {"ids": len(set(ids))})
    return 0


def _ids_of(file: str) -> list[str]:
    lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    return [line for line in lines if line.strip()]


# compact


def add_compact(verbs: Any) -> None:
    parser = verb(verbs, "compact", compact, "delete removed text from disk and merge small shards")
    _add_store(parser, "datastore to compact")
    _add_no_index(parser)
    add_json(parser)


def compact(args: argparse.Namespace) -> int:
    """Delete the text of removed documents from disk. Rows get new numbers: run `retro neighbors` again afterwards."""
    from retro.retrieval import compact as compact_store

    store = compact_store(args.store, index=not args.no_index, progress=True)
    _report(store, args.json, {"shards": len(store.shards)})
    return 0


# verify


def add_verify(verbs: Any) -> None:
    parser = verb(verbs, "verify", verify, "check that a datastore is whole")
    _add_store(parser, "datastore to check")
    parser.add_argument("--full", action="store_true", help="compare the checksum of every file, look at every key")
    parser.add_argument("--embed", type=int, default=0, metavar="N", help="embed N chunks again and compare their keys")
    parser.add_argument("--seed", type=int, default=0, help="of the chunks that are drawn")
    add_json(parser)


def verify(args: argparse.Namespace) -> int:
    """Compare a datastore's files with its manifest and with each other; the first that differs is named."""
    from retro.retrieval import Store, verify_store

    store = Store.open(args.store)
    checked = verify_store(store, "full" if args.full else "quick", args.embed, args.seed)
    counts = f"{checked['documents']} documents, {checked['chunks']} chunks"
    print(f"{store.path}: generation {store.generation} is whole: {counts}")
    if args.full:
        print(f"the checksums of {checked['files']} files are right, every key is finite")
    if checked["embedded"]:
        print(
            f"{checked['embedded']} chunks embedded again: at most {checked['largest_difference']:.2g} from their keys"
        )
    write_json(args.json, {"store": str(store.path), **checked} | stamp(store))
    return 0
