"""The verb task: last words, summaries, questions, lm_eval, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack

from cyclopts import Parameter

from retro.cli.options import options
from retro.cli.shared import JsonFile, Outputs, OwnIndex, check_count, held_out
from retro.cli.training import run_recipe

AnyModel = Annotated[str, Parameter(help="A model of this library, or any Hugging Face causal language model.")]
Align = Annotated[
    Literal["start", "end"],
    Parameter(help="Whether a context starts at the start of a chunk, or ends at the end of one, filled up in front."),
]


@dataclass(kw_only=True)
class TaskSettings:
    """How the task is read.

    Arguments:
        store: Folder of the datastore to read from, or the address of a retrieval server. Default: none, which is
            RETRO[OFF] or a plain language model.
        index: The index to search.
        num_neighbors: Neighbors of a chunk, k in the paper. Default: the model's.
        cache: Folder where neighbors are kept. Default: neighbors/ in the store.
        decontaminate: Leave out what shares 13 words in a row with the right text.
        documents: Read so many documents, pairs or questions. Default: all.
        max_len: Tokens of an input. Default: the model's positions, at most 2048.
        batch_size: Texts that are read together.
        seed: Seed of everything that is drawn.
    """

    store: str | None = None
    index: OwnIndex = None
    num_neighbors: int | None = None
    cache: str | None = None
    decontaminate: bool = False
    documents: int | None = None
    max_len: int | None = None
    batch_size: int = 8
    seed: int = 0

    def reader(self, model: str, **more: Any) -> Any:
        """What reads the task."""
        from retro.evaluation.tasks import open_reader

        _refuse_without_store(self.store, index=self.index, k=self.num_neighbors, cache=self.cache)
        names = ("num_neighbors", "decontaminate", "max_len", "batch_size", "seed")
        given = {name: getattr(self, name) for name in names} | {"cache": self.cache or True, "progress": True}
        return open_reader(model, self.store, self.index or "auto", **given, **more)

    def first(self, records: list) -> list:
        """As many records as are read."""
        check_count(self.documents)
        return records[: self.documents]


TaskOptions = options(TaskSettings)
QuestionOptions = options(TaskSettings, without=["num_neighbors", "cache"])


def lambada(
    model: AnyModel,
    /,
    *,
    data: list[str],
    align: Align = "start",
    json: JsonFile = None,
    **settings: Unpack[TaskOptions],
) -> None:
    """Measure LAMBADA: the share of last words that greedy decoding writes, and their perplexity.

    The columns are RETRO[OFF], RETRO[ON] and RETRO[ON] with random neighbors, or a plain language model. Neighbors are
    those of whole chunks before the last word.

    Arguments:
        data: Documents, as for `retro build`.
    """
    from retro.evaluation.tasks import lambada_table, measure_lambada

    chosen = TaskSettings(**settings)
    documents = held_out(data, chosen.documents)
    result = measure_lambada(chosen.reader(model, align=align), documents)
    print(lambada_table(result))
    _write(json, result, chosen.store, data)


def summaries(model: AnyModel, /, *, data: list[str], json: JsonFile = None, **settings: Unpack[TaskOptions]) -> None:
    """Measure bits per byte of summaries after their articles and "TL;DR:".

    The columns are RETRO[OFF], RETRO[ON] and RETRO[ON] with random neighbors, or a plain language model.

    Arguments:
        data: Files of records {"article", "summary", "id"?}, as JSON Lines or a JSON array.
    """
    from retro.evaluation.tasks import measure_summaries, read_summaries, summaries_table

    chosen = TaskSettings(**settings)
    pairs = chosen.first([pair for file in data for pair in read_summaries(file)])
    result = measure_summaries(chosen.reader(model), pairs)
    print(summaries_table(result))
    _write(json, result, chosen.store, data)


def qa(
    model: AnyModel,
    /,
    *,
    data: list[str],
    passages: int = 20,
    search: bool = False,
    columns: list[str] | None = None,
    max_new_tokens: int = 32,
    json: JsonFile = None,
    **settings: Unpack[QuestionOptions],
) -> None:
    """Measure greedy answers to questions, by exact match and F1.

    Passages are read as neighbors (RETRO[ON]), as neighbors of other questions, in the prompt, and not at all. They are
    those of the file, or else what the store holds nearest to the question.

    Arguments:
        data: Files of records {"question", "answers", "ctxs"?} (FiD, DPR, NQ-open), as JSON Lines or a JSON array.
        passages: Passages of each question.
        search: Find the passages in the store even if the file has some.
        columns: Columns of the table, of retro_off, retro_on, retro_on_random, lm and in_context. Default: all that can
            run.
        max_new_tokens: Tokens of the longest answer.
    """
    from retro.evaluation.tasks import answers_table, find_passages, measure_answers, read_questions, without_overlap

    chosen = TaskSettings(**settings)
    questions = chosen.first([one for file in data for one in read_questions(file)])
    if search and not chosen.store:
        raise ValueError("--search is given without --store; name a datastore.")
    reader = chosen.reader(model)
    if reader.retriever is not None and (search or any(one.passages is None for one in questions)):
        questions = find_passages(questions, reader.retriever, passages, chosen.decontaminate, progress=True)
    elif chosen.decontaminate:
        questions = [without_overlap(one) for one in questions]
    result = measure_answers(reader, questions, passages, max_new_tokens, columns)
    print(answers_table(result))
    _write(json, result, chosen.store, data)


def recall(
    *,
    data: str,
    store: str | None = None,
    index: list[str] | None = None,
    ks: tuple[int, ...] = (1, 5, 20, 100),
    documents: int | None = None,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Measure for how many questions one of the first k passages is of the right document, or holds a right answer.

    Arguments:
        data: File of questions, as for `retro task qa`.
        store: Folder of the datastore to find passages in, or the address of a retrieval server. Default: the passages
            are those of the file.
        index: One or several indexes to search, as for `retro search`. Default: auto.
        ks: Numbers of passages.
        documents: Read so many questions. Default: all.
        seed: Seed of the intervals.
    """
    from retro.evaluation.tasks import find_passages, read_questions, recall, recall_table
    from retro.loading import open_retriever
    from retro.provenance import versions

    _refuse_without_store(store, index=index)
    chosen, results = TaskSettings(documents=documents), {}
    questions = chosen.first(read_questions(data))
    for kind in index or ["auto"] if store else []:
        found = find_passages(questions, open_retriever(store, kind), max(ks), progress=True)
        results[kind] = recall(found, ks, seed)
    results = results or {"the file's": recall(questions, ks, seed)}
    print(recall_table(results))
    _write(json, {"task": "recall", "seed": seed, "recall": results, "versions": versions()}, store, data)


@dataclass(kw_only=True)
class LmEvalSettings:
    """How lm_eval's tasks are read.

    Arguments:
        store: Folder of the datastore to read from, or the address of a retrieval server. Default: none, which is
            RETRO[OFF] or a plain language model.
        index: The index to search.
        num_neighbors: Neighbors of a chunk, or passages in the prompt. Default: the model's, or 3 passages.
        reading: Whether passages are neighbors, or stand in the prompt of any causal language model.
        retrieval: Whether to retrieve, or to read random chunks. Default: on with a store.
        align: How a context is placed in chunks.
        max_length: Tokens of an input. Default: the model's positions.
        batch_size: Texts that are read together.
        seed: Seed of random neighbors and of few-shot examples.
    """

    store: str | None = None
    index: OwnIndex = None
    num_neighbors: int | None = None
    reading: Literal["neighbors", "prompt"] = "neighbors"
    retrieval: Literal["on", "off", "random"] | None = None
    align: Align = "start"
    max_length: Annotated[int | None, Parameter(name="--max-len")] = None
    batch_size: int = 8
    seed: int = 0


def lm_eval(
    model: AnyModel,
    /,
    *,
    tasks: list[str],
    include: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    cache: str | None = None,
    json: JsonFile = None,
    **settings: Unpack[options(LmEvalSettings)],
) -> None:
    """Run tasks of lm_eval on a model with a datastore; it needs pip install "retro-lm[eval]".

    lm_eval's own command knows the model as "retro": python -m retro.evaluation.harness --model retro --model_args
    pretrained=MODEL,store=STORE --tasks TASK

    Arguments:
        tasks: Names of lm_eval's tasks, or of your own.
        include: Folder with the YAML files of your own tasks.
        fewshot: Examples in the prompt. Default: the task's.
        limit: Read so many documents of each task. Default: all.
        cache: Folder where responses are kept, a file for each model and store. Default: none.
    """
    try:
        from retro.evaluation.harness import RetroLM, results_table, run_tasks
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; pip install "retro-lm[eval]".') from None
    chosen = LmEvalSettings(**settings)
    _refuse_without_store(chosen.store, index=chosen.index, k=chosen.num_neighbors)
    given = {name: value for name, value in vars(chosen).items() if value is not None}
    results = run_tasks(RetroLM(model, **given), tasks, include, cache, fewshot, limit, chosen.seed)
    print(results_table(results))
    _write(json, results, chosen.store, None, "lm_eval")


def finetune(config: str, /, *settings: str) -> int:
    """Train a model to answer questions from passages; the loss is on answers only.

    The same command goes on from the last checkpoint in `output`.

    Arguments:
        config: A YAML file, or the name of a packaged configuration such as finetune_qa; see `retro configs`.
        settings: Settings as key=value, such as start=runs/fitted store=stores/docs questions=train.json
            output=runs/qa; they go before those of the file. All of them are listed below.
    """
    from retro.training.finetune import main

    return run_recipe(main, config, settings)


def _refuse_without_store(store: str | None, **given: Any) -> None:
    for name, value in given.items():
        if not store and value is not None:
            raise ValueError(f"--{name} means nothing without --store; name a datastore.")


def _write(json: str | None, result: dict[str, Any], store: str | None, data: Any, kind: str = "task") -> None:
    Outputs(json).write({"kind": kind} | result | {"store": store, "data": data})
