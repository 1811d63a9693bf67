"""What was measured on what, in a few words and in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retro.evaluation.cells import NOTHING
from retro.evaluation.report.files import Result
from retro.evaluation.tables import Table, records_table

TITLES = {"evaluate": "bits per byte", "leakage": "leakage", "sweep": "sweep", "baselines": "baselines"}
TITLES |= {"lm_eval": "tasks of lm_eval", "generate": "samples"}


def title_of(result: Result) -> str:
    """What kind of result it is, in a few words."""
    if result.kind in ("sweep", "task"):
        return f"{result.kind}: {result.value[result.kind]}"
    return "bits per byte (retro demo)" if "seconds_of_stage" in result.value else TITLES[result.kind]


def overview(results: Sequence[Result]) -> Table:
    """What was measured on what, one row a result."""
    records = []
    for result in results:
        value = (result.value.get("settings", {}) if result.kind == "baselines" else {}) | result.value
        counts = [value[name] for name in ("documents", "examples", "questions") if isinstance(value.get(name), int)]
        texts = len(value["texts"]) if result.kind == "generate" else next(iter(counts), None)
        about = {"what": title_of(result), "model": model_of(value), "data": data_of(value), "store": store_of(value)}
        names = {"bytes": "bytes", "tokens": "tokens", "num_neighbors": "k", "window_len": "window"}
        read = {title: value.get(name) for name, title in (names | {"stride": "stride", "seed": "seed"}).items()}
        records.append(about | {"texts": texts} | read)
    return records_table("", records, num_labels=4)


def model_of(value: dict[str, Any]) -> str:
    model = value.get("model")
    names = model if isinstance(model, list) else [model]
    names = [str(name) for name in names if name]
    return ", ".join(names) + (f"; LM: {value['lm']}" if value.get("lm") else "") if names else "not said"


def data_of(value: dict[str, Any]) -> str:
    if value.get("data"):
        return ", ".join(value["data"])
    return NOTHING if "texts" in value else "not said"


def store_of(value: dict[str, Any]) -> str:
    """The store's path and the beginning of its fingerprint, as far as the result says them."""
    fingerprint = value.get("store_fingerprint")
    if "store" in value and value["store"] is None and not fingerprint:
        return "none"
    said = [value.get("store"), fingerprint and f"({fingerprint[:12]})"]
    return " ".join(one for one in said if one) or "not said"
