"""The verbs of the datastore: plan, build, tokenizer, neighbors, search."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from retro.cli.options import argument, options
from retro.cli.shared import IndexKind, JsonFile, RunFile, stamp, use_device, write_json
from retro.common.devices import DeviceSettings
from retro.planning import PlanSettings, make_plan, plan_table
from retro.retrieval.building.settings import BuildSettings, ExecutorSettings
from retro.retrieval.filters.hits import QueryFilters

Inputs = argument(BuildSettings, "inputs")
TextField = argument(BuildSettings, "text_field")
PlanOptions = options(PlanSettings, DeviceSettings, without=["inputs"])
BuildOptions = options(BuildSettings, DeviceSettings, without=["store", "inputs"])
ExecutorOptions = options(ExecutorSettings, DeviceSettings)
FilterOptions = options(QueryFilters, DeviceSettings, without=["against"])
_QUERIES = 256  # searched for at a time


def plan(
    inputs: argument(PlanSettings, "inputs"), /, *, json: JsonFile = None, **settings: Unpack[PlanOptions]
) -> None:
    """Say what a datastore will cost before it is built, and with --model what training on it costs.

    Disk, memory, operations and hours follow from a sample of the documents and from how fast this machine embeds it.
    """
    use_device(settings)
    result = make_plan(PlanSettings(inputs, **settings))
    print(plan_table(result))
    write_json(json, result)


def build(
    store: argument(BuildSettings, "store"),
    inputs: Inputs,
    /,
    *,
    json: JsonFile = None,
    **settings: Unpack[BuildOptions],
) -> None:
    """Turn documents into a datastore of chunks, keys and an index.

    What is there already is opened; a build that was killed is taken up again.
    """
    from retro.retrieval import build_store

    use_device(settings)
    made = build_store(BuildSettings(store, inputs, **settings), progress=True)
    counts = made.manifest["counts"]
    print(f"{made.path}: {counts['documents']} documents, {counts['chunks']} chunks, {counts['tokens']} tokens")
    print_counts(counts, made.path / "rejects")
    print("{short_chunks} chunks too short to retrieve, {truncated_chunks} cut by the embedder".format(**counts))
    write_json(json, {"store": str(made.path), "counts": counts} | stamp(made))


def print_counts(counts: dict[str, Any], rejects: Any) -> None:
    """What became of the records that were read."""
    print("read {read} = kept {kept} + empty {empty} + filtered {filtered} + rejected {rejected}".format(**counts))
    for name, count in counts.get("filtered_by", {}).items():
        print(f"{count} left out by {name}: see {rejects}")


def tokenizer(out: str, inputs: Inputs, /, *, vocab_size: int = 32_000, text_field: TextField = "text") -> None:
    """Train a SentencePiece tokenizer on documents.

    It joins byte pairs, falls back to bytes, and gives back every text as it was.

    Arguments:
        out: Folder to write; Hugging Face loads it as a fast tokenizer.
        vocab_size: Pieces of the vocabulary.
    """
    from retro.text.tokenizer import train_tokenizer

    print(f"{out}: {len(train_tokenizer(out, inputs, vocab_size, text_field))} pieces")


def neighbors(
    store: str,
    /,
    *,
    k: int = 2,
    queries: str | None = None,
    index: str | None = None,
    exclude: Literal["same_document", "none"] = "same_document",
    json: JsonFile = None,
    **work: Unpack[ExecutorOptions],
) -> None:
    """Write the nearest chunks of every chunk, ahead of training.

    A run that was killed is taken up again by the same command.

    Arguments:
        store: Folder of the datastore to search.
        k: Neighbors of a chunk.
        queries: Folder of the store whose chunks to search for. Default: the datastore's own.
        index: The index to search, as for `retro search`. Default: exact, or tfidf in a store without keys.
        exclude: What is no neighbor of a chunk.
    """
    from retro.retrieval import Store, build_neighbors
    from retro.retrieval.search.searchers import is_keyless

    use_device(work)
    opened = Store.open(store)
    index = index or ("tfidf" if is_keyless(opened) else "exact")
    table = build_neighbors(opened, k, queries and Store.open(queries), exclude, index, progress=True, **work)
    print(f"{table.path}: {k} neighbors of {len(table.rows)} chunks, {table.record['missing']} missing")
    write_json(json, {"table": str(table.path), **table.record} | stamp(opened))


def search(
    store: str,
    text: str | None = None,
    /,
    *,
    queries: str | None = None,
    k: int = 5,
    index: IndexKind = "auto",
    retrieved_len: int = 128,
    run: RunFile = None,
    json: JsonFile = None,
    **filters: Unpack[FilterOptions],
) -> None:
    """Show what the datastore holds nearest to a text, or to many.

    Every neighbor is printed with its continuation, its score and its source.

    Arguments:
        store: Folder of the datastore to search, or the address of a retrieval server.
        text: The text to search for.
        queries: File of texts to search for: .txt with one a line, JSON Lines with "text" and perhaps "_id" (BEIR), or
            .tsv with an id and a text (TREC).
        k: Neighbors to show.
        retrieved_len: Tokens of a neighbor and what follows it, r in the paper.
    """
    if (text is None) == (queries is None):
        raise ValueError("give a text to search for, or a file of them with --queries")
    if text is not None and not text.strip():
        raise ValueError("the text to search for is empty; give some words")
    from retro.evaluation.tasks.runs import ranking, read_queries, write_run
    from retro.loading import open_retriever

    use_device(filters)
    asked = [("1", text)] if queries is None else read_queries(queries)
    retriever = open_retriever(store, index, num_neighbors=k, retrieved_len=retrieved_len, **filters)
    shown, ranked = [], {}
    for start in range(0, len(asked), _QUERIES):
        part = asked[start : start + _QUERIES]
        found = retriever([own for _, own in part])
        for (name, own), hits, sources, scores in zip(
            part, retriever.records(found), found.sources, found.scores, strict=True
        ):
            if queries is not None:
                print(f"== {name}: {own}")
            _print_hits(hits, retriever.measure)
            shown.append({"id": name, "text": own, "neighbors": hits})
            ranked[name] = ranking(sources, scores.tolist())
    if run:
        write_run(run, ranked, retriever.index.kind)
    about = {"index": retriever.index.kind, "index_recall": retriever.index.recall, "measure": retriever.measure}
    result = shown[0] if queries is None else {"queries": shown}
    write_json(json, result | about | stamp(retriever.store))


def _print_hits(hits: list[dict[str, Any]], measure: str) -> None:
    for rank, hit in enumerate(hits, start=1):
        title = hit["title"] or hit["document_id"]
        print(f"[{rank}] {measure} {hit['score']:.4f}  {title}  chunk {hit['position']}  {hit['source']}")
        print(f"{hit['neighbor'].strip()}\n  ...\n{hit['continuation'].strip()}\n")
