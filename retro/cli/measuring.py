"""The verbs of measuring: evaluate, leakage, sweep, baselines, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

from cyclopts import Parameter

from retro.cli.options import options, taken
from retro.cli.shared import (
    Base,
    HeldOut,
    IndexKind,
    ModelFolder,
    OwnIndex,
    ReadStore,
    ResultFiles,
    StoreFolder,
    check_file,
    held_out,
    use_device,
)
from retro.common.devices import DeviceSettings
from retro.evaluation.settings import KS, SHARES, BaselineSettings, ScoringSettings


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(DeviceSettings, ResultFiles, ScoringSettings):
    """What is read.

    Arguments:
        documents: Read so many documents. Default: all.
        lm: Folder or Hugging Face name of a plain language model to score beside the model; its tokenizer is the
            store's. Default: none.
        num_neighbors: Neighbors of a chunk, k in the paper. Default: the model's.
    """

    store: ReadStore
    data: HeldOut
    documents: int | None = None
    lm: str | None = None
    num_neighbors: int | None = None
    index: OwnIndex = None
    base: Base = None

    def opened(self, model: Any) -> tuple[Any, Any, Any]:
        """The model, what retrieves for it, and the plain LM beside it or None."""
        from retro.loading import load, load_model

        self.use()
        opened, _, retriever = load(model, self.store, index=self.index or "auto", base=self.base)
        return opened, retriever, self.lm and load_model(self.lm, retriever.store)

    def held_out(self) -> list:
        """The documents."""
        return held_out(self.data, self.documents)

    def show_as(self, kind: str, result: dict[str, Any], draw: Any = None) -> None:
        """Print a result, and write the files that were asked for."""
        self.show({"kind": kind} | result | {"store": self.store, "data": self.data}, draw)

    def show_sweep(self, result: dict[str, Any]) -> None:
        """Print a sweep, and write it."""
        from retro.evaluation.plots import plot_sweep

        self.show_as("sweep", result, plot_sweep)


SweepOptions = options(ReadingSettings, without=["progress"])
NeighborsOptions = options(ReadingSettings, without=["progress", "num_neighbors"])
DatastoreOptions = options(ReadingSettings, without=["progress", "index", "store", "base"])
ModelsOptions = options(ReadingSettings, without=["progress", "index", "lm", "base"])
TokensOptions = options(ReadingSettings, without=["progress", "base"])
EvaluateOptions = options(ReadingSettings, without=["progress", "csv", "plot"])
BaselineOptions = options(BaselineSettings, DeviceSettings, ResultFiles, without=["plot"])


def evaluate(model: ModelFolder, /, **given: Unpack[EvaluateOptions]) -> None:
    """Measure bits per byte and perplexity of held-out documents, with retrieval and without.

    The columns are a plain language model, RETRO[OFF], RETRO[ON], and RETRO[ON] with random neighbors.
    """
    from retro.evaluation import bits_per_byte

    asked = ReadingSettings(**given, progress=True)
    opened, retriever, baseline = asked.opened(model)
    result = bits_per_byte(opened, asked.held_out(), retriever, asked.num_neighbors, baseline, asked)
    asked.show_as("evaluate", result)


def leakage(
    model: ModelFolder,
    /,
    *,
    exclude: Literal["same_document", "none"] = "same_document",
    **given: Unpack[SweepOptions],
) -> None:
    """Measure bits per byte against the overlap of a text with its neighbors, the paper's figure 6.

    bpb(alpha) is that of the chunks of which at most alpha is one run of tokens in common with any of their 10 nearest
    neighbors.

    Arguments:
        exclude: What is no neighbor of a chunk; with none, a document of the store that has the id of a held-out
            document counts as the leak that it is.
    """
    from retro.evaluation import measure_leakage
    from retro.evaluation.leakage import examples_page
    from retro.evaluation.plots import plot_leakage

    asked = ReadingSettings(**given, progress=True)
    opened, retriever, baseline = asked.opened(model)
    read = asked.num_neighbors, baseline, asked
    result = measure_leakage(opened, asked.held_out(), retriever, *read, exclude=exclude)
    asked.show_as("leakage", result, plot_leakage)
    print("", examples_page(result), sep="\n")


def sweep_neighbors(model: ModelFolder, /, *, ks: tuple[int, ...] = KS, **given: Unpack[NeighborsOptions]) -> None:
    """Sweep k, the neighbors of a chunk, which may be more than in training.

    Arguments:
        ks: Numbers of neighbors; 0 is RETRO[OFF].
    """
    from retro.evaluation import sweep_neighbors

    asked = ReadingSettings(**given, progress=True)
    opened, retriever, baseline = asked.opened(model)
    asked.show_sweep(sweep_neighbors(opened, asked.held_out(), retriever, ks, baseline, asked))


def sweep_datastore(
    model: ModelFolder,
    /,
    *,
    store: StoreFolder,
    shares: tuple[float, ...] = SHARES,
    draws: int = 3,
    index: str = "exact",
    **given: Unpack[DatastoreOptions],
) -> None:
    """Sweep nested shares of the datastore's documents: mean, least and greatest of several draws of each.

    Nothing is built again: the search leaves out the other documents.

    Arguments:
        shares: Shares of the documents, above 0 and at most 1.
        draws: Draws of each share; their seeds are the seed and those that follow it.
        index: The search within a share: exact, tfidf, bm25, tfidf:exact, bm25:exact, or several joined by +.
    """
    from retro.evaluation import sweep_datastore
    from retro.loading import load_model
    from retro.retrieval import Store

    asked = ReadingSettings(**given, store=store, progress=True)
    asked.use()
    whole = Store.open(store)
    opened, baseline = load_model(model, whole), asked.lm and load_model(asked.lm, whole)
    read = dict(num_neighbors=asked.num_neighbors, baseline=baseline, index=index, scoring=asked)
    asked.show_sweep(sweep_datastore(opened, asked.held_out(), whole, shares, draws, **read))


def sweep_models(models: list[str], /, *, index: IndexKind = "auto", **given: Unpack[ModelsOptions]) -> None:
    """Sweep models by their parameters: RETRO[OFF] and RETRO[ON], or a plain language model.

    Arguments:
        models: Folders of trained models, or names of plain language models.
    """
    from retro.evaluation import sweep_models
    from retro.loading import load_model, open_retriever

    asked = ReadingSettings(**given, progress=True)
    asked.use()
    retriever = open_retriever(asked.store, index)
    opened = ((name, load_model(name, retriever.store)) for name in models)
    asked.show_sweep(sweep_models(opened, asked.held_out(), retriever, asked.num_neighbors, asked))


def sweep_tokens(folder: str, /, **given: Unpack[TokensOptions]) -> None:
    """Sweep the checkpoints of one run of training or RETRO-fitting by the tokens that they have seen.

    Arguments:
        folder: Output folder of the run, trained with as many keep_checkpoints as are wanted.
    """
    from retro.evaluation import sweep_tokens
    from retro.evaluation.sweeps import checkpoints_of

    asked = ReadingSettings(**given, progress=True)
    asked.use()
    _, retriever, baseline = asked.opened(checkpoints_of(folder)[-1][1])
    asked.show_sweep(sweep_tokens(folder, asked.held_out(), retriever, asked.num_neighbors, baseline, asked))


def baselines(
    models: list[str],
    /,
    *,
    store: StoreFolder,
    data: HeldOut,
    validation: list[str] | None = None,
    documents: int | None = None,
    reader: Annotated[str | None, Parameter(alias="--lm")] = None,
    index: OwnIndex = None,
    **given: Unpack[BaselineOptions],
) -> None:
    """Compare models, and other uses of the same store, over the same tokens.

    Bits per byte, what is gained over the first row, and cost of a plain language model, of RETROs at several k with
    true and random neighbors, and of text in front of the text; on request also of other neighbors, REPLUG, RAG and
    kNN-LM.

    Arguments:
        models: Folders of trained models or of checkpoints, or plain language models.
        validation: Other held-out documents, on which kNN-LM and REPLUG choose. Default: none, and they do not run.
        documents: Read so many documents. Default: all.
        reader: Folder or Hugging Face name of the plain language model of the first row, which reads prompts and whose
            tokenizer is the store's. Default: the base of the RETRO-fitted models, else the first plain one.
    """
    from retro.evaluation.baselines import measure_baselines
    from retro.loading import load, load_model
    from retro.retrieval import Store

    use_device(given)
    files, settings = ResultFiles(**taken(given, ResultFiles)), BaselineSettings(**given)
    again = next((name for name in models if models.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"{again} is given twice; name every model once.")
    first, _, retriever = load(models[0], Store.open(store), index=index or "auto")
    opened = {models[0]: first} | {name: load_model(name, retriever.store) for name in models[1:]}
    plain, others = reader and load_model(reader, retriever.store), validation and held_out(validation)
    texts = held_out(data, documents)
    result = measure_baselines(opened, texts, retriever, plain, others, settings, progress=True)
    about = {"validation": validation, "store": store, "data": data}
    files.show({"kind": "baselines"} | result | about)


def report(runs: list[str], /, *, output: str) -> None:
    """Write one page of everything that was measured, with its caveats.

    It tells what was measured on what, with tables, plots, samples with their sources, and settings.

    Arguments:
        runs: Files that --json wrote, or folders: the results, trained models and stores in them and in their folders.
        output: The HTML page to write, which needs nothing else.
    """
    from retro.common.files import write_text
    from retro.evaluation.report import read_runs, report_page

    if Path(output).suffix not in (".html", ".htm"):
        raise ValueError(f"--output is {output}; let it end in .html.")
    check_file(output)
    read = read_runs(runs)
    write_text(output, report_page(read))
    print(f"{output}: {len(read.results)} results, {len(read.models)} trained models, {len(read.stores)} stores")
