"""`retro demo`: from the documentation of installed packages to a trained RETRO, measured and sampled from.

Writes into one folder:
    train.jsonl, valid.jsonl    documents: the documentation of one model family of transformers each; some held out
    tokenizer/                  SentencePiece, trained on train.jsonl
    store/                      datastore: MiniLM keys, ScaNN index, neighbors of every chunk
    lm/, retro/                 the same decoder trained on the same tokens, without and with retrieval
    results.json, loss.png, sample.txt, sample.json, sample.html
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retro.common.files import write_result, write_text, writing
from retro.common.settings import find_config, read_yaml
from retro.text.documents import Document
from retro.text.packages import package_documents

PACKAGE = "transformers"
CORPUS_BYTES = 5_000_000
SMALLEST, LARGEST = 2_000, 60_000  # bytes of a document that takes part
VOCAB_SIZE = 8192
RECIPE = "train_small"


def run_demo(output: Path, seed: int = 0) -> str:
    """Run every stage and give the closing page. Raises ValueError if `output` is in use."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is in use; remove it or give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    stage = _stages(seconds)
    with stage("reading documentation"):
        write_corpus(output)
    with stage("training the tokenizer"):
        _train_tokenizer(output)
    with stage("building the datastore"):
        store = _build_store(output)
    with stage("finding neighbors"):
        _find_neighbors(store)
    for name in ("lm", "retro"):
        with stage(f"training {name}"):
            _train(output, name, seed)
    with stage("measuring"):
        result = _measure(output, store, seed)
    with stage("sampling"):
        sample = _sample(output, store)
    result |= {"kind": "evaluate", "store": "store", "data": ["valid.jsonl"]}
    result |= {"seconds": round(sum(seconds.values()), 1), "seconds_of_stage": seconds}
    result["near_copies_removed"] = store.manifest["counts"]["filtered"]
    write_result(output / "results.json", result)
    plot_losses(output)
    return closing_page(output, result, sample)


def write_corpus(output: Path) -> None:
    """Write train.jsonl and valid.jsonl: the documentation of model families whose names begin alike, some held out.

    Clans (bert, bert_generation, ...) of at least two families come in the order of a hash of their name, until there
    is enough text; one family in ten is held out, by a hash of its own name. So a held-out family has relatives in the
    datastore, which it resembles in part, as pages of one reference manual do.
    """
    families = [d for d in package_documents([PACKAGE]) if d.id.startswith(f"{PACKAGE}.models.")]
    families = [d for d in families if SMALLEST <= len(d.text.encode()) <= LARGEST]
    clans: dict[str, list[Document]] = {}
    for document in families:
        clans.setdefault(re.match("[a-z]*", document.id.split(".")[-1])[0], []).append(document)
    chosen: list[Document] = []
    for clan in sorted(clans, key=_hash):
        if len(clans[clan]) >= 2 and sum(len(d.text) for d in chosen) < CORPUS_BYTES:
            chosen += clans[clan]
    _write_jsonl(output / "valid.jsonl", [d for d in chosen if _hash(d.id) % 10 == 0])
    _write_jsonl(output / "train.jsonl", [d for d in chosen if _hash(d.id) % 10])


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def _write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    with writing(path), path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def _train_tokenizer(output: Path) -> None:
    from retro.text.tokenizer import train_tokenizer

    train_tokenizer(output / "tokenizer", [str(output / "train.jsonl")], vocab_size=VOCAB_SIZE)


def _build_store(output: Path):
    from retro.retrieval import BuildSettings, build_store

    settings = BuildSettings(
        store=str(output / "store"),
        inputs=[str(output / "train.jsonl")],
        tokenizer=str(output / "tokenizer"),
        decontaminate=[str(output / "valid.jsonl")],
    )
    return build_store(settings, progress=True)


def _find_neighbors(store) -> None:
    from retro.retrieval import build_neighbors

    build_neighbors(store, k=read_yaml(find_config(RECIPE))["num_neighbors"], progress=True)


def _train(output: Path, name: str, seed: int) -> None:
    from retro.training.pretrain import main as pretrain

    given = [f"store={output / 'store'}", f"output={output / name}", f"seed={seed}"]
    if not pretrain(RECIPE, [*given, f"retrieval={str(name == 'retro').lower()}"]):
        raise KeyboardInterrupt  # what follows needs the trained model


def _measure(output: Path, store, seed: int) -> dict[str, Any]:
    from retro.evaluation import ScoringSettings, bits_per_byte
    from retro.loading import load, load_model
    from retro.text.corpus import read_documents

    model, _, retriever = load(output / "retro", store)
    documents = list(read_documents([str(output / "valid.jsonl")]))
    lm = load_model(output / "lm", store)
    return bits_per_byte(model, documents, retriever, baseline=lm, scoring=ScoringSettings(seed=seed, progress=True))


def _sample(output: Path, store) -> str:
    """Continue the opening of the first held-out document; the text and its sources."""
    from retro.loading import load
    from retro.sampling import as_json, html_page, sample, terminal_text
    from retro.text.corpus import read_documents

    model, tokenizer, retriever = load(output / "retro", store)
    document = next(iter(read_documents([str(output / "valid.jsonl")])))
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"][: model.config.chunk_len * 2]
    (text,) = sample(model, tokenizer, [tokenizer.decode(ids)], retriever, gains=True, max_new_tokens=128)
    told = terminal_text(text) + "\n"
    page = html_page([text], {"model": output / "retro", "store": output / "store"})
    for suffix, content in (("txt", told), ("html", page)):
        write_text(output / f"sample.{suffix}", content)
    write_result(output / "sample.json", as_json(text))
    return told


def plot_losses(output: Path) -> None:
    """Training loss of both runs over tokens -> loss.png."""
    from retro.evaluation.plots import LOOKS, picture

    with picture(output / "loss.png") as axes:
        dropped = read_yaml(find_config(RECIPE))["drop_neighbors"]
        reading = f"RETRO, {dropped:.0%} of chunks without neighbors"
        for name, column, label in (("lm", "lm", "LM, no retrieval"), ("retro", "retro_on", reading)):
            lines = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "loss" in line]
            x, y = [line["tokens"] / 1e6 for line in lines], [line["loss"] for line in lines]
            axes.plot(x, y, label=label, **LOOKS[column] | {"marker": ""})
        axes.set(xlabel="training tokens, millions", ylabel="training loss, nats per token")


def closing_page(output: Path, result: dict[str, Any], sample: str) -> str:
    """Numbers, a sample with its sources, and what was written where."""
    from retro.evaluation.tables import as_text, bits_tables

    written = {
        "results.json": "the numbers",
        "loss.png": "loss curves",
        "sample.html": "the sample above, its sources beside it",
        "store/": "datastore",
        "retro/": "the RETRO",
        "lm/": "the LM",
    }
    files = [f"  {output / name}  {what}" for name, what in written.items()]
    return "\n".join(
        [
            "",
            sample,
            as_text(bits_tables(result)[:2]),
            f"near-copies of held-out documents removed from the datastore: {result['near_copies_removed']}",
            f"took {result['seconds'] / 60:.1f} minutes; wrote",
            *files,
            "again with the same models:",
            f"  retro evaluate {output}/retro --store {output}/store --data {output}/valid.jsonl --lm {output}/lm",
            f'  retro generate {output}/retro "class" --store {output}/store',
        ]
    )


def _stages(seconds: dict[str, float]):
    """A context manager that names a stage and notes what it took."""

    @contextmanager
    def stage(name: str):
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    return stage
