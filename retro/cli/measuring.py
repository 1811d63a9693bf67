"""The verbs of measuring: evaluate, leakage, sweep, baselines, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

from cyclopts import Parameter

from retro.cli.options import options, taken
from retro.cli.shared import (
    CsvFile,
    DocumentCount,
    IndexKind,
    JsonFile,
    ModelFolder,
    Outputs,
    OwnIndex,
    PlotFile,
    held_out,
)
from retro.evaluation.settings import KS, SHARES, BaselineSettings, ScoringSettings


@dataclass(kw_only=True)
class ReadingSettings:
    """What is read.

    Arguments:
        store: Folder of the datastore to read from, or the address of a retrieval server.
        data: Held-out documents, as for `retro build`.
        documents: Read so many documents. Default: all.
        lm: Folder or Hugging Face name of a plain language model to score beside the model; its tokenizer is the
            store's. Default: none.
        num_neighbors: Neighbors of a chunk, k in the paper. Default: the model's.
    """

    store: str
    data: list[str]
    documents: int | None = None
    lm: str | None = None
    num_neighbors: int | None = None
    index: OwnIndex = None

    def named(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"store": self.store, "data": self.data}

    def opened(self, model: Any) -> tuple[Any, Any, Any]:
        """The model, what retrieves for it, and the plain LM beside it or None."""
        from retro.loading import load, load_model

        opened, _, retriever = load(model, self.store, index=self.index or "auto")
        return opened, retriever, self.lm and load_model(self.lm, retriever.store)

    def held_out(self) -> list:
        return held_out(self.data, self.documents)


ReadingOptions = options(ReadingSettings, ScoringSettings, without=["progress"])
SweptNeighborsOptions = options(ReadingSettings, ScoringSettings, without=["progress", "num_neighbors"])
SweptDatastoreOptions = options(ReadingSettings, ScoringSettings, without=["progress", "index"])
SweptModelsOptions = options(ReadingSettings, ScoringSettings, without=["progress", "index", "lm"])
BaselineOptions = options(BaselineSettings)


def evaluate(model: ModelFolder, /, *, json: JsonFile = None, **given: Unpack[ReadingOptions]) -> None:
    """Measure bits per byte and perplexity of held-out documents, with retrieval and without.

    The columns are a plain language model, RETRO[OFF], RETRO[ON], and RETRO[ON] with random neighbors.
    """
    from retro.evaluation import bits_per_byte, bits_table, perplexity_table

    (reading, scoring), outputs = _split(given), Outputs(json)
    opened, retriever, baseline = reading.opened(model)
    documents, k = reading.held_out(), reading.num_neighbors
    result = bits_per_byte(opened, documents, retriever, k, baseline, **scoring)
    print(bits_table(result), perplexity_table(result), sep="\n\n")
    outputs.write({"kind": "evaluate"} | result | reading.named())


def leakage(
    model: ModelFolder,
    /,
    *,
    exclude: Literal["same_document", "none"] = "same_document",
    json: JsonFile = None,
    csv: CsvFile = None,
    plot: PlotFile = None,
    **given: Unpack[ReadingOptions],
) -> None:
    """Measure bits per byte against the overlap of a text with its neighbors, the paper's figure 6.

    bpb(alpha) is that of the chunks of which at most alpha is one run of tokens in common with any of their 10 nearest
    neighbors.

    Arguments:
        exclude: What is no neighbor of a chunk; with none, a document of the store that has the id of a held-out
            document counts as the leak that it is.
    """
    from retro.evaluation import measure_leakage
    from retro.evaluation.leakage import examples_page, leakage_rows, leakage_table
    from retro.evaluation.plots import plot_leakage

    (reading, scoring), outputs = _split(given), Outputs(json, csv, plot)
    opened, retriever, baseline = reading.opened(model)
    documents, k = reading.held_out(), reading.num_neighbors
    result = measure_leakage(opened, documents, retriever, k, baseline, exclude=exclude, **scoring)
    print(leakage_table(result), examples_page(result), sep="\n\n")
    outputs.write({"kind": "leakage"} | result | reading.named(), leakage_rows(result), plot_leakage)


def sweep_neighbors(
    model: ModelFolder,
    /,
    *,
    ks: tuple[int, ...] = KS,
    json: JsonFile = None,
    csv: CsvFile = None,
    plot: PlotFile = None,
    **given: Unpack[SweptNeighborsOptions],
) -> None:
    """Sweep k, the neighbors of a chunk, which may be more than in training.

    Arguments:
        ks: Numbers of neighbors; 0 is RETRO[OFF].
    """
    from retro.evaluation import sweep_neighbors

    (reading, scoring), outputs = _split(given), Outputs(json, csv, plot)
    opened, retriever, baseline = reading.opened(model)
    result = sweep_neighbors(opened, reading.held_out(), retriever, ks, baseline, ScoringSettings(**scoring))
    _show_sweep(result, reading, outputs)


def sweep_datastore(
    model: ModelFolder,
    /,
    *,
    shares: tuple[float, ...] = SHARES,
    draws: int = 3,
    index: IndexKind = "exact",
    json: JsonFile = None,
    csv: CsvFile = None,
    plot: PlotFile = None,
    **given: Unpack[SweptDatastoreOptions],
) -> None:
    """Sweep nested shares of the datastore's documents: mean, least and greatest of several draws of each.

    Nothing is built again: the search leaves out the other documents.

    Arguments:
        shares: Shares of the documents, above 0 and at most 1.
        draws: Draws of each share; their seeds are the seed and those that follow it.
    """
    from retro.evaluation import sweep_datastore
    from retro.loading import load_model
    from retro.retrieval import Store

    (reading, scoring), outputs = _split(given), Outputs(json, csv, plot)
    store = Store.open(reading.store)
    opened, baseline = load_model(model, store), reading.lm and load_model(reading.lm, store)
    read = dict(num_neighbors=reading.num_neighbors, baseline=baseline, index=index)
    documents, scoring = reading.held_out(), ScoringSettings(**scoring)
    result = sweep_datastore(opened, documents, store, shares, draws, scoring=scoring, **read)
    _show_sweep(result, reading, outputs)


def sweep_models(
    models: list[str],
    /,
    *,
    index: IndexKind = "auto",
    json: JsonFile = None,
    csv: CsvFile = None,
    plot: PlotFile = None,
    **given: Unpack[SweptModelsOptions],
) -> None:
    """Sweep models by their parameters: RETRO[OFF] and RETRO[ON], or a plain language model.

    Arguments:
        models: Folders of trained models, or names of plain language models.
    """
    from retro.evaluation import sweep_models
    from retro.loading import load_model, open_retriever

    (reading, scoring), outputs = _split(given), Outputs(json, csv, plot)
    retriever = open_retriever(reading.store, index)
    opened = ((name, load_model(name, retriever.store)) for name in models)
    documents, k = reading.held_out(), reading.num_neighbors
    _show_sweep(sweep_models(opened, documents, retriever, k, ScoringSettings(**scoring)), reading, outputs)


def sweep_tokens(
    folder: str,
    /,
    *,
    json: JsonFile = None,
    csv: CsvFile = None,
    plot: PlotFile = None,
    **given: Unpack[ReadingOptions],
) -> None:
    """Sweep the checkpoints of one run of training or RETRO-fitting by the tokens that they have seen.

    Arguments:
        folder: Output folder of the run, trained with as many keep_checkpoints as are wanted.
    """
    from retro.evaluation import sweep_tokens
    from retro.evaluation.sweeps import checkpoints_of

    (reading, scoring), outputs = _split(given), Outputs(json, csv, plot)
    _, retriever, baseline = reading.opened(checkpoints_of(folder)[-1][1])
    documents, k = reading.held_out(), reading.num_neighbors
    _show_sweep(sweep_tokens(folder, documents, retriever, k, baseline, ScoringSettings(**scoring)), reading, outputs)


def _split(given: dict[str, Any]) -> tuple[ReadingSettings, dict[str, Any]]:
    """What is read, and how it is scored."""
    reading = ReadingSettings(**taken(given, ReadingSettings))
    return reading, given | {"progress": True}


def _show_sweep(result: dict[str, Any], reading: ReadingSettings, outputs: Outputs) -> None:
    from retro.evaluation.plots import plot_sweep
    from retro.evaluation.sweeps import sweep_rows, sweep_table

    print(sweep_table(result))
    outputs.write({"kind": "sweep"} | result | reading.named(), sweep_rows(result), plot_sweep)


def baselines(
    model: Annotated[str, Parameter(help="Folder of a trained model, or a plain language model.")],
    /,
    *,
    store: str,
    data: list[str],
    validation: list[str] | None = None,
    documents: DocumentCount = None,
    reader: Annotated[str | None, Parameter(alias="--lm")] = None,
    index: OwnIndex = None,
    json: JsonFile = None,
    csv: CsvFile = None,
    **settings: Unpack[BaselineOptions],
) -> None:
    """Measure what else the same store is good for, over the same tokens.

    Bits per byte and cost of a plain language model, RETRO with several kinds of neighbors, text in front of the text,
    REPLUG, RAG and kNN-LM.

    Arguments:
        store: Folder of the datastore to read from, or the address of a retrieval server.
        data: Held-out documents, as for `retro build`.
        validation: Other held-out documents, on which kNN-LM and REPLUG choose.
        reader: Folder or Hugging Face name of the plain language model of the first row, which reads prompts and whose
            tokenizer is the store's. Default: the base of a RETRO-fitted model.
    """
    from retro.evaluation.baselines import baselines_rows, baselines_table, measure_baselines
    from retro.loading import load, load_model

    outputs, chosen = Outputs(json, csv), BaselineSettings(**settings)
    opened, _, retriever = load(model, store, index=index or "auto")
    plain = reader and load_model(reader, retriever.store)
    others = None if validation is None else held_out(validation)
    texts = held_out(data, documents)
    result = measure_baselines(opened, texts, retriever, plain, others, chosen, progress=True)
    print(baselines_table(result))
    about = {"validation": validation, "store": store, "data": data}
    outputs.write({"kind": "baselines"} | result | about, baselines_rows(result))


def report(runs: list[str], /, *, output: str) -> None:
    """Write one page of everything that was measured, with its caveats.

    It tells what was measured on what, with tables, plots, samples with their sources, and settings.

    Arguments:
        runs: Files that --json wrote, or folders: the results, trained models and stores in them and in their folders.
        output: The HTML page to write, which needs nothing else.
    """
    from retro.evaluation.report import read_runs, report_page

    page = Path(output)
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"--output is {page}; let it end in .html.")
    if not page.parent.is_dir():
        raise ValueError(f"the folder of {page} is not there; make it first.")
    read = read_runs(runs)
    page.write_text(report_page(read), encoding="utf-8")
    print(f"{page}: {len(read.results)} results, {len(read.models)} trained models, {len(read.stores)} stores")
