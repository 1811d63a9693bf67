"""What each kind of result must hold for a report to show it; what else a file holds is kept as it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from retro.evaluation.bits import COLUMNS
from retro.evaluation.tables import figures_of

_LARGEST = 1e300


def _number(value: Any) -> Any:
    """Null, and what no figure can be, as NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return math.nan if value is None or (is_number and not abs(value) <= _LARGEST) else value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(strict=True, lt=1 << 63)]
Ends = Annotated[list[Number], Field(min_length=2, max_length=2)]  # of an interval
Three = Annotated[list[Number], Field(min_length=3, max_length=3)]  # a value with its ends
Texts = Annotated[list[str], Field(min_length=3, max_length=3)]  # before, in and after a run
Column = Literal[tuple(COLUMNS)]


def shape(*parts: dict[str, Any], check: Callable[[Any], Any] | None = None, **fields: Any) -> Any:
    """An object with the fields of some parts and its own, and any others; `check` says whether they fit together."""
    for part in reversed(parts):
        fields = part | fields
    kept = with_config(ConfigDict(extra="allow", strict=True))(TypedDict("Shape", fields))
    return kept if check is None else Annotated[kept, AfterValidator(check)]


def some(of: Any) -> Any:
    """A list that is not empty."""
    return Annotated[list[of], Field(min_length=1)]


def optional(**fields: Any) -> dict[str, Any]:
    """Fields that may be missing."""
    return {name: NotRequired[kind] for name, kind in fields.items()}


def _check_bits(value: dict[str, Any]) -> dict[str, Any]:
    if not value["bpb"] or set(value["bpb"]) != set(value["bpb_little_overlap"]):
        raise ValueError("bpb and bpb_little_overlap have different columns, or none")
    return value


def _check_leakage(value: dict[str, Any]) -> dict[str, Any]:
    columns = [[list(point[name]) for name in ("bpb", "interval", "gain")] for point in value["points"]]
    if any(one != columns[0] for one in columns) or columns[0][0] != columns[0][1]:
        raise ValueError("the points have different columns")
    return value


def _check_sweep(value: dict[str, Any]) -> dict[str, Any]:
    x, with_gain = value["x"], {}
    for number, point in enumerate(value["curve"]):
        place = point.get(x)
        if isinstance(place, bool) or not isinstance(place, (int, float)) or not place >= 0:
            raise ValueError(f"curve[{number}].{x} is {_short(place)}, not a number from 0")
        has = tuple(name in point for name in ("gain", "gain_low", "gain_high"))
        if len(set(has)) > 1 or with_gain.setdefault(point["column"], has) != has:
            raise ValueError(f"curve[{number}].gain is missing")
    if not any(point[x] > 0 for point in value["curve"]):
        raise ValueError(f"curve has no place above 0 on {x}")
    return value


def _check_task(value: dict[str, Any]) -> dict[str, Any]:
    return value | {name: checked(value[name], FIGURES, name) for name in figures_of(value)}


def _check_text(text: dict[str, Any]) -> dict[str, Any]:
    count = len(text["tokens"])
    if text["gains"] is not None and len(text["gains"]) != count:
        raise ValueError(f"it has {count} tokens and {len(text['gains'])} gains")
    for chunk in text["chunks"]:
        if not 0 <= chunk["start"] < chunk["stop"] <= count:
            raise ValueError(f"it has {count} tokens, but a chunk from {chunk['start']} to {chunk['stop']}")
        for run in (neighbor["copied"] for neighbor in chunk["neighbors"] if neighbor["copied"]):
            if not chunk["start"] <= run["start"] < run["start"] + run["num_tokens"] <= chunk["stop"]:
                raise ValueError(f"it has a copied run from {run['start']}, which is not in its chunk")
    return text


_ABOUT = optional(
    data=list[str] | None, store=str | None, store_fingerprint=str, bytes=Count, tokens=Count, chunks=Count,
    chunks_without_neighbors=Count, documents=Count, window_len=Count, stride=Count, index=str | None,
    index_recall=Number,
)  # fmt: skip
_MEASURED = _ABOUT | {"documents": Count, "bytes": Count, "tokens": Count}
_POINT = shape(
    alpha=Number, chunks=Count, documents=Count, bytes=Count, bpb=dict[Column, Number], interval=dict[Column, Ends],
    gain=dict[Column, Three],
)  # fmt: skip
_EXAMPLE = shape(
    document_id=str, chunk=Count, ratio=Number, common_tokens=Count, bits=dict[Column, Number], text=Texts,
    neighbor=shape(document_id=str, title=str, position=Count), neighbor_text=Texts,
)  # fmt: skip
_BITS = {"bpb": Number, "low": Number, "high": Number}
_CURVE = shape(_BITS, optional(gain=Number, gain_low=Number, gain_high=Number), column=Column)
_OF_ROW = {"bpb": Number, "interval": Ends, "gain": Three, "bpb_little_overlap": Number, "gain_little_overlap": Three}
_BELOW = shape(gain=Three, gain_little_overlap=Three)
_ROW = shape(
    _OF_ROW, optional(without_near_copies=shape(_OF_ROW), below=dict[str, _BELOW]), method=str, label=str,
    model=str | None, k=Count | None, trained_weights=Count | None, ms_per_token=Number,
    search_ms_per_token=Number, searches_per_1000_tokens=Number,
    flops_per_1000_tokens=Number, search_flops_per_1000_tokens=Number, store_bytes=Number, chosen=dict[str, Any],
)  # fmt: skip
_NEIGHBOR = shape(
    row=Count, score=Number, measure=str, document_id=str | None, title=str | None, source=str | None,
    position=Count | None, date=str | None, tokens=list[str], continuation_start=Count,
    copied=shape(start=Count, neighbor_start=Count, num_tokens=Count, text=str) | None,
)  # fmt: skip
_CHUNK = shape(chunk=Count, start=Count, stop=Count, num_prompt_tokens=Count, neighbors=list[_NEIGHBOR])
_TEXT = {
    "num_prompt_tokens": Count,
    "chunk_len": Count,
    "token_ids": list[Count],
    "tokens": list[str],
    "retrieved": bool,
    "gains": list[Number | None] | None,
    "chunks": list[_CHUNK],
}
_FIGURES = dict[str, shape(value=Number, interval=Ends)]
FIGURES = TypeAdapter(_FIGURES)
METRICS = TypeAdapter(shape(optional(loss=Number), step=Count, tokens=Count))
_BITS_MAYBE = optional(
    interval=dict[Column, Ends], gain=dict[Column, Three], gain_little_overlap=dict[Column, Three], off_below_lm=Three,
    perplexity=dict[Column, dict[str, Number]], model=str | None, lm=str | None,
)  # fmt: skip
_TASK_MAYBE = optional(
    examples=Count, questions=Count, read_neighbors=Number, answers=list[dict[str, Any]],
    recall=dict[
        str,
        shape(optional(by_document=_FIGURES), questions=Count, by_id=_FIGURES | None, by_answer=_FIGURES | None),
    ],
)  # fmt: skip
_SHAPES = {
    "evaluate": shape(
        _MEASURED, _BITS_MAYBE, check=_check_bits, bpb=dict[Column, Number], bpb_little_overlap=dict[Column, Number],
        chunks=Count, chunks_little_overlap=Count,
    ),
    "leakage": shape(
        _MEASURED, optional(documents_in_store=Count), check=_check_leakage, points=some(_POINT),
        examples=list[_EXAMPLE], num_neighbors=Count,
    ),
    "sweep": shape(
        _MEASURED, check=_check_sweep, sweep=str, x=str, xlabel=str, band=str, points=some(_CURVE), curve=some(_CURVE),
        references=dict[Column, shape(_BITS)],
    ),
    "baselines": shape(
        _MEASURED, rows=some(_ROW), windows=Count, validation_tokens=Count, settings=dict[str, Any],
        near_copies=list[str], threads=Count, device=str,
    ),
    "task": shape(_ABOUT, _TASK_MAYBE, check=_check_task, task=str),
    "lm_eval": shape(
        optional(data=list[str] | None, store=str | None, **{"n-samples": dict[str, dict[str, Any]]}),
        results=dict[str, dict[str, Any]],
    ),
    "generate": shape(_ABOUT, optional(model=str), texts=some(shape(_TEXT, check=_check_text))),
}  # fmt: skip
RESULTS = {kind: TypeAdapter(each) for kind, each in _SHAPES.items()}
VERBS = {kind: kind for kind in RESULTS} | {"evaluate": "evaluate or demo", "lm_eval": "task lm-eval"}


def is_text(value: Any) -> bool:
    """Whether it is one text of `retro generate`, as `retro.sampling.as_json` gives it."""
    return isinstance(value, dict) and set(_TEXT) <= set(value)


def checked(value: Any, of: TypeAdapter, where: str = "") -> Any:
    """The value with null and infinite numbers as NaN; ValueError, naming the field and what it is, if it is not so."""
    try:
        return of.validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        for part in found["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}"
        where = where.lstrip(".")
        if found["type"] == "missing":
            raise ValueError(f"{where} is missing") from None
        if found["type"] == "value_error":
            raise ValueError(f"{where}: {found['ctx']['error']}".removeprefix(": ")) from None
        where = where.removesuffix(".[key]") or "it"
        told = re.sub("^(Input|List|Dictionary) | after validation", "", found["msg"])
        raise ValueError(f"{where} is {_short(found['input'])}: it {told}") from None


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
