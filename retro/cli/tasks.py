"""The verb task: accuracy, summaries, questions, lm-eval, fine-tuning."""

from __future__ import annotations

import argparse
from typing import Any

from retro.cli.shared import KINDS, OWN_INDEX, add_json, add_recipe, held_out, run_recipe, verb, write_measured

# task


def add_task(verbs: Any) -> None:
    about = "tasks with right answers: last words, summaries, questions, and those of lm_eval"
    kinds = verbs.add_parser("task", help=about, description=about).add_subparsers(metavar="WHAT", required=True)
    over = verb(kinds, "lambada", task_lambada, "the last word of each document")
    _add_task(over, "documents, as for retro build")
    over.add_argument("--align", default="start", choices=["start", "end"], help=_ALIGN)
    over = verb(kinds, "summaries", task_summaries, "bits per byte of summaries after their articles")
    _add_task(over, '{"article", "summary", "id"?} a record, JSON Lines or a JSON array')
    over = verb(kinds, "qa", task_qa, "answers to questions with passages: exact match and F1")
    _add_task(over, '{"question", "answers", "ctxs"?} a record (FiD, DPR, NQ-open), JSON Lines or an array', k=False)
    over.add_argument("--passages", type=int, default=20, metavar="N", help="of each question; default 20")
    over.add_argument("--search", action="store_true", help="find the passages in --store even if the file has some")
    over.add_argument(
        "--columns", nargs="+", metavar="C", help="of retro_off, retro_on, retro_on_random, lm, in_context"
    )
    over.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of an answer; default 32")
    over = verb(kinds, "recall", task_recall, "recall@k of the right passage")
    over.add_argument("--data", required=True, metavar="FILE", help="questions, as for retro task qa")
    over.add_argument("--store", help="datastore to find passages in; default: the passages of the file")
    over.add_argument("--index", nargs="+", metavar="I", help=f"one or more of {KINDS}; default: auto")
    over.add_argument("--ks", type=int, nargs="+", default=[1, 5, 20, 100], metavar="K", help="default: 1 5 20 100")
    over.add_argument("--documents", type=int, metavar="N", help="read so many questions; default: all")
    over.add_argument("--seed", type=int, default=0, help="of the intervals")
    add_json(over)
    _add_lm_eval(verb(kinds, "lm-eval", task_lm_eval, "lm_eval's tasks; pip install retro-lm[eval]"))
    over = verb(kinds, "finetune", task_finetune, "train a model to answer questions from passages")
    add_recipe(over, "finetune_qa", "start=runs/fitted store=stores/docs questions=train.json output=runs/qa")


_ALIGN = "of a chunk that the context stands at (see retro.evaluation.tasks.reading); default: start"


def _add_task(parser: argparse.ArgumentParser, data: str, k: bool = True) -> None:
    """Options of our own tasks."""
    parser.add_argument("model", metavar="MODEL", help="a model of this library, or any Hugging Face causal LM")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help=data)
    parser.add_argument("--documents", type=int, metavar="N", help="read so many; default: all")
    parser.add_argument("--store", help="datastore to read from; default: none, RETRO[OFF] or a plain LM")
    parser.add_argument("--index", metavar="I", help=f"{KINDS}; {OWN_INDEX}")
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
    add_json(parser)


def _add_lm_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model of this library, or any Hugging Face causal LM")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names of lm_eval's tasks, or of yours"
    )
    parser.add_argument("--include", metavar="DIR", help="folder with the YAML files of your tasks")
    parser.add_argument("--store", help="datastore to read from; default: none, RETRO[OFF] or a plain LM")
    parser.add_argument("--index", metavar="I", help=f"{KINDS}; {OWN_INDEX}")
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
    add_json(parser)


def task_lambada(args: argparse.Namespace) -> int:
    """LAMBADA: the share of last words that greedy decoding writes, and their perplexity; RETRO[OFF], [ON], [ON] with
    random neighbors, or a plain LM. Neighbors are those of whole chunks before the last word."""
    from retro.evaluation.tasks import lambada_table, measure_lambada

    documents = held_out(args)
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
    from retro.loading import open_retriever
    from retro.provenance import versions

    if args.index and not args.store:
        raise ValueError("--index means nothing without --store; name a datastore.")
    questions, results = _first(args, read_questions(args.data)), {}
    for kind in args.index or ["auto"] if args.store else []:
        found = find_passages(questions, open_retriever(args.store, kind), max(args.ks), progress=True)
        results[kind] = recall(found, args.ks, args.seed)
    results = results or {"the file's": recall(questions, args.ks, args.seed)}
    print(recall_table(results))
    return _write_task(args, {"task": "recall", "seed": args.seed, "recall": results, "versions": versions()})


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
    return _write_task(args, results, "lm_eval")


def task_finetune(args: argparse.Namespace) -> int:
    """Train on answers only, as CONFIG and key=value say. The same command goes on from the last checkpoint."""
    from retro.training.finetune import main

    return run_recipe(main, args)


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


def _write_task(args: argparse.Namespace, result: dict[str, Any], kind: str = "task") -> int:
    write_measured(args, kind, result)
    return 0
