"""The verb task: last words, summaries, questions, lm_eval, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Unpack

from cyclopts import Parameter

from retro.cli.options import options
from retro.cli.shared import Base, JsonFile, OwnIndex, ReadStore, ResultFiles, RunFile, first, held_out
from retro.cli.training import Config, KeyValue, run_recipe
from retro.common.devices import DeviceSettings
from retro.common.extras import check_installed
from retro.evaluation.settings import ReaderSettings

AnyModel = Annotated[str, Parameter(help="A model of this library, or any Hugging Face causal language model.")]


@dataclass(frozen=True, kw_only=True)
class TaskSettings(DeviceSettings, ResultFiles, ReaderSettings):
    """What the task reads from.

    Arguments:
        store: Folder of the datastore to read from, or address of a retrieval server. Default: none, which is
            RETRO[OFF] or a plain language model.
        documents: Read so many documents, pairs or questions. Default: all.
    """

    store: str | None = None
    index: OwnIndex = None
    base: Base = None
    documents: int | None = None

    def reader(self, model: str) -> Any:
        """What reads the task."""
        from retro.evaluation.tasks import open_reader

        cache = None if self.cache is True else self.cache
        self.refuse_without_store(index=self.index, k=self.num_neighbors, cache=cache)
        given = {field.name: getattr(self, field.name) for field in fields(ReaderSettings)}
        return open_reader(model, self.store, self.index or "auto", base=self.base, progress=True, **given)

    def refuse_without_store(self, **given: Any) -> None:
        """ValueError for what was given and means nothing without a store."""
        for name, value in given.items():
            if not self.store and value is not None:
                raise ValueError(f"--{name} means nothing without --store; name a datastore.")

    def show_as(self, kind: str, result: dict[str, Any], data: Any) -> None:
        """Print a result, and write the file that was asked for."""
        self.show({"kind": kind} | result | {"store": self.store, "data": data})


_TABLES = ["csv", "plot"]
LambadaOptions = options(TaskSettings, without=_TABLES)
SummariesOptions = options(TaskSettings, without=[*_TABLES, "align"])
QuestionOptions = options(TaskSettings, without=[*_TABLES, "align", "num_neighbors", "cache"])
LmEvalOptions = options(TaskSettings, without=[*_TABLES, "num_neighbors", "cache", "documents", "decontaminate"])


def lambada(model: AnyModel, /, *, data: list[str], **settings: Unpack[LambadaOptions]) -> None:
    """Measure LAMBADA: the share of last words that greedy decoding writes, and their perplexity.

    The columns are RETRO[OFF], RETRO[ON] and RETRO[ON] with random neighbors, or a plain language model. Neighbors are
    those of whole chunks before the last word.

    Arguments:
        data: Documents, as for `retro build`.
    """
    from retro.evaluation.tasks import measure_lambada

    asked = TaskSettings(**settings)
    asked.use()
    documents = held_out(data, asked.documents)
    result = measure_lambada(asked.reader(model), documents)
    asked.show_as("task", result, data)


def summaries(model: AnyModel, /, *, data: list[str], **settings: Unpack[SummariesOptions]) -> None:
    """Measure bits per byte of summaries after their articles and "TL;DR:".

    The columns are RETRO[OFF], RETRO[ON] and RETRO[ON] with random neighbors, or a plain language model.

    Arguments:
        data: Files of records {"article", "summary", "id"?}, as JSON Lines or a JSON array.
    """
    from retro.evaluation.tasks import measure_summaries, read_summaries

    asked = TaskSettings(**settings)
    asked.use()
    pairs = first([pair for file in data for pair in read_summaries(file)], asked.documents)
    result = measure_summaries(asked.reader(model), pairs)
    asked.show_as("task", result, data)


def qa(
    model: AnyModel,
    /,
    *,
    data: list[str],
    passages: int = 20,
    search: bool = False,
    columns: list[str] | None = None,
    max_new_tokens: int = 32,
    **settings: Unpack[QuestionOptions],
) -> None:
    """Measure greedy answers to questions: exact match, F1, and whether they hold a right answer.

    Passages are read as neighbors (RETRO[ON]), in the prompt, as both, and not at all; as a control the neighbors are
    those of another question. They are those of the file, or else what the store holds nearest to the question. A
    tokenizer with a chat template is asked in a chat.

    Arguments:
        data: Files of records {"question", "answers", "ctxs"?, "passage_id"?} (FiD, DPR, NQ-open), as JSON Lines or a
            JSON array. Where "passage_id" names the right passage, intervals are over passages.
        passages: Passages of each question, and neighbors: where there are fewer passages, long ones take several.
        search: Find the passages in the store even if the file has some.
        columns: Columns of the table, of retro_off, retro_on, retro_on_random, lm, in_context, in_context_on and
            in_context_on_random. Default: all that can run.
        max_new_tokens: Tokens of the longest answer.
    """
    from retro.evaluation.tasks import find_passages, measure_answers, read_questions, without_overlap

    asked = TaskSettings(**settings)
    asked.use()
    questions = first([one for file in data for one in read_questions(file)], asked.documents)
    asked.refuse_without_store(search=search or None)
    reader = asked.reader(model)
    if reader.retriever is not None and (search or any(one.passages is None for one in questions)):
        questions = find_passages(questions, reader.retriever, passages, asked.decontaminate, progress=True)
    elif asked.decontaminate:
        questions = [without_overlap(one) for one in questions]
    result = measure_answers(reader, questions, passages, max_new_tokens, columns)
    asked.show_as("task", result, data)


def recall(
    *,
    data: str,
    store: ReadStore | None = None,
    index: list[str] | None = None,
    ks: tuple[int, ...] = (1, 5, 20, 100),
    qrels: str | None = None,
    documents: int | None = None,
    seed: int = 0,
    run: RunFile = None,
    json: JsonFile = None,
    **given: Unpack[options(DeviceSettings)],
) -> None:
    """Measure for how many questions one of the first k passages is of the right document, or holds a right answer.

    Arguments:
        data: File of questions, as for `retro task qa`, or with --qrels of queries, as for `retro search`.
        qrels: File that says which documents are right, in TREC's or BEIR's form; nDCG@10, RR@10 and recall are
            measured over documents.
        store: Folder of the datastore to find passages in, or address of a retrieval server. Default: the passages are
            those of the file.
        index: One or several indexes to search, as for `retro search`. Default: auto.
        ks: Numbers of passages.
        documents: Read so many questions. Default: all.
        seed: Seed of the intervals.
    """
    from retro.evaluation.tasks import find_passages, read_questions, recall
    from retro.evaluation.tasks.passages import Question, rankings
    from retro.evaluation.tasks.runs import ranking_measures, read_qrels, read_queries, write_run
    from retro.loading import open_retriever
    from retro.provenance import versions

    asked, results, ranked = TaskSettings(store=store, json=json, **given), {}, {}
    asked.use()
    asked.refuse_without_store(index=index, qrels=qrels)
    kinds = index or ["auto"]
    if run and len(kinds) > 1:
        raise ValueError(f"--run is one file, and --index names {len(kinds)} searches; name one.")
    judged = read_qrels(qrels) if qrels else {}
    if qrels:
        check_installed("ir_measures", "--qrels")
        questions = [Question(name, text, ()) for name, text in read_queries(data) if name in judged]
        if not questions:
            raise ValueError(f"no query of {data} is judged in {qrels}; give the files of one collection.")
    else:
        questions = read_questions(data)
    questions = first(questions, documents)
    for kind in kinds if store else []:
        found = find_passages(questions, open_retriever(store, kind), max(ks), progress=True)
        ranked = rankings(found)
        if qrels:
            own = {one.id: judged[one.id] for one in questions}
            by_document = ranking_measures(own, ranked, ks, seed)
            results[kind] = {"questions": len(found), "by_id": None, "by_answer": None, "by_document": by_document}
        else:
            results[kind] = recall(found, ks, seed)
    results = results or {"the file's": recall(questions, ks, seed)}
    if run:
        write_run(run, ranked or rankings(questions), kinds[0])
    asked.show_as("task", {"task": "recall", "seed": seed, "recall": results, "versions": versions()}, data)


def lm_eval(
    model: AnyModel,
    /,
    *,
    tasks: list[str],
    include: str | None = None,
    k: int | None = None,
    reading: Literal["neighbors", "prompt"] = "neighbors",
    retrieval: Literal["on", "off", "random"] | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    cache: str | None = None,
    **settings: Unpack[LmEvalOptions],
) -> None:
    """Run tasks of lm_eval on a model with a datastore; it needs pip install "retro-lm[eval]".

    lm_eval's own command knows the model as "retro": python -m retro.evaluation.harness --model retro --model_args
    pretrained=MODEL,store=STORE --tasks TASK

    Arguments:
        tasks: Names of lm_eval's tasks, or of your own.
        include: Folder with the YAML files of your own tasks.
        k: Neighbors of a chunk, or passages in the prompt. Default: the model's, or 3 passages.
        reading: Whether passages are neighbors, or stand in the prompt of any causal language model.
        retrieval: Whether to retrieve, or to read random chunks. Default: on with a store.
        fewshot: Examples in the prompt. Default: the task's.
        limit: Read so many documents of each task. Default: all.
        cache: Folder where responses are kept, a file for each model and store. Default: none.
    """
    check_installed("lm_eval", "retro task lm-eval")
    from retro.evaluation.harness import RetroLM, run_tasks

    asked = TaskSettings(**settings)
    asked.use()
    asked.refuse_without_store(index=asked.index, k=k)
    given = dict(align=asked.align, batch_size=asked.batch_size, seed=asked.seed, max_length=asked.max_len)
    read = dict(num_neighbors=k, reading=reading, retrieval=retrieval, **given)
    lm = RetroLM(model, asked.store, asked.index or "auto", base=asked.base, **read)
    results = run_tasks(lm, tasks, include, cache, fewshot, limit, asked.seed)
    asked.show_as("lm_eval", results, None)


def finetune(config: Config, /, *settings: KeyValue) -> int:
    """Train a model to answer questions from passages; the loss is on answers only.

    A plain language model is fitted for neighbors; its own weights stay as they are, as those of a fitted base do. An
    example is `retro task finetune finetune_qa start=runs/fitted store=stores/docs questions=q.json output=runs/qa`.
    The same command goes on from the last checkpoint in `output`.
    """
    from retro.training.finetune import main

    return run_recipe(main, config, settings)
