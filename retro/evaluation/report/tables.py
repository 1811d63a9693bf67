"""Results as tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from retro.evaluation.bits import COLUMNS
from retro.evaluation.report.files import Result
from retro.evaluation.report.shapes import figures_of
from retro.evaluation.tasks.results import TITLES as COLUMN_TITLES

NOTHING = "–"
TITLES = {"evaluate": "bits per byte", "leakage": "leakage", "sweep": "sweep", "baselines": "baselines"}
TITLES |= {"lm_eval": "tasks of lm_eval", "generate": "samples"}
_MOST_ANSWERS = 10


@dataclass(frozen=True)
class Table:
    """The first `num_labels` columns are names, the others figures. note: what stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_labels: int = 1
    note: str = ""


def title_of(result: Result) -> str:
    """What kind of result it is, in a few words."""
    if result.kind in ("sweep", "task"):
        return f"{result.kind}: {result.value[result.kind]}"
    return "bits per byte (retro demo)" if "seconds_of_stage" in result.value else TITLES[result.kind]


def overview(results: Sequence[Result]) -> Table:
    """What was measured on what, one row a result."""
    names = ("bytes", "tokens", "num_neighbors", "window_len", "stride", "seed")
    rows = []
    for result in results:
        value = (result.value.get("settings", {}) if result.kind == "baselines" else {}) | result.value
        counts = [value[name] for name in ("documents", "examples", "questions") if isinstance(value.get(name), int)]
        texts = len(value["texts"]) if result.kind == "generate" else next(iter(counts), None)
        shown = [texts, *(value.get(name) for name in names)]
        rows.append([title_of(result), model_of(value), data_of(value), store_of(value), *map(plain_cell, shown)])
    columns = ("what", "model", "data", "store", "texts", "bytes", "tokens", "k", "window", "stride", "seed")
    return Table("", columns, rows, num_labels=4)


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


def tables_of(result: Result) -> list[Table]:
    """The tables of any result but "evaluate" (see `table_of_bits`)."""
    makers = {"leakage": _leakage, "sweep": _sweep, "baselines": _baselines, "task": _task, "lm_eval": _lm_eval}
    return makers[result.kind](result.value)


def table_of_bits(results: Sequence[Result]) -> Table:
    """Bits per byte and perplexity by model and column: of results over the same text, store and tokens."""
    rows = []
    for result in results:
        value = result.value
        for column, bpb in value["bpb"].items():
            model = value.get("lm") if column == "lm" and value.get("lm") else value.get("model")
            perplexity, seconds = value.get("perplexity", {}).get(column, {}), value.get("seconds")
            rows.append(
                [
                    str(model or result.name),
                    COLUMNS[column],
                    figure(bpb),
                    ends(value.get("interval", {}).get(column)),
                    figure(value["bpb_little_overlap"].get(column)),
                    figure(perplexity.get("token"), 3),
                    figure(perplexity.get("word"), 3),
                    plain_cell(value["num_neighbors"] if column.startswith("retro_on") else None),
                    f"{value['window_len']} / {value.get('stride', NOTHING)}",
                    figure(seconds.get(column) if isinstance(seconds, dict) else None, 1),
                ]
            )
    columns = ("model", "", "bits per byte", "95%", "r(C) ≤ 12.5%", "perplexity, token", "word", "k")
    columns = (*columns, "window / stride", "seconds")
    value = results[0].value
    note = (
        f"r(C) ≤ 12.5%: over the {value['chunks_little_overlap']:,} of {value['chunks']:,} chunks of which at most an "
        "eighth stands in one run of tokens that any of the 10 nearest neighbors holds too."
    )
    return Table("Bits per byte", columns, rows, 2, note)


def gains_line(value: dict[str, Any]) -> str:
    """How far RETRO[ON] is below each other column, in words; empty without it."""
    bpb = value["bpb"]
    others = [column for column in bpb if column != "retro_on"]
    if "retro_on" not in bpb or not others:
        return ""
    said = [f"{change(gain_over(bpb['retro_on'], bpb[one]))} {COLUMNS[one]}{_surely(value, one)}" for one in others]
    return f"RETRO[ON] is {', '.join(said)}."


def _surely(value: dict[str, Any], column: str) -> str:
    """The interval of a gain, and the gain over chunks with little overlap with its own, where they are known."""
    found = [value.get(name, {}).get(column) for name in ("gain", "gain_little_overlap")]
    told = ["" if one is None else ends(one[1:], percent) for one in found]
    if found[1] is not None and told[1] not in ("", NOTHING):
        told[1] = f"r(C) ≤ 12.5%: {percent(found[1][0])}, {told[1]}"
    kept = [one for one in told if one not in ("", NOTHING)]
    return f" ({'; '.join(kept)})" if kept else ""


def _leakage(value: dict[str, Any]) -> list[Table]:
    points = value["points"]
    counts = lambda p: [share(p["alpha"]), plain_cell(p["chunks"]), plain_cell(p["bytes"])]  # noqa: E731
    bits, gained = list(points[0]["bpb"]), list(points[0]["gain"])
    with_ends = lambda p, c: f"{figure(p['bpb'][c])} {in_brackets(p['interval'][c])}"  # noqa: E731
    of_gain = lambda x: f"{percent(x[0])} {in_brackets(x[1:], percent)}"  # noqa: E731
    columns = ("r(C) at most", "chunks", "bytes")
    tables = [
        Table(
            "Bits per byte over the chunks that overlap little with their neighbors",
            (*columns, *(COLUMNS[column] for column in bits)),
            [[*counts(p), *(with_ends(p, column) for column in bits)] for p in points],
            note="In brackets: 95% bootstrap over documents.",
        )
    ]
    if gained:
        titles = (f"below {COLUMNS[column]}" for column in gained)
        rows = [[*counts(p), *(of_gain(p["gain"][column]) for column in gained)] for p in points]
        tables.append(Table("How far RETRO[ON] is below", (*columns, *titles), rows))
    return tables


def _sweep(value: dict[str, Any]) -> list[Table]:
    with_gain = any("gain" in point for point in value["curve"])
    rows = [
        [amount(point[value["x"]]), COLUMNS[point["column"]], *_bits_cells(point, with_gain)]
        for point in value["curve"]
    ]
    rows += [["", COLUMNS[column], *_bits_cells(point, with_gain)] for column, point in value["references"].items()]
    columns = (value["xlabel"], "", "bits per byte", "from, to", *(("below RETRO[OFF]", "from, to") * with_gain))
    return [Table(f"Sweep over {value['sweep']}", columns, rows, 2, f"From, to: {value['band']}.")]


def _bits_cells(point: dict[str, Any], with_gain: bool) -> list[str]:
    cells = [figure(point["bpb"]), ends([point["low"], point["high"]])]
    if not with_gain:
        return cells
    if "gain" not in point:
        return [*cells, NOTHING, NOTHING]
    return [*cells, percent(point["gain"]), ends([point["gain_low"], point["gain_high"]], percent)]


def _baselines(value: dict[str, Any]) -> list[Table]:
    rows, first = value["rows"], value["rows"][0]["label"]
    flops = lambda row: row["flops_per_1000_tokens"] + row["search_flops_per_1000_tokens"]  # noqa: E731
    cells = [
        [
            row["label"],
            figure(row["bpb"]),
            ends(row["interval"]),
            f"{percent(row['change'], '+')} {in_brackets(row['change_interval'], percent)}",
            figure(row["bpb_little_overlap"]),
            figure(row["seconds_per_1000_tokens"], 2),
            figure(row["search_seconds_per_1000_tokens"], 2),
            figure(row["searches_per_1000_tokens"], 1),
            figure(flops(row) / 1e9, 1),
            figure(row["store_bytes"] / 1e6, 1),
        ]
        for row in rows
    ]
    columns = ("", "bits per byte", "95%", f"against {first}", "r(C) ≤ 12.5%", "seconds", "of searching", "searches")
    note = (
        f"{value['windows']:,} windows, the same {value['tokens']:,} target tokens in every row. Seconds, searches and "
        "GFLOPs are of 1,000 tokens, the store's MB those read at inference."
    )
    note = " ".join([note, *(_chosen(row) for row in rows if row["chosen"])])
    return [Table("Baselines on the same store", (*columns, "GFLOPs", "store, MB"), cells, note=note)]


def _chosen(row: dict[str, Any]) -> str:
    return f"{row['label']}: {', '.join(f'{name} {plain_cell(x)}' for name, x in row['chosen'].items())}."


def _task(value: dict[str, Any]) -> list[Table]:
    figures = figures_of(value)
    columns = list(dict.fromkeys(column for name in figures for column in value[name]))
    rows = [
        [COLUMN_TITLES.get(column, column), *(_task_cell(value[name].get(column)) for name in figures)]
        for column in columns
    ]
    count = value.get("examples", value.get("questions"))
    note = f"{count:,} examples; in brackets: 95% bootstrap over them." if count is not None else ""
    titles = [name.replace("_", " ") for name in figures]
    tables = [Table(f"Task: {value['task']}", ("", *titles), rows, note=note)] if rows else []
    if value.get("recall"):
        tables.append(_recall(value["recall"]))
    answers = value.get("answers")
    if answers:
        shown = records_table(f"The first of {len(answers):,} answers", answers[:_MOST_ANSWERS])
        tables.append(Table(shown.title, shown.columns, shown.rows, num_labels=len(shown.columns)))
    return tables


def _recall(by_index: dict[str, Any]) -> Table:
    kinds = ("by_id", "by_answer")
    found = [(index, kind, one[kind]) for index, one in by_index.items() for kind in kinds if one[kind]]
    ks = list(dict.fromkeys(k for _, _, figures in found for k in figures))
    rows = [[index, kind.replace("_", " "), *(_task_cell(own.get(k)) for k in ks)] for index, kind, own in found]
    note = "By id: a passage of the right document; by answer: one that holds a right answer. In brackets: 95%."
    return Table("Recall of the right passage", ("index", "right", *(f"@{k}" for k in ks)), rows, 2, note)


def _lm_eval(value: dict[str, Any]) -> list[Table]:
    """Metrics as lm_eval names them, "metric,filter", with their standard errors."""
    rows = []
    for task, found in value["results"].items():
        count = value.get("n-samples", {}).get(task, {}).get("effective")
        for name, figure_of in found.items():
            metric, _, chosen = name.partition(",")
            if isinstance(figure_of, (int, float)) and chosen and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{chosen}")
                rows.append([task, metric, plain_cell(figure_of), plain_cell(error), plain_cell(count)])
    return [Table("Tasks of lm_eval", ("task", "metric", "value", "standard error", "examples"), rows, 2)]


def _task_cell(cell: dict[str, Any] | None) -> str:
    form = lambda value: figure(value) if abs(value) < 1000 else plain_cell(value)  # noqa: E731
    return NOTHING if cell is None else f"{form(cell['value'])} {in_brackets(cell['interval'], form)}"


def records_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    """Flat records as they are, the columns in the order in which they first occur."""
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[plain_cell(record.get(name)) for name in names] for record in records]
    return Table(title, [name.replace("_", " ") for name in names], rows)


def figure(value: float | int | None, digits: int = 4) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float | int, sign: str = "") -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:{sign}.2f}%"


def share(value: float | int) -> str:
    return f"{100 * value:g}%"


def gain_over(bpb: float | int, other: float | int) -> float:
    """By which share a figure is below another one; NaN where the other is 0."""
    return 1 - bpb / other if other else math.nan


def change(gain: float | int) -> str:
    """A gain in words: "8.8% below"."""
    return "not comparable with" if math.isnan(gain) else f"{100 * abs(gain):.1f}% {'below' if gain >= 0 else 'above'}"


def ends(pair: Iterable[float] | None, form: Any = figure) -> str:
    """The two ends of an interval, nothing where they are no numbers."""
    low, high = (math.nan, math.nan) if pair is None else pair
    return NOTHING if math.isnan(low) or math.isnan(high) else f"{form(low)} to {form(high)}"


def in_brackets(pair: Iterable[float], form: Any = figure) -> str:
    told = ends(pair, form)
    return "" if told == NOTHING else f"({told})"


def amount(value: float | int) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def plain_cell(value: Any) -> str:
    """Any value of a record in a few characters."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
