"""The files of a report: results as --json writes them, folders of trained models, stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from retro.evaluation.report.shapes import METRICS, RESULTS, VERBS, checked, is_text
from retro.evaluation.tables import kind_of
from retro.provenance import FILE, read_provenance
from retro.retrieval import Store
from retro.retrieval.search.index import measured_recall

_OF_MODELS = {"config.json", "generation_config.json", FILE} | {
    f"{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "vocab", "added_tokens")
}


@dataclass(frozen=True)
class Result:
    """What one file holds. kind: see `retro.evaluation.report.shapes.VERBS`; same: files of the same content."""

    name: str
    kind: str
    value: dict[str, Any]
    sha256: str
    written_at: str
    same: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainedModel:
    """The folder of a run: Hugging Face's configuration and what it was trained with, as far as they are there."""

    name: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    settings: str
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class StoreRecord:
    """A store: its fingerprint, counts and embedder, and the measured recall of its indexes by their kind."""

    name: str
    fingerprint: str
    counts: dict[str, int]
    embedder: str
    inputs: list[str]
    recall: dict[str, dict[str, Any]]


@dataclass
class ReportInputs:
    """Everything that was found. passed_over: JSON files of folders that hold no result."""

    results: list[Result] = field(default_factory=list)
    models: list[TrainedModel] = field(default_factory=list)
    stores: list[StoreRecord] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def read_runs(paths: Sequence[str | Path]) -> ReportInputs:
    """Read result files, and folders: the results, trained models and stores in them and in the folders they hold.

    Raises ValueError, naming the file, for one that is damaged, for a file without a result, and for a folder that
    holds nothing to report.
    """
    runs, seen = ReportInputs(), set()
    for path in map(Path, paths):
        if path.is_dir():
            before = len(runs.results) + len(runs.models) + len(runs.stores) + len(seen)
            for folder in [path, *sorted(one for one in path.iterdir() if one.is_dir() and one.name[0] != ".")]:
                _read_folder(folder, runs, seen)
            if before == len(runs.results) + len(runs.models) + len(runs.stores) + len(seen):
                raise ValueError(f"{path} holds no result, trained model or store; give a folder that does.")
        elif not path.exists():
            raise ValueError(f"{path} is not there; give a file that --json wrote, or a folder.")
        elif not _read_file(path, runs, seen):
            raise ValueError(f"{path} holds no result; give what --json of retro {', '.join(VERBS.values())} wrote.")
    return runs


def _read_folder(folder: Path, runs: ReportInputs, seen: set[Path]) -> None:
    if folder.resolve() in seen:
        return
    if (folder / "manifest.json").is_file():
        seen.add(folder.resolve())
        runs.stores.append(_read_store(folder))
        return
    if (folder / "config.json").is_file() or (folder / "metrics.jsonl").is_file():
        seen.add(folder.resolve())
        runs.models.append(_read_model(folder))
    for file in sorted(folder.glob("*.json")):
        if file.name not in _OF_MODELS and not _read_file(file, runs, seen):
            runs.passed_over.append(str(file))


def _read_file(file: Path, runs: ReportInputs, seen: set[Path]) -> bool:
    """Whether a file holds a result, which is then among the runs."""
    if file.resolve() in seen:
        return True
    content = file.read_bytes()
    value = _parsed(content, file)
    value = {"texts": [value]} if is_text(value) else value
    kind = kind_of(value)
    if kind is None:
        return False
    seen.add(file.resolve())
    sha256 = hashlib.sha256(content).hexdigest()
    same = next((result for result in runs.results if result.sha256 == sha256), None)
    if same is not None:
        same.same.append(str(file))
        return True
    try:
        if isinstance(value.get("data"), str):
            value = value | {"data": [value["data"]]}
        value = checked(value, RESULTS[kind])
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or not written by retro {VERBS[kind]}: {error}.") from None
    written_at = datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")
    runs.results.append(Result(str(file), kind, value, sha256, written_at))
    return True


def _parsed(content: bytes, name: object) -> Any:
    """JSON; what no text can hold (half a surrogate pair) becomes a question mark. ValueError with the name."""
    try:
        value = json.loads(content.decode("utf-8"))
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not JSON; copy it again, or write it anew.") from None


def _read_model(folder: Path) -> TrainedModel:
    config, settings = folder / "config.json", folder / "config.yaml"
    about = _parsed(config.read_bytes(), config) if config.is_file() else {}
    if not isinstance(about, dict):
        raise ValueError(f"{config} is no configuration; copy it again from where the model was trained.")
    text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    return TrainedModel(
        str(folder), about, read_provenance(folder) or {}, text, list(_metrics(folder / "metrics.jsonl"))
    )


def _metrics(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}, line {number},"
        yield checked(_parsed(line, where), METRICS, where)


def _read_store(folder: Path) -> StoreRecord:
    store = Store.open(folder)
    manifest, recall = store.manifest, measured_recall(store)
    read = [manifest, *manifest.get("updates", [])]
    inputs = [one["name"] for change in read for one in change.get("inputs", [])]
    return StoreRecord(
        str(folder), store.fingerprint, manifest["counts"], manifest["embedder"].get("name") or "none", inputs, recall
    )
