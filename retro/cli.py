"""The command `retro`: one verb, one function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

_KINDS = "auto, exact, scann, faiss, tfidf, bm25, or several joined by +"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; what the user can mend is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"retro: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("retro: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retro", description="Language models that read from a datastore.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data, models = (add_build, add_tokenizer, add_neighbors, add_search), (add_train, add_retrofit)
    measures = (add_evaluate, add_leakage, add_sweep, add_baselines, add_task)
    for add in (*data, *models, *measures, add_report, add_generate, add_serve, add_demo):
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
    """Add a verb; its function's docstring is its description."""
    parser = verbs.add_parser(name, help=help, description=(run.__doc__ or "").strip())
    parser.set_defaults(run=run)
    return parser


# build


def add_build(verbs: Any) -> None:
    parser = _verb(verbs, "build", build, "documents to a datastore: chunks, keys and an index")
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
        help="Hugging Face name or folder, or none for a store that is searched by its words; default: minilm",
    )
    parser.add_argument(
        "--pooling", choices=["mean", "cls"], help="default: what the embedder's folder says, else mean"
    )
    parser.add_argument("--query-prefix", default="", help="text that the embedder wants before a query")
    parser.add_argument("--passage-prefix", default="", help="text that the embedder wants before a passage")
    parser.add_argument("--max-length", type=int, metavar="N", help="of the embedder; default: what its folder says")
    parser.add_argument("--key-dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--chunk-len", type=int, default=64, metavar="M", help="tokens of a chunk")
    parser.add_argument("--min-chunk-len", type=int, default=8, metavar="N", help="shorter chunks are never retrieved")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")
    parser.add_argument(
        "--on-bad", default="error", choices=["error", "reject"], help="at a record that is no document"
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="held-out documents, whose near-copies are left out",
    )
    parser.add_argument("--index", default="auto", metavar="I", help=f"none, or {_KINDS}")
    parser.add_argument("--shard-chunks", type=int, default=1_000_000, metavar="N", help="chunks of a shard")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="chunks per forward pass; default: suits the device"
    )
    _add_json(parser)


def build(args: argparse.Namespace) -> int:
    """Build a datastore. What is there already is opened; a build that was killed is taken up again."""
    from dataclasses import fields

    from retro.retrieval import BuildSettings, build_store

    settings = BuildSettings(
        **{field.name: getattr(args, field.name) for field in fields(BuildSettings) if field.name in args}
    )
    store = build_store(settings, progress=True)
    counts = store.manifest["counts"]
    print(f"{store.path}: {store.num_documents} documents, {store.num_chunks} chunks, {counts['tokens']} tokens")
    print("read {read} = kept {kept} + empty {empty} + filtered {filtered} + rejected {rejected}".format(**counts))
    print("{short_chunks} chunks too short to retrieve, {truncated_chunks} cut by the embedder".format(**counts))
    _write_json(args.json, {"store": str(store.path), "counts": counts} | _stamp(store))
    return 0


# tokenizer


def add_tokenizer(verbs: Any) -> None:
    parser = _verb(verbs, "tokenizer", tokenizer, "train a SentencePiece tokenizer on documents")
    parser.add_argument("out", metavar="OUT", help="folder to write; Hugging Face loads it as a fast tokenizer")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="as for retro build")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column that holds the text")


def tokenizer(args: argparse.Namespace) -> int:
    """Train a byte-pair tokenizer with byte fallback that gives back every text as it was."""
    from retro.tokenizer import train_tokenizer

    trained = train_tokenizer(args.out, args.inputs, args.vocab_size, args.text_field)
    print(f"{args.out}: {len(trained)} pieces")
    return 0


# neighbors


def add_neighbors(verbs: Any) -> None:
    parser = _verb(verbs, "neighbors", neighbors, "write the neighbors of every chunk, ahead of training")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("--k", type=int, default=2, metavar="N", help="neighbors per chunk")
    parser.add_argument("--queries", metavar="STORE2", help="whose chunks to search for; default: STORE's own")
    parser.add_argument("--index", default="exact", metavar="I", help=f"{_KINDS}; default: exact")
    parser.add_argument(
        "--exclude", default="same_document", choices=["same_document", "none"], help="what is no neighbor of a chunk"
    )
    _add_json(parser)


def neighbors(args: argparse.Namespace) -> int:
    """Write the k nearest chunks of every chunk, those of its own document left out."""
    from retro.retrieval import Store, build_neighbors

    store = Store.open(args.store)
    queries = Store.open(args.queries) if args.queries else None
    table = build_neighbors(store, args.k, queries, args.exclude, args.index, progress=True)
    missing = table.record["missing"]
    print(f"{table.path}: {args.k} neighbors of {len(table.rows)} chunks, {missing} missing")
    _write_json(args.json, {"table": str(table.path), **table.record} | _stamp(store))
    return 0


# search


def add_search(verbs: Any) -> None:
    parser = _verb(verbs, "search", search, "show what the datastore holds nearest to a text")
    parser.add_argument("store", metavar="STORE", help="datastore to search")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="neighbors to show")
    parser.add_argument("--index", default="auto", metavar="I", help=_KINDS)
    parser.add_argument(
        "--retrieved-len", type=int, default=128, metavar="R", help="tokens of a neighbor and what follows it"
    )
    _add_json(parser)


def search(args: argparse.Namespace) -> int:
    """Print the nearest chunks with their continuations, scores (-squared L2 distance) and sources."""
    from retro.retrieval import Retriever

    if not args.text.strip():
        raise ValueError("the text to search for is empty; give some words")
    retriever = Retriever(args.store, args.index, num_neighbors=args.k, retrieved_len=args.retrieved_len)
    hits = retriever.show(args.text)
    for rank, hit in enumerate(hits, start=1):
        title = hit["title"] or hit["document_id"]
        print(f"[{rank}] score {hit['score']:.4f}  {title}  chunk {hit['position']}  {hit['source']}")
        print(f"{hit['neighbor'].strip()}\n  ...\n{hit['continuation'].strip()}\n")
    result = {"text": args.text, "index": retriever.index.kind, "neighbors": hits}
    _write_json(args.json, result | _stamp(retriever.store))
    return 0


# train


def add_train(verbs: Any) -> None:
    parser = _verb(verbs, "train", train, "train a RETRO, or a plain LM, from scratch")
    _add_recipe(parser, "train_small ...", "store=stores/docs output=runs/a lr=1e-3")


def train(args: argparse.Namespace) -> int:
    """Train as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    return _run_recipe("retro.train.pretrain", args)


# retrofit


def add_retrofit(verbs: Any) -> None:
    parser = _verb(verbs, "retrofit", retrofit, "teach a pretrained LM to read neighbors; its own weights stay")
    _add_recipe(parser, "retrofit_smollm2", "base=gpt2 store=stores/docs output=runs/fitted")


def retrofit(args: argparse.Namespace) -> int:
    """RETRO-fit as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    return _run_recipe("retro.train.retrofit", args)


# evaluate


def add_evaluate(verbs: Any) -> None:
    parser = _verb(verbs, "evaluate", evaluate, "bits per byte of held-out documents, retrieval ON and OFF")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    _add_reading(parser)
    _add_json(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Bits per byte and perplexity of whole documents by windows: LM, RETRO[OFF], [ON], [ON] with random neighbors."""
    from retro.evaluation import bits_per_byte, bits_table, perplexity_table

    model, retriever = _open_model(args.model, args.store, args.index)
    baseline = _open_lm(args.lm, retriever.store)
    documents, window = _held_out(args), dict(window_len=args.window, stride=args.stride)
    given = dict(seed=args.seed, progress=True, cache=args.cache or True, **window)
    result = bits_per_byte(model, documents, retriever, args.k, baseline, **given)
    print(bits_table(result), perplexity_table(result), sep="\n\n")
    _write_measured(args, result | _stamp(retriever.store))
    return 0


# leakage


def add_leakage(verbs: Any) -> None:
    parser = _verb(verbs, "leakage", leakage, "bits per byte against overlap with the training data")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    _add_reading(parser)
    parser.add_argument(
        "--exclude",
        default="same_document",
        choices=["same_document", "none"],
        help="what is no neighbor of a chunk; with none, a document of the store that has the id of an evaluation "
        "document counts as the leak that it is",
    )
    _add_files(parser)


def leakage(args: argparse.Namespace) -> int:
    """bpb(alpha): bits per byte over the chunks of which at most alpha is one run of tokens in common with any of their
    10 nearest neighbors (the paper's figure 6)."""
    from retro.evaluation import measure_leakage
    from retro.evaluation.leakage import examples_page, leakage_rows, leakage_table
    from retro.evaluation.plots import plot_leakage

    _check_files(args)
    model, retriever = _open_model(args.model, args.store, args.index)
    baseline = _open_lm(args.lm, retriever.store)
    documents, window = _held_out(args), dict(window_len=args.window, stride=args.stride)
    given = dict(exclude=args.exclude, seed=args.seed, progress=True, cache=args.cache or True, **window)
    result = measure_leakage(model, documents, retriever, args.k, baseline, **given)
    print(leakage_table(result), examples_page(result), sep="\n\n")
    _write_measured(args, result | _stamp(retriever.store), leakage_rows(result), plot_leakage)
    return 0


# sweep


def add_sweep(verbs: Any) -> None:
    about = "bits per byte over neighbors, datastore size, models or training tokens"
    kinds = verbs.add_parser("sweep", help=about, description=about).add_subparsers(metavar="WHAT", required=True)
    over = _verb(kinds, "neighbors", sweep_neighbors, "over k, the neighbors of a chunk")
    over.add_argument("model", metavar="MODEL", help="folder of a trained model")
    over.add_argument("--ks", type=int, nargs="+", metavar="K", default=[0, 1, 2, 4, 7, 10, 20, 40], help="0: OFF")
    _add_reading(over, k=False)
    over = _verb(kinds, "datastore", sweep_datastore, "over shares of the datastore's documents")
    over.add_argument("model", metavar="MODEL", help="folder of a trained model")
    over.add_argument("--shares", type=float, nargs="+", metavar="P", default=[2.0**-i for i in range(7)])
    over.add_argument("--draws", type=int, default=3, metavar="N", help="of each share; seeds are --seed and the next")
    _add_reading(over, index="exact")
    over = _verb(kinds, "models", sweep_models, "over models, by their parameters")
    over.add_argument("models", metavar="MODEL", nargs="+", help="folders of trained models, or names of plain LMs")
    _add_reading(over, lm=False)
    over = _verb(kinds, "tokens", sweep_tokens, "over the checkpoints of one run of training or RETRO-fitting")
    over.add_argument("folder", metavar="RUN", help="output folder of the run, trained with keep_checkpoints as needed")
    _add_reading(over)
    for over in kinds.choices.values():
        _add_files(over)


def sweep_neighbors(args: argparse.Namespace) -> int:
    """RETRO[ON] with k neighbors for each k; k may be larger than in training."""
    from retro.evaluation import sweep_neighbors

    _check_files(args)
    model, retriever = _open_model(args.model, args.store, args.index)
    baseline = _open_lm(args.lm, retriever.store)
    result = sweep_neighbors(model, _held_out(args), retriever, args.ks, baseline, _reading(args))
    return _show_sweep(args, result, retriever.store)


def sweep_datastore(args: argparse.Namespace) -> int:
    """RETRO[ON] with nested shares of the datastore, several draws of each: mean, least and greatest. Nothing is built
    again: the search leaves out the other documents."""
    from retro.evaluation import sweep_datastore
    from retro.provenance import check_store
    from retro.retrieval import Store

    _check_files(args)
    store = Store.open(args.store)
    model, _ = _open_model(args.model)
    check_store(args.model, store)
    baseline, documents = _open_lm(args.lm, store), _held_out(args)
    given = dict(num_neighbors=args.k, baseline=baseline, index=args.index, reading=_reading(args))
    result = sweep_datastore(model, documents, store, args.shares, args.draws, **given)
    return _show_sweep(args, result, store)


def sweep_models(args: argparse.Namespace) -> int:
    """Bits per byte of several models against their parameters: RETRO[OFF] and RETRO[ON], or a plain LM."""
    from retro.evaluation import sweep_models
    from retro.retrieval import Retriever

    _check_files(args)
    retriever = Retriever(args.store, args.index)
    models = ((name, _open_lm(name, retriever.store)) for name in args.models)
    result = sweep_models(models, _held_out(args), retriever, args.k, _reading(args))
    return _show_sweep(args, result, retriever.store)


def sweep_tokens(args: argparse.Namespace) -> int:
    """Bits per byte of each checkpoint of a run against the tokens it has seen."""
    from retro.evaluation import sweep_tokens
    from retro.retrieval import Retriever

    _check_files(args)
    retriever = Retriever(args.store, args.index)
    open_checkpoint = lambda folder: _open_lm(folder, retriever.store)  # noqa: E731
    baseline = _open_lm(args.lm, retriever.store)
    documents = _held_out(args)
    result = sweep_tokens(args.folder, documents, retriever, open_checkpoint, args.k, baseline, _reading(args))
    return _show_sweep(args, result, retriever.store)


def _reading(args: argparse.Namespace) -> Any:
    from retro.evaluation import Reading

    return Reading(args.window, args.stride, args.seed, args.cache or True, progress=True)


def _show_sweep(args: argparse.Namespace, result: dict[str, Any], store: Any) -> int:
    from retro.evaluation.plots import plot_sweep
    from retro.evaluation.sweeps import sweep_rows, sweep_table

    print(sweep_table(result))
    _write_measured(args, result | _stamp(store), sweep_rows(result), plot_sweep)
    return 0


# baselines


def add_baselines(verbs: Any) -> None:
    parser = _verb(verbs, "baselines", baselines, "what else the same store is good for, over the same tokens")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model, or a plain LM")
    parser.add_argument("--store", required=True, help="datastore to read from")
    parser.add_argument("--data", required=True, nargs="+", metavar="INPUT", help="held-out documents to score")
    parser.add_argument("--validation", nargs="+", metavar="INPUT", help="others, on which kNN-LM and REPLUG choose")
    parser.add_argument(
        "--reader",
        "--lm",
        metavar="MODEL",
        help="folder or Hugging Face name of the plain LM of the first row, which reads prompts and whose tokenizer is "
        "the store's; default: the base of a RETRO-fitted model",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="lm, retro_off, retro_on, retro_on_random, retro_on_bm25, retro_on_tfidf, retro_on_oracle, prepend, "
        "replug, rag_token, rag_sequence, knn_lm; default: all that can run",
    )
    parser.add_argument("--k", type=int, metavar="N", help="neighbors; default: the model's")
    parser.add_argument("--prompt-neighbors", type=int, metavar="N", help="prepended together; default: k, if they fit")
    parser.add_argument("--retrieval-stride", type=int, metavar="N", help="tokens between searches; default: a chunk")
    parser.add_argument("--query-len", type=int, metavar="N", help="tokens of those searches; default: a chunk")
    parser.add_argument("--documents", type=int, metavar="N", help="read so many documents; default: all")
    parser.add_argument("--windows-per-document", type=int, default=4, metavar="N", help="default 4; 0 takes all")
    parser.add_argument("--window", type=int, metavar="N", help="tokens of one; default: the model's, at most 2048")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows; default: half a window")
    parser.add_argument("--knn-tokens", type=int, metavar="N", help="keys of kNN-LM, drawn; default: the whole store")
    parser.add_argument("--index", default="auto", metavar="I", help=f"{_KINDS}; default: auto")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    _add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.set_defaults(plot=None)


def baselines(args: argparse.Namespace) -> int:
    """Bits per byte and cost of a plain LM, RETRO with several kinds of neighbors, text in front of the text, REPLUG,
    RAG and kNN-LM, with the same store over identical target tokens."""
    from retro.corpus import read_documents
    from retro.evaluation.baselines import BaselineSettings, baselines_rows, baselines_table, measure_baselines
    from retro.retrieval import Retriever, Store

    _check_files(args)
    chosen = ("prompt_neighbors", "retrieval_stride", "query_len", "stride", "knn_tokens", "seed")
    settings = BaselineSettings(
        methods=None if args.methods is None else tuple(args.methods),
        num_neighbors=args.k,
        windows_per_document=args.windows_per_document or None,
        window_len=args.window,
        **{name: getattr(args, name) for name in chosen},
    )
    store = Store.open(args.store)
    model, reader = _open_lm(args.model, store), _open_lm(args.reader, store)
    retrieved_len = getattr(model.config, "retrieved_len", 2 * store.chunk_len)
    retriever = Retriever(store, args.index, retrieved_len=retrieved_len)
    validation = None if args.validation is None else list(_only_documents(read_documents(args.validation)))
    result = measure_baselines(model, _held_out(args), retriever, reader, validation, settings, progress=True)
    print(baselines_table(result))
    _write_measured(args, result | {"validation": args.validation} | _stamp(store), baselines_rows(result))
    return 0


# task


def add_task(verbs: Any) -> None:
    about = "tasks with right answers: last words, summaries, questions, and those of lm_eval"
    kinds = verbs.add_parser("task", help=about, description=about).add_subparsers(metavar="WHAT", required=True)
    over = _verb(kinds, "lambada", task_lambada, "the last word of each document")
    _add_task(over, "documents, as for retro build")
    over.add_argument("--align", default="start", choices=["start", "end"], help=_ALIGN)
    over = _verb(kinds, "summaries", task_summaries, "bits per byte of summaries after their articles")
    _add_task(over, '{"article", "summary", "id"?} a record, JSON Lines or a JSON array')
    over = _verb(kinds, "qa", task_qa, "answers to questions with passages: exact match and F1")
    _add_task(over, '{"question", "answers", "ctxs"?} a record (FiD, DPR, NQ-open), JSON Lines or an array', k=False)
    over.add_argument("--passages", type=int, default=20, metavar="N", help="of each question; default 20")
    over.add_argument("--search", action="store_true", help="find the passages in --store even if the file has some")
    over.add_argument(
        "--columns", nargs="+", metavar="C", help="of retro_off, retro_on, retro_on_random, lm, in_context"
    )
    over.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of an answer; default 32")
    over = _verb(kinds, "recall", task_recall, "recall@k of the right passage")
    over.add_argument("--data", required=True, metavar="FILE", help="questions, as for retro task qa")
    over.add_argument("--store", help="datastore to find passages in; default: the passages of the file")
    over.add_argument("--index", nargs="+", metavar="I", help=f"one or more of {_KINDS}; default: auto")
    over.add_argument("--ks", type=int, nargs="+", default=[1, 5, 20, 100], metavar="K", help="default: 1 5 20 100")
    over.add_argument("--documents", type=int, metavar="N", help="read so many questions; default: all")
    over.add_argument("--seed", type=int, default=0, help="of the intervals")
    _add_json(over)
    _add_lm_eval(_verb(kinds, "lm-eval", task_lm_eval, "lm_eval's tasks; pip install retro-lm[eval]"))
    over = _verb(kinds, "finetune", task_finetune, "train a model to answer questions from passages")
    _add_recipe(over, "finetune_qa", "start=runs/fitted store=stores/docs questions=train.json output=runs/qa")


_ALIGN = "of a chunk that the context stands at (see retro.evaluation.tasks.reading); default: start"


def _add_task(parser: argparse.ArgumentParser, data: str, k: bool = True) -> None:
    """Options of our own tasks."""
    parser.add_argument("model", metavar="MODEL", help="a model of this library, or any Hugging Face causal LM")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help=data)
    parser.add_argument("--documents", type=int, metavar="N", help="read so many; default: all")
    parser.add_argument("--store", help="datastore to read from; default: none, RETRO[OFF] or a plain LM")
    parser.add_argument("--index", metavar="I", help=f"{_KINDS}; default: auto")
    if k:
        parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
        parser.add_argument("--cache", metavar="DIR", help="where neighbors are kept; default: the store's neighbors/")
    about = "leave out what shares 13 words in a row with the right text"
    parser.add_argument("--decontaminate", action="store_true", help=about)
    parser.add_argument(
        "--max-len", type=int, metavar="N", help="tokens of an input; default: the model's, at most 2048"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts read together; default 8")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    _add_json(parser)


def _add_lm_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model of this library, or any Hugging Face causal LM")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names of lm_eval's tasks, or of yours"
    )
    parser.add_argument("--include", metavar="DIR", help="folder with the YAML files of your tasks")
    parser.add_argument("--store", help="datastore to read from; default: none, RETRO[OFF] or a plain LM")
    parser.add_argument("--index", metavar="I", help=f"{_KINDS}; default: auto")
    parser.add_argument(
        "--k", type=int, metavar="N", help="neighbors per chunk, or passages; default: the model's, or 3"
    )
    about = "passages are neighbors, or stand in the prompt of any causal LM; default: neighbors"
    parser.add_argument("--reading", default="neighbors", choices=["neighbors", "prompt"], help=about)
    parser.add_argument("--retrieval", choices=["on", "off", "random"], help="default: on with a store")
    parser.add_argument("--align", default="start", choices=["start", "end"], help=_ALIGN)
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples in the prompt; default: the task's")
    parser.add_argument("--limit", type=int, metavar="N", help="read so many documents of each task; default: all")
    parser.add_argument("--max-len", type=int, metavar="N", help="tokens of an input; default: the model's positions")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts read together; default 8")
    parser.add_argument("--cache", metavar="DIR", help="keep responses there, a file for each model and store")
    parser.add_argument("--seed", type=int, default=0, help="of random neighbors and of few-shot examples")
    _add_json(parser)


def task_lambada(args: argparse.Namespace) -> int:
    """LAMBADA: the share of last words that greedy decoding writes, and their perplexity; RETRO[OFF], [ON], [ON] with
    random neighbors, or a plain LM. Neighbors are those of whole chunks before the last word."""
    from retro.evaluation.tasks import lambada_table, measure_lambada

    documents = _held_out(args)
    result = measure_lambada(_task_reader(args, align=args.align), documents)
    print(lambada_table(result))
    return _write_task(args, result)


def task_summaries(args: argparse.Namespace) -> int:
    """Bits per byte of summaries after article and "TL;DR:"; RETRO[OFF], [ON], [ON] with random neighbors, or a plain
    LM."""
    from retro.evaluation.tasks import measure_summaries, read_summaries, summaries_table

    pairs = _first(args, [pair for file in args.data for pair in read_summaries(file)])
    result = measure_summaries(_task_reader(args), pairs)
    print(summaries_table(result))
    return _write_task(args, result)


def task_qa(args: argparse.Namespace) -> int:
    """Greedy answers to questions: with passages as neighbors (RETRO[ON]), with those of other questions, with them in
    the prompt, and without any. Passages are those of the file, or else what --store finds for the question."""
    from retro.evaluation.tasks import answers_table, find_passages, measure_answers, read_questions, without_overlap

    questions = _first(args, [one for file in args.data for one in read_questions(file)])
    if args.search and not args.store:
        raise ValueError("--search is given without --store; name a datastore.")
    reader = _task_reader(args)
    if reader.retriever is not None and (args.search or any(one.passages is None for one in questions)):
        questions = find_passages(questions, reader.retriever, args.passages, args.decontaminate, progress=True)
    elif args.decontaminate:
        questions = [without_overlap(one) for one in questions]
    result = measure_answers(reader, questions, args.passages, args.max_new_tokens, args.columns)
    print(answers_table(result))
    return _write_task(args, result)


def task_recall(args: argparse.Namespace) -> int:
    """For how many questions one of the first k passages is of the right document, or holds a right answer."""
    from retro.evaluation.tasks import find_passages, read_questions, recall, recall_table
    from retro.retrieval import Retriever

    if args.index and not args.store:
        raise ValueError("--index means nothing without --store; name a datastore.")
    questions, results = _first(args, read_questions(args.data)), {}
    for kind in args.index or ["auto"] if args.store else []:
        found = find_passages(questions, Retriever(args.store, kind), max(args.ks), progress=True)
        results[kind] = recall(found, args.ks, args.seed)
    results = results or {"the file's": recall(questions, args.ks, args.seed)}
    print(recall_table(results))
    _write_json(args.json, {"task": "recall", "data": args.data, "store": args.store, "recall": results})
    return 0


def task_lm_eval(args: argparse.Namespace) -> int:
    """Run lm_eval's tasks on a model with a datastore. lm_eval's own command knows the model as "retro":
    python -m retro.evaluation.harness --model retro --model_args pretrained=MODEL,store=STORE --tasks TASK"""
    try:
        from retro.evaluation.harness import RetroLM, results_table, run_tasks
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[eval]".') from None
    _refuse_without_store(args, "index", "k")
    names = {"num_neighbors": "k", "max_length": "max_len"} | {
        name: name for name in ("store", "index", "reading", "retrieval", "align", "batch_size", "seed")
    }
    given = {name: getattr(args, option) for name, option in names.items() if getattr(args, option) is not None}
    lm = RetroLM(args.model, **given)
    results = run_tasks(lm, args.tasks, args.include, args.cache, args.fewshot, args.limit, args.seed)
    print(results_table(results))
    return _write_task(args, results)


def task_finetune(args: argparse.Namespace) -> int:
    """Train on answers only, as CONFIG and key=value say. The same command goes on from the last checkpoint."""
    return _run_recipe("retro.train.finetune", args)


def _task_reader(args: argparse.Namespace, **options: Any) -> Any:
    from retro.evaluation.tasks import open_reader

    _refuse_without_store(args, "index", "k", "cache")
    given = {name: getattr(args, name) for name in ("decontaminate", "max_len", "batch_size", "seed")}
    given |= {"num_neighbors": getattr(args, "k", None), "cache": getattr(args, "cache", None) or True}
    return open_reader(args.model, args.store, args.index or "auto", progress=True, **given, **options)


def _refuse_without_store(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not args.store and getattr(args, name, None) is not None:
            raise ValueError(f"--{name} means nothing without --store; name a datastore.")


def _first(args: argparse.Namespace, records: list) -> list:
    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents is {args.documents}; give at least 1.")
    return records[: args.documents]


def _write_task(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from retro.evaluation.plots import write_json

    if args.json:
        write_json(args.json, result | {"store": args.store, "data": getattr(args, "data", None)})
    return 0


# report


def add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", report, "one page of everything that was measured, with its limits")
    about = "a file that --json wrote, or a folder: the results, trained models and stores in it and in its folders"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=about)
    parser.add_argument("--output", required=True, metavar="FILE", help="the page to write, which needs nothing else")


def report(args: argparse.Namespace) -> int:
    """Write one HTML page: what was measured on what, tables, plots, samples with sources, settings, honest limits."""
    from retro.evaluation.report import read_runs, report_page

    output = Path(args.output)
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output is {output}; let it end in .html.")
    if not output.parent.is_dir():
        raise ValueError(f"the folder of {output} is not there; make it first.")
    runs = read_runs(args.runs)
    output.write_text(report_page(runs), encoding="utf-8")
    print(f"{output}: {len(runs.results)} results, {len(runs.models)} trained models, {len(runs.stores)} stores")
    return 0


# generate


def add_generate(verbs: Any) -> None:
    parser = _verb(verbs, "generate", generate, "sample with retrieval at every chunk and show the sources")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="text to continue; - or none at all: what standard input holds"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help='.txt, or .jsonl with the field "prompt": one a line')
    parser.add_argument("--store", help="datastore to read from; needed unless --no-retrieval")
    parser.add_argument("--no-retrieval", action="store_true", help="RETRO[OFF]")
    parser.add_argument("--k", type=int, metavar="N", help="neighbors per chunk; default: the model's")
    parser.add_argument("--index", metavar="I", help=f"{_KINDS}; default: auto")
    parser.add_argument("--lookahead", type=int, metavar="N", help="search N tokens before a chunk ends; default 0")
    parser.add_argument("--gains", action="store_true", default=None, help="measure tokens' loss OFF - ON, in bits")
    parser.add_argument("--html", metavar="FILE", help="write one page: the texts, and beside them what they read")
    _add_json(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts continued together; default 8")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 128, or what the model has room for")
    parser.add_argument("--do-sample", action="store_true", help="sample; default: the most likely token")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling; default 1")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this mass")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the likeliest N tokens; default 50")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling; default 0")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search over N texts; default: none")
    parser.add_argument("--num-return-sequences", type=int, metavar="N", help="texts for each prompt; default 1")
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="above 1 makes used tokens less likely")
    parser.add_argument("--stop", nargs="+", action="extend", metavar="STRING", help="a text ends after any of these")


def generate(args: argparse.Namespace) -> int:
    """Continue prompts, searching the store at the end of every chunk, and print the texts and what they could read.

    One prompt streams. Standard input is one prompt, whatever its lines.
    """
    from retro.prompts import read_prompts

    options = _generation_options(args)
    prompts = read_prompts(args.prompts, args.prompt_file, sys.stdin)
    model, retriever = _open_model(args.model, args.store, args.index or "auto")

    import torch
    from transformers import AutoTokenizer

    from retro.attribution import as_json, html_page, sample, terminal_stream, terminal_text, wants_color

    tokenizer, color = AutoTokenizer.from_pretrained(args.model), wants_color(sys.stdout)
    streams = len(prompts) == (args.num_beams or 1) == (args.num_return_sequences or 1) == 1
    if streams:
        options["streamer"] = terminal_stream(tokenizer, partial(print, end="", flush=True), color)
    torch.manual_seed(args.seed or 0)
    texts = sample(
        model, tokenizer, prompts, retriever, args.k, gains=bool(args.gains), batch_size=args.batch_size, **options
    )
    for number, text in enumerate(texts, start=1):
        print("\n" if streams else f"== text {number} of {len(texts)}")
        print(terminal_text(text, color, with_text=not streams))
    about = {"model": args.model}
    if retriever is not None:
        about |= {"store": args.store, "num_neighbors": args.k or model.config.num_neighbors}
    stamp = {} if retriever is None else _stamp(retriever.store)
    _write_json(args.json, {"texts": [as_json(text) for text in texts]} | about | stamp)
    if args.html:
        Path(args.html).write_text(html_page(texts, about), encoding="utf-8")
    return 0


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What Hugging Face's generate() is given; ValueError for what it would ignore."""
    if not args.store and not args.no_retrieval:
        raise ValueError("--store is missing; name a datastore, or say --no-retrieval.")
    for name in ("store", "k", "index", "lookahead", "gains"):
        if args.no_retrieval and getattr(args, name) is not None:
            raise ValueError(f"--{name} means nothing beside --no-retrieval; leave one of them out.")
    if not args.do_sample:
        names = [name for name in ("temperature", "top_p", "top_k", "seed") if getattr(args, name) is not None]
        if names:
            raise ValueError(f"--{names[0].replace('_', '-')} needs --do-sample.")
        if (args.num_return_sequences or 1) > (args.num_beams or 1):
            raise ValueError("--num-return-sequences needs --do-sample, or as many --num-beams.")
    for file in (args.html, args.json):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"the folder of {file} is not there; make it first.")
    sampling = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "repetition_penalty")
    given = {name: getattr(args, name) for name in (*sampling, "max_new_tokens", "lookahead")}
    given["stop_strings"] = args.stop
    return {name: value for name, value in given.items() if value is not None}


# serve


def add_serve(verbs: Any) -> None:
    from dataclasses import fields

    from retro.serve.limits import Limits

    parser = _verb(verbs, "serve", serve, "an HTTP server: OpenAI's routes with sources, and a page for people")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument(
        "--store",
        required=True,
        action="append",
        metavar="[NAME=]STORE",
        help="datastore to read from; again for more to choose from, the first is the default; its name: the folder's",
    )
    parser.add_argument("--name", help="what the model is called; default: its folder's name")
    parser.add_argument("--index", default="auto", metavar="I", help=f"{_KINDS}; default: auto")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the bearer token to ask for; default: RETRO_API_KEY, else none",
    )
    limits = parser.add_argument_group("limits")
    for limit in fields(Limits):
        name, kind = limit.name.replace("_", "-"), type(limit.default)
        limits.add_argument(
            f"--{name}",
            type=kind,
            default=limit.default,
            metavar="N",
            help=f"{limit.metadata['help']}; default {limit.default}",
        )


def serve(args: argparse.Namespace) -> int:
    """Serve a model: /v1/completions, /v1/chat/completions, /v1/models, /v1/stores, /health, and a page at /.

    The field "retro" of an answer says what it read; that of a request takes "retrieval", "store" and "num_neighbors".
    """
    from dataclasses import fields

    from retro.serve.limits import Limits

    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    try:
        from retro.serve.server import open_stores, read_api_key, run, serve_app, url_of
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[serve]".') from None
    from transformers import AutoTokenizer

    from retro.serve.engine import Engine

    api_key = read_api_key(args.api_key_file)
    model, _ = _open_model(args.model)
    stores = open_stores(args.store, args.model, model, args.index)
    engine = Engine(model, AutoTokenizer.from_pretrained(args.model), stores, limits)
    name = args.name or Path(args.model).resolve().name
    app, bound = serve_app(engine, name, args.host, args.port, api_key)
    print(f"{name} with {', '.join(stores)}: {url_of(bound)}", flush=True)
    run(app, bound, limits.grace_seconds)
    return 0


# demo


def add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", demo, "text to a trained RETRO, measured and sampled from, without any download")
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)


def demo(args: argparse.Namespace) -> int:
    """Build, train, measure and sample on the documentation of the Python packages installed here."""
    from retro.demo import run_demo

    print(run_demo(Path(args.output), args.seed))
    return 0


# what several verbs share


def _add_recipe(parser: argparse.ArgumentParser, packaged: str, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or the name of a packaged one: {packaged}")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"e.g. {example}")


def _run_recipe(module: str, args: argparse.Namespace) -> int:
    if not import_module(module).main(args.config, args.overrides):
        print("stopped; the same command goes on from the last checkpoint")
    return 0


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")


def _write_json(file: str | None, value: Any) -> None:
    if file:
        Path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stamp(store: Any) -> dict[str, str]:
    """What a result was measured with."""
    import torch
    import transformers

    import retro

    versions = {"retro": retro.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"store_fingerprint": store.fingerprint, "versions": versions}


def _open_model(folder: str, store: Any = None, index: str = "auto") -> tuple[Any, Any]:
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


def _add_reading(parser: argparse.ArgumentParser, lm: bool = True, k: bool = True, index: str = "auto") -> None:
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
    parser.add_argument("--index", default=index, metavar="I", help=f"{_KINDS}; default: {index}")
    parser.add_argument("--cache", metavar="DIR", help="where neighbors are kept; default: the store's neighbors/")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")


def _add_files(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg, .pdf), with .csv and .json beside it")


def _check_files(args: argparse.Namespace) -> None:
    """Refuse, before anything is measured, files that could not be written."""
    from retro.evaluation.plots import check_plot

    if args.plot:
        check_plot(args.plot)
    for file in (args.json, args.csv):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"the folder of {file} is not there; make it first.")


def _write_measured(args: argparse.Namespace, result: dict[str, Any], rows: Any = None, draw: Any = None) -> None:
    """The files that a measuring verb was asked for."""
    from retro.evaluation.plots import write_csv, write_json

    result |= {"store": str(args.store), "data": args.data}
    if args.json:
        write_json(args.json, result)
    if rows and args.csv:
        write_csv(args.csv, rows)
    if draw and args.plot:
        draw(result, args.plot)
        write_json(Path(args.plot).with_suffix(".json"), result)
        write_csv(Path(args.plot).with_suffix(".csv"), rows)


def _held_out(args: argparse.Namespace) -> list:
    from itertools import islice

    from retro.corpus import read_documents

    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents is {args.documents}; give at least 1.")
    return list(islice(_only_documents(read_documents(args.data)), args.documents))


def _open_lm(name: str | Path | None, store: Any) -> Any:
    """Any causal LM whose tokenizer is the store's: a trained folder of this library, or what `open_base` opens."""
    import torch

    from retro.provenance import FILE, check_store
    from retro.retrofit.bases import base_tokenizer, open_base

    if name is None:
        return None
    folder = Path(name)
    if folder.is_dir() and ((folder / FILE).is_file() or not (folder / "config.json").is_file()):
        model = _open_model(name)[0]
        check_store(name, store)
        return model
    store.check_tokenizer(base_tokenizer(name))
    return open_base(name).to(torch.accelerator.current_accelerator() or "cpu")


def _only_documents(records: Any) -> Any:
    """Documents with text; the first record that is no document is an error."""
    from retro.corpus import Document

    for record in records:
        if not isinstance(record, Document):
            raise ValueError(f"{record.file}, line {record.line}: {record.reason}")
        if record.text.strip():
            yield record


if __name__ == "__main__":
    sys.exit(main())
