"""What each kind of result looks like, and the check that a value is one.

A shape is a type (`float` takes whole numbers too, and null, which becomes NaN), a dict of fields ("name?" may be
missing, what is not named is kept as it is), [shape] for a list, [shape, ...] for one that is not empty, (shape, shape)
for a list of that length, or one of the classes here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from retro.evaluation.bits import COLUMNS

_LARGEST = 1e300
_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Maybe:
    """The shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """An object with values of the shape, under any names, or under some of `names`."""

    shape: Any
    names: tuple[str, ...] | None = None


def by_column(shape: Any) -> Each:
    """Values by column: LM, RETRO[OFF], ..."""
    return Each(shape, tuple(COLUMNS))


ENDS = (float, float)
ABOUT = {
    "data?": Maybe([str]),
    "store?": Maybe(str),
    "store_fingerprint?": str,
    "bytes?": int,
    "tokens?": int,
    "chunks?": int,
    "chunks_without_neighbors?": int,
    "documents?": int,
    "num_neighbors?": int,
    "window_len?": int,
    "stride?": int,
    "seed?": int,
    "index?": Maybe(str),
    "index_recall?": float,
    "versions?": Each(str),
}
_MEASURED = ABOUT | {"documents": int, "bytes": int, "tokens": int}
_POINT = {
    "alpha": float,
    "chunks": int,
    "documents": int,
    "bytes": int,
    "bpb": by_column(float),
    "interval": by_column(ENDS),
    "gain": by_column((float, float, float)),
}
_EXAMPLE = {
    "document_id": str,
    "chunk": int,
    "ratio": float,
    "common_tokens": int,
    "bits": by_column(float),
    "text": (str, str, str),
    "neighbor": {"document_id": str, "title": str, "position": int},
    "neighbor_text": (str, str, str),
}
_BITS = {"bpb": float, "low": float, "high": float}
_CURVE = _BITS | {"column": str, "gain?": float, "gain_low?": float, "gain_high?": float}
_ROW = {
    "method": str,
    "label": str,
    "bpb": float,
    "interval": ENDS,
    "change": float,
    "change_interval": ENDS,
    "bpb_little_overlap": float,
    "seconds_per_1000_tokens": float,
    "search_seconds_per_1000_tokens": float,
    "searches_per_1000_tokens": float,
    "flops_per_1000_tokens": float,
    "search_flops_per_1000_tokens": float,
    "store_bytes": float,
    "chosen": {},
}
_COPIED = {"start": int, "neighbor_start": int, "num_tokens": int, "text": str}
_NEIGHBOR = {
    "row": int,
    "score": float,
    "document_id": Maybe(str),
    "title": Maybe(str),
    "source": Maybe(str),
    "position": Maybe(int),
    "date": Maybe(str),
    "tokens": [str],
    "continuation_start": int,
    "copied": Maybe(_COPIED),
}
TEXT = {
    "num_prompt_tokens": int,
    "chunk_len": int,
    "token_ids": [int],
    "tokens": [str],
    "retrieved": bool,
    "gains": Maybe([Maybe(float)]),
    "chunks": [{"chunk": int, "start": int, "stop": int, "num_prompt_tokens": int, "neighbors": [_NEIGHBOR]}],
}
FIGURE = Each({"value": float, "interval": ENDS})
RECALL = Each({"questions": int, "by_id": Maybe(FIGURE), "by_answer": Maybe(FIGURE)})
SHAPES = {
    "evaluate": _MEASURED
    | {
        "bpb": by_column(float),
        "bpb_little_overlap": by_column(float),
        "interval?": by_column(ENDS),
        "gain?": by_column((float, float, float)),
        "gain_little_overlap?": by_column((float, float, float)),
        "off_below_lm?": (float, float, float),
        "perplexity?": by_column(Each(float)),
        "chunks": int,
        "chunks_little_overlap": int,
        "model?": Maybe(str),
        "lm?": Maybe(str),
    },
    "leakage": _MEASURED
    | {"points": [_POINT, ...], "examples": [_EXAMPLE], "num_neighbors": int, "documents_in_store?": int},
    "sweep": _MEASURED
    | {
        "sweep": str,
        "x": str,
        "xlabel": str,
        "band": str,
        "points": [_CURVE, ...],
        "curve": [_CURVE, ...],
        "references": by_column(_BITS),
    },
    "baselines": _MEASURED | {"rows": [_ROW, ...], "windows": int, "validation_tokens": int, "settings": {}},
    "task": ABOUT
    | {"task": str, "examples?": int, "questions?": int, "read_neighbors?": float, "answers?": [{}], "recall?": RECALL},
    "lm_eval": {"results": Each({}), "data?": Maybe([str]), "store?": Maybe(str), "n-samples?": Each({})},
    "generate": ABOUT | {"texts": [TEXT, ...], "model?": str},
    "metrics": {"step": int, "tokens": int, "loss?": float},
}
VERBS = {
    "evaluate": "evaluate or demo",
    "leakage": "leakage",
    "sweep": "sweep",
    "baselines": "baselines",
    "task": "task",
    "lm_eval": "task lm-eval",
    "generate": "generate",
}
_MARKS = {  # fields that only this kind has
    "leakage": {"points", "examples"},
    "sweep": {"sweep", "curve"},
    "baselines": {"rows", "windows"},
    "task": {"task"},
    "lm_eval": {"results", "n-shot"},
    "generate": {"texts"},
    "evaluate": {"bpb", "bpb_little_overlap"},
}


def kind_of(value: Any) -> str | None:
    """The kind of a result: its field "kind", else by the fields it has; None for what is no result."""
    if not isinstance(value, dict):
        return None
    if value.get("kind") in VERBS:
        return value["kind"]
    return next((kind for kind, marks in _MARKS.items() if marks <= set(value)), None)


def checked(value: Any, shape: Any, where: str = "") -> Any:
    """The value with null and infinite numbers as NaN; ValueError, naming the field, where it has not the shape."""
    if isinstance(shape, Maybe):
        return None if value is None else checked(value, shape.shape, where)
    if isinstance(shape, type):
        return _checked_scalar(value, shape, where)
    if isinstance(shape, (list, tuple)):
        return _checked_list(value, shape, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_short(value)}, not an object")
    if isinstance(shape, Each):
        for name in value:
            if shape.names is not None and name not in shape.names:
                raise ValueError(f"{where} has {name!r}, which is none of {', '.join(shape.names)}")
        return {name: checked(one, shape.shape, f"{where}.{name}") for name, one in value.items()}
    kept = dict(value)
    for name, inner in shape.items():
        field = name.removesuffix("?")
        if field in value:
            kept[field] = checked(value[field], inner, f"{where}.{field}".lstrip("."))
        elif field == name:
            raise ValueError(f"{where}.{field} is missing".lstrip("."))
    return kept


def _checked_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and value is None:
        return math.nan
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{where} is {_short(value)}, not {_NAMES[kind]}")
    if kind is int and abs(value) > _LARGEST:
        raise ValueError(f"{where} is {_short(value)}, too large a number")
    if kind is float:
        return float(value) if abs(value) <= _LARGEST else math.nan
    return value


def _checked_list(value: Any, shape: list | tuple, where: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_short(value)}, not a list")
    if isinstance(shape, tuple):
        if len(value) != len(shape):
            raise ValueError(f"{where} has {len(value)} values, not {len(shape)}")
        return [checked(one, inner, f"{where}[{i}]") for i, (one, inner) in enumerate(zip(value, shape, strict=True))]
    if len(shape) > 1 and not value:
        raise ValueError(f"{where} is empty")
    return [checked(one, shape[0], f"{where}[{i}]") for i, one in enumerate(value)]


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
