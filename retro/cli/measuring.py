"""The verbs of measuring: evaluate, leakage, sweep, baselines, report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retro.cli.shared import (
    KINDS,
    OWN_INDEX,
    add_files,
    add_json,
    add_reading,
    check_outputs,
    held_out,
    only_documents,
    verb,
    write_measured,
)


def _opened(args: argparse.Namespace, model: Any = None) -> tuple[Any, Any, Any]:
    """The model, what retrieves for it, and the plain LM beside it or None."""
    from retro.loading import load, load_model

    opened, _, retriever = load(model or args.model, args.store, index=args.index)
    return opened, retriever, args.lm and load_model(args.lm, retriever.store)


# evaluate


def add_evaluate(verbs: Any) -> None:
    parser = verb(verbs, "evaluate", evaluate, "bits per byte of held-out documents, retrieval ON and OFF")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    add_reading(parser)
    add_json(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Bits per byte and perplexity of whole documents by windows: LM, RETRO[OFF], [ON], [ON] with random neighbors."""
    from retro.evaluation import bits_per_byte, bits_table, perplexity_table

    model, retriever, baseline = _opened(args)
    documents, window = held_out(args), dict(window_len=args.window, stride=args.stride)
    given = dict(seed=args.seed, progress=True, cache=args.cache or True, **window)
    result = bits_per_byte(model, documents, retriever, args.k, baseline, **given)
    print(bits_table(result), perplexity_table(result), sep="\n\n")
    write_measured(args, "evaluate", result)
    return 0


# leakage


def add_leakage(verbs: Any) -> None:
    parser = verb(verbs, "leakage", leakage, "bits per byte against overlap with the training data")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    add_reading(parser)
    parser.add_argument(
        "--exclude",
        default="same_document",
        choices=["same_document", "none"],
        help="what is no neighbor of a chunk; with none, a document of the store that has the id of an evaluation "
        "document counts as the leak that it is",
    )
    add_files(parser)


def leakage(args: argparse.Namespace) -> int:
    """bpb(alpha): bits per byte over the chunks of which at most alpha is one run of tokens in common with any of their
    10 nearest neighbors (the paper's figure 6)."""
    from retro.evaluation import measure_leakage
    from retro.evaluation.leakage import examples_page, leakage_rows, leakage_table
    from retro.evaluation.plots import plot_leakage

    check_outputs(args)
    model, retriever, baseline = _opened(args)
    documents, window = held_out(args), dict(window_len=args.window, stride=args.stride)
    given = dict(exclude=args.exclude, seed=args.seed, progress=True, cache=args.cache or True, **window)
    result = measure_leakage(model, documents, retriever, args.k, baseline, **given)
    print(leakage_table(result), examples_page(result), sep="\n\n")
    write_measured(args, "leakage", result, leakage_rows(result), plot_leakage)
    return 0


# sweep


def add_sweep(verbs: Any) -> None:
    about = "bits per byte over neighbors, datastore size, models or training tokens"
    kinds = verbs.add_parser("sweep", help=about, description=about).add_subparsers(metavar="WHAT", required=True)
    over = verb(kinds, "neighbors", sweep_neighbors, "over k, the neighbors of a chunk")
    over.add_argument("model", metavar="MODEL", help="folder of a trained model")
    over.add_argument("--ks", type=int, nargs="+", metavar="K", default=[0, 1, 2, 4, 7, 10, 20, 40], help="0: OFF")
    add_reading(over, k=False)
    over = verb(kinds, "datastore", sweep_datastore, "over shares of the datastore's documents")
    over.add_argument("model", metavar="MODEL", help="folder of a trained model")
    over.add_argument("--shares", type=float, nargs="+", metavar="P", default=[2.0**-i for i in range(7)])
    over.add_argument("--draws", type=int, default=3, metavar="N", help="of each share; seeds are --seed and the next")
    add_reading(over, index="exact", default="default: exact")
    over = verb(kinds, "models", sweep_models, "over models, by their parameters")
    over.add_argument("models", metavar="MODEL", nargs="+", help="folders of trained models, or names of plain LMs")
    add_reading(over, lm=False, default="default: auto")
    over = verb(kinds, "tokens", sweep_tokens, "over the checkpoints of one run of training or RETRO-fitting")
    over.add_argument("folder", metavar="RUN", help="output folder of the run, trained with keep_checkpoints as needed")
    add_reading(over)
    for over in kinds.choices.values():
        add_files(over)


def sweep_neighbors(args: argparse.Namespace) -> int:
    """RETRO[ON] with k neighbors for each k; k may be larger than in training."""
    from retro.evaluation import sweep_neighbors

    check_outputs(args)
    model, retriever, baseline = _opened(args)
    result = sweep_neighbors(model, held_out(args), retriever, args.ks, baseline, _reading(args))
    return _show_sweep(args, result)


def sweep_datastore(args: argparse.Namespace) -> int:
    """RETRO[ON] with nested shares of the datastore, several draws of each: mean, least and greatest. Nothing is built
    again: the search leaves out the other documents."""
    from retro.evaluation import sweep_datastore
    from retro.loading import load_model
    from retro.retrieval import Store

    check_outputs(args)
    store = Store.open(args.store)
    model = load_model(args.model, store)
    baseline, documents = args.lm and load_model(args.lm, store), held_out(args)
    given = dict(num_neighbors=args.k, baseline=baseline, index=args.index, reading=_reading(args))
    result = sweep_datastore(model, documents, store, args.shares, args.draws, **given)
    return _show_sweep(args, result)


def sweep_models(args: argparse.Namespace) -> int:
    """Bits per byte of several models against their parameters: RETRO[OFF] and RETRO[ON], or a plain LM."""
    from retro.evaluation import sweep_models
    from retro.loading import load_model, open_retriever

    check_outputs(args)
    retriever = open_retriever(args.store, args.index)
    models = ((name, load_model(name, retriever.store)) for name in args.models)
    result = sweep_models(models, held_out(args), retriever, args.k, _reading(args))
    return _show_sweep(args, result)


def sweep_tokens(args: argparse.Namespace) -> int:
    """Bits per byte of each checkpoint of a run against the tokens it has seen."""
    from retro.evaluation import sweep_tokens
    from retro.evaluation.sweeps import checkpoints_of

    check_outputs(args)
    last = checkpoints_of(args.folder)[-1][1]
    _, retriever, baseline = _opened(args, last)
    result = sweep_tokens(args.folder, held_out(args), retriever, args.k, baseline, _reading(args))
    return _show_sweep(args, result)


def _reading(args: argparse.Namespace) -> Any:
    from retro.evaluation import ScoringSettings

    return ScoringSettings(args.window, args.stride, args.seed, args.cache or True, progress=True)


def _show_sweep(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from retro.evaluation.plots import plot_sweep
    from retro.evaluation.sweeps import sweep_rows, sweep_table

    print(sweep_table(result))
    write_measured(args, "sweep", result, sweep_rows(result), plot_sweep)
    return 0


# baselines


def add_baselines(verbs: Any) -> None:
    parser = verb(verbs, "baselines", baselines, "what else the same store is good for, over the same tokens")
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
    parser.add_argument("--index", default="auto", metavar="I", help=f"{KINDS}; {OWN_INDEX}")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.set_defaults(plot=None)


def baselines(args: argparse.Namespace) -> int:
    """Bits per byte and cost of a plain LM, RETRO with several kinds of neighbors, text in front of the text, REPLUG,
    RAG and kNN-LM, with the same store over identical target tokens."""
    from retro.evaluation.baselines import BaselineSettings, baselines_rows, baselines_table, measure_baselines
    from retro.loading import load, load_model
    from retro.text.corpus import read_documents

    check_outputs(args)
    chosen = ("prompt_neighbors", "retrieval_stride", "query_len", "stride", "knn_tokens", "seed")
    settings = BaselineSettings(
        methods=None if args.methods is None else tuple(args.methods),
        num_neighbors=args.k,
        windows_per_document=args.windows_per_document or None,
        window_len=args.window,
        **{name: getattr(args, name) for name in chosen},
    )
    model, _, retriever = load(args.model, args.store, index=args.index)
    reader = args.reader and load_model(args.reader, retriever.store)
    validation = None if args.validation is None else list(only_documents(read_documents(args.validation)))
    result = measure_baselines(model, held_out(args), retriever, reader, validation, settings, progress=True)
    print(baselines_table(result))
    write_measured(args, "baselines", result | {"validation": args.validation}, baselines_rows(result))
    return 0


# report


def add_report(verbs: Any) -> None:
    parser = verb(verbs, "report", report, "one page of everything that was measured, with its limits")
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
