"""The verbs of the datastore: build, tokenizer, neighbors, search."""

from __future__ import annotations

import argparse
from typing import Any

from retro.cli.shared import (
    KINDS,
    add_document_filters,
    add_executor,
    add_filters,
    add_json,
    given_filters,
    stamp,
    verb,
    write_json,
)
from retro.retrieval.embedding.presets import ATTENTIONS, POOLINGS, SIMILARITIES

# build


def add_build(verbs: Any) -> None:
    parser = verb(verbs, "build", build, "documents to a datastore: chunks, keys and an index")
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help=".jsonl(.gz), .parquet, .txt/.md/.rst, a folder of those, a datasets name or folder, or package:NAME",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="Hugging Face name or folder, a GGUF file, or package:NAME for the GGUF file of an installed package",
    )
    parser.add_argument(
        "--embedder",
        default="minilm",
        metavar="E",
        help="a preset (contriever, dpr, e5-base-v2, ...), a Hugging Face name or folder, or none for a store that is "
        "searched by its words; default: minilm",
    )
    parser.add_argument("--key-dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--chunk-len", type=int, default=64, metavar="M", help="tokens of a chunk")
    parser.add_argument("--min-chunk-len", type=int, default=8, metavar="N", help="shorter chunks are never retrieved")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")
    parser.add_argument(
        "--on-bad", default="error", choices=["error", "reject"], help="at a record that is no document"
    )
    parser.add_argument("--index", default="auto", metavar="I", help=f"none, or {KINDS}")
    about = "share of the true nearest keys that an approximate index is tuned to find, such as 0.95"
    parser.add_argument("--recall", type=float, metavar="R", help=about)
    parser.add_argument("--shard-chunks", type=int, default=1_000_000, metavar="N", help="chunks of a shard")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="chunks per forward pass; default: suits the device"
    )
    _add_embedder(parser.add_argument_group("embedder", "default of each: what the preset or the folder says"))
    add_build_filters(parser.add_argument_group("filters", "documents left out; rules with > or < want quotes"))
    group = parser.add_argument_group("work", "who does it; the datastore is the same to the byte")
    about = "processes of this machine; the ranks of a Slurm array, srun or torchrun; a Ray cluster; default: local"
    group.add_argument("--executor", default="local", choices=["local", "ranks", "ray"], help=about)
    group.add_argument("--workers", type=int, metavar="N", help="default: one for each GPU, or else for each core")
    add_json(parser)


def _add_embedder(group: Any) -> None:
    group.add_argument("--pooling", choices=POOLINGS, help="which tokens make the key; else mean")
    group.add_argument("--query-prefix", metavar="TEXT", help="text that the embedder wants before a query")
    group.add_argument("--passage-prefix", metavar="TEXT", help="text that the embedder wants before a passage")
    group.add_argument("--pool-prefix", action=argparse.BooleanOptionalAction, help="whether prefixes are pooled too")
    group.add_argument("--max-length", type=int, metavar="N", help="in the embedder's tokens")
    group.add_argument("--similarity", choices=SIMILARITIES, help="what its keys are compared by; else cosine")
    group.add_argument("--query-encoder", metavar="E", help="another encoder for queries, or same")
    group.add_argument("--attention", choices=ATTENTIONS, help="bidirectional: every token of a decoder sees all")


def add_build_filters(group: Any) -> None:
    """Options of which documents are kept out of a store."""
    about = "held-out documents, which none may resemble"
    group.add_argument("--decontaminate", nargs="+", default=[], metavar="INPUT", help=about)
    about = "jaccard>=0.8 (default), overlap>=0.8, longest_run>=13 (words); may be repeated"
    group.add_argument("--decontaminate-by", action="append", metavar="MEASURE", help=about)
    about = "leave out documents whose text was read before or is in the store, but for case and white space (exact), "
    about += "or nearly so (minhash)"
    group.add_argument("--deduplicate", choices=["exact", "minhash"], help=about)
    group.add_argument("--deduplicate-at", type=float, metavar="J", help="similarity of a near copy; default: 0.8")
    group.add_argument("--deduplicate-ngram", type=int, metavar="N", help="words of a gram; default: 13")
    group.add_argument("--min-chars", type=int, metavar="N", help="characters of the shortest document")
    group.add_argument("--max-chars", type=int, metavar="N", help="of the longest")
    add_document_filters(group)


def build(args: argparse.Namespace) -> int:
    """Build a datastore. What is there already is opened; a build that was killed is taken up again."""
    from dataclasses import fields

    from retro.retrieval import BuildSettings, build_store

    settings = BuildSettings(
        **{field.name: getattr(args, field.name) for field in fields(BuildSettings) if field.name in args}
    )
    store = build_store(settings, progress=True)
    counts = store.manifest["counts"]
    print(f"{store.path}: {counts['documents']} documents, {counts['chunks']} chunks, {counts['tokens']} tokens")
    print_counts(counts, store.path / "rejects")
    print("{short_chunks} chunks too short to retrieve, {truncated_chunks} cut by the embedder".format(**counts))
    write_json(args.json, {"store": str(store.path), "counts": counts} | stamp(store))
    return 0


def print_counts(counts: dict[str, Any], rejects: Any) -> None:
    """What became of the records that were read."""
    print("read {read} = kept {kept} + empty {empty} + filtered {filtered} + rejected {rejected}".format(**counts))
    for name, count in counts.get("filtered_by", {}).items():
        print(f"{count} left out by {name}: see {rejects}")


# tokenizer


def add_tokenizer(verbs: Any) -> None:
    parser = verb(verbs, "tokenizer", tokenizer, "train a SentencePiece tokenizer on documents")
    parser.add_argument("out", metavar="OUT", help="folder to write; Hugging Face loads it as a fast tokenizer")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="as for retro build")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")


def tokenizer(args: argparse.Namespace) -> int:
    """Train a byte-pair tokenizer with byte fallback that gives back every text as it was."""
    from retro.text.tokenizer import train_tokenizer

    trained = train_tokenizer(args.out, args.inputs, args.vocab_size, args.text_field)
    print(f"{args.out}: {len(trained)} pieces")
    return 0


# neighbors


def add_neighbors(verbs: Any) -> None:
    parser = verb(verbs, "neighbors", neighbors, "write the neighbors of every chunk, ahead of training")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("--k", type=int, default=2, metavar="N", help="neighbors per chunk")
    parser.add_argument("--queries", metavar="STORE2", help="whose chunks to search for; default: STORE's own")
    parser.add_argument("--index", metavar="I", help=f"{KINDS}; default: exact, or tfidf in a store without keys")
    parser.add_argument(
        "--exclude", default="same_document", choices=["same_document", "none"], help="what is no neighbor of a chunk"
    )
    add_executor(parser)
    add_json(parser)


def neighbors(args: argparse.Namespace) -> int:
    """Write the k nearest chunks of every chunk, those of its own document left out.

    One that was killed is taken up again by the same command.
    """
    from retro.retrieval import Store, build_neighbors
    from retro.retrieval.search.searchers import is_keyless

    store = Store.open(args.store)
    queries = Store.open(args.queries) if args.queries else None
    index = args.index or ("tfidf" if is_keyless(store) else "exact")
    given = dict(progress=True, executor=args.executor, workers=args.workers)
    table = build_neighbors(store, args.k, queries, args.exclude, index, **given)
    missing = table.record["missing"]
    print(f"{table.path}: {args.k} neighbors of {len(table.rows)} chunks, {missing} missing")
    write_json(args.json, {"table": str(table.path), **table.record} | stamp(store))
    return 0


# search


def add_search(verbs: Any) -> None:
    parser = verb(verbs, "search", search, "show what the datastore holds nearest to a text")
    parser.add_argument("store", metavar="STORE", help="datastore to search, or address of a retrieval server")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="neighbors to show")
    parser.add_argument("--index", default="auto", metavar="I", help=KINDS)
    parser.add_argument(
        "--retrieved-len", type=int, default=128, metavar="R", help="tokens of a neighbor and what follows it"
    )
    add_filters(parser)
    add_json(parser)


def search(args: argparse.Namespace) -> int:
    """Print the nearest chunks with their continuations, scores (-squared L2 distance) and sources."""
    if not args.text.strip():
        raise ValueError("the text to search for is empty; give some words")
    from retro.loading import open_retriever

    given = dict(num_neighbors=args.k, retrieved_len=args.retrieved_len, **given_filters(args))
    retriever = open_retriever(args.store, args.index, **given)
    hits = retriever.show(args.text)
    for rank, hit in enumerate(hits, start=1):
        title = hit["title"] or hit["document_id"]
        print(f"[{rank}] score {hit['score']:.4f}  {title}  chunk {hit['position']}  {hit['source']}")
        print(f"{hit['neighbor'].strip()}\n  ...\n{hit['continuation'].strip()}\n")
    result = {"text": args.text, "index": retriever.index.kind, "neighbors": hits}
    write_json(args.json, result | stamp(retriever.store))
    return 0
