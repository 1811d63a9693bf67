"""Results as tables for the terminal, for CSV and for the report, each made by one function for its kind of result."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro.common.files import finite, write_text
from retro.evaluation.bits import COLUMNS
from retro.evaluation.cells import (
    NOTHING,
    amount,
    ends,
    figure,
    gain_over,
    percent,
    plain_cell,
    share,
    with_ends,
)

TITLES = COLUMNS | {
    "in_context": "passages in the prompt",
    "in_context_on": "in the prompt, RETRO[ON]",
    "in_context_on_random": "in the prompt, RETRO[ON], random",
    "chunks": "chunks",
}
MARKS = {  # fields that only this kind of result has
    "leakage": {"points", "examples"},
    "sweep": {"sweep", "curve"},
    "baselines": {"rows", "windows"},
    "task": {"task"},
    "lm_eval": {"results", "n-shot"},
    "generate": {"texts"},
    "evaluate": {"bpb", "bpb_little_overlap"},
}
_LITTLE = "r <= 12.5%"
_ABOUT_LITTLE = f"{_LITTLE}: at most an eighth of the chunk in one run in common with any of its 10 nearest neighbors"
_MOST_ANSWERS = 10


@dataclass(frozen=True)
class Column:
    """cell: what it shows of a record; label: it names the record. width: in a terminal; 0 is that of its cells."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    label: bool = False
    width: int = 0


@dataclass(frozen=True)
class Table:
    """records: one for each row. note: what stands below. data: flat records with every figure, for CSV."""

    title: str
    columns: Sequence[Column]
    records: Sequence[dict[str, Any]]
    note: str = ""
    data: Sequence[dict[str, Any]] = ()

    @property
    def rows(self) -> list[list[str]]:
        """The cells."""
        return [[column.cell(record) for column in self.columns] for record in self.records]

    def text(self) -> str:
        """For a terminal, labels on the left."""
        lines = [[column.title for column in self.columns], *self.rows]
        for i, column in enumerate(self.columns):
            width = column.width or 2 + max(len(line[i]) for line in lines)
            for line in lines:
                line[i] = line[i].ljust(width) if column.label else line[i].rjust(width)
        told = [self.title, *("".join(line).rstrip() for line in lines), *textwrap.wrap(self.note, 120)]
        return "\n".join(line for line in told if line)


def table_text(result: dict[str, Any]) -> str:
    """Any result for people, as a terminal shows it."""
    return as_text(tables_of(result))


def as_text(tables: Iterable[Table]) -> str:
    """A blank line stands before every table with a title."""
    return "\n".join("\n" * bool(table.title) + table.text() for table in tables).lstrip("\n")


def write_csv(file: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Flat records as CSV, the columns in the order in which they first occur."""
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, _fields(records))
    writer.writeheader()
    writer.writerows(finite(list(records)))
    write_text(file, written.getvalue())


def kind_of(value: Any) -> str | None:
    """The kind of a result: its field "kind", else by the fields it has; None for what is no result."""
    if not isinstance(value, dict):
        return None
    if value.get("kind") in MARKS:
        return value["kind"]
    return next((kind for kind, marks in MARKS.items() if marks <= set(value)), None)


def tables_of(result: dict[str, Any]) -> list[Table]:
    """The tables of any result but samples."""
    makers = {"leakage": _leakage, "sweep": _sweep, "baselines": _baselines, "task": _task, "lm_eval": _lm_eval}
    return (makers | {"evaluate": bits_tables})[kind_of(result)](result)


def records_table(title: str, records: Sequence[dict[str, Any]], num_labels: int = 1) -> Table:
    """Flat records as they are; the first columns are labels."""
    names = _fields(records)
    columns = [_column(name.replace("_", " "), name, plain_cell, i < num_labels) for i, name in enumerate(names)]
    return Table(title, columns, records)


# Bits per byte


def bits_tables(result: dict[str, Any]) -> list[Table]:
    """Bits per byte, what RETRO[ON] gains, and the perplexities if they are known."""
    records = list(bits_records(result))
    chunks = {"column": "chunks", "bpb": result["chunks"], "little": result["chunks_little_overlap"]}
    title = (
        f"bits per byte over {result['documents']} documents, {result['bytes']:,} bytes, k = {result['num_neighbors']}"
    )
    columns = [_names("", 20), _column("all chunks", "bpb", width=12), _column(_LITTLE, "little", width=14)]
    tables = [Table(title, columns, [*records, chunks]), gains_table(result)]
    if "perplexity" in result:
        title = f"over {result['tokens']:,} tokens, {result['words']:,} words, {result['line_ends']:,} line ends"
        columns = [
            _names("perplexity", 20),
            _column("token", "token", _short, width=12),
            _column("word", "word", _short, width=14),
            _column("word or line end", "word_with_line_ends", _short, width=18),
            _column("bits per byte, 95%", "interval", ends, width=22),
        ]
        tables.append(Table(title, columns, records))
    return tables


def bits_records(result: dict[str, Any], name: str = "") -> Iterator[dict[str, Any]]:
    """A record for each column. name: of a model without one."""
    model, seconds = result.get("model") or name, result.get("seconds")
    for column, bpb in result["bpb"].items():
        yield {
            "model": result.get("lm") or model if column == "lm" else model,
            "column": column,
            "bpb": bpb,
            "interval": result.get("interval", {}).get(column),
            "little": result["bpb_little_overlap"].get(column),
            **result.get("perplexity", {}).get(column, {}),
            "k": result.get("num_neighbors") if column.startswith("retro_on") else None,
            "window": f"{result.get('window_len', NOTHING)} / {result.get('stride', NOTHING)}",
            "seconds": seconds.get(column) if isinstance(seconds, dict) else None,
        }


def bits_table(results: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Names and results over the same text, store and tokens, by model and column."""
    columns = [
        _column("model", "model", str, label=True),
        _names(""),
        _column("bits per byte", "bpb"),
        _column("95%", "interval", ends),
        _column(_LITTLE, "little"),
        _column("perplexity, token", "token", _short),
        _column("word", "word", _short),
        _column("k", "k", plain_cell),
        _column("window / stride", "window", str),
        _column("seconds", "seconds", lambda x: figure(x, 1)),
    ]
    counts = "{chunks_little_overlap:,} of the {chunks:,} chunks are those with ".format(**results[0][1])
    return Table(
        "Bits per byte",
        columns,
        [record for name, result in results for record in bits_records(result, name)],
        counts + _ABOUT_LITTLE,
    )


def gains_table(result: dict[str, Any]) -> Table:
    """How far RETRO[ON] is below each other column, and RETRO[OFF] below the LM."""
    bpb = result["bpb"]
    alone = {c: [gain_over(bpb["retro_on"], x), math.nan, math.nan] for c, x in bpb.items() if "retro_on" in bpb}
    records = [
        {"who": f"RETRO[ON] below {COLUMNS[column]}", "all": gain}
        | {"little": result.get("gain_little_overlap", {}).get(column)}
        for column, gain in (result.get("gain") or alone).items()
        if column != "retro_on"
    ]
    if "off_below_lm" in result:
        records.append({"who": "RETRO[OFF] below LM", "all": result["off_below_lm"]})
    columns = [
        _column("below it, in % (95%)", "who", str, label=True, width=32),
        _column("all chunks", "all", _in_percent, width=24),
        _column(_LITTLE, "little", _in_percent, width=24),
    ]
    return Table("", columns, records, _ABOUT_LITTLE)


def _in_percent(gain: Sequence[float] | None) -> str:
    return "" if gain is None else with_ends(*gain, lambda x: figure(round(100 * x, 1) + 0.0, 1))


# Leakage and sweeps


def _leakage(result: dict[str, Any]) -> list[Table]:
    points = result["points"]
    columns = [
        _column("r(C) at most", "alpha", share, label=True),
        _column("chunks", "chunks", plain_cell),
        _column("bytes", "bytes", plain_cell),
    ]
    bits = [_of_point(COLUMNS[c], lambda p, c=c: [p["bpb"][c], *p["interval"][c]], figure) for c in points[0]["bpb"]]
    gains = [_of_point(f"below {COLUMNS[c]}", lambda p, c=c: p["gain"][c], percent) for c in points[0]["gain"]]
    title = "Bits per byte over the chunks that overlap with their neighbors by no more than r(C)"
    note = f"{result['documents']} documents, k = {result['num_neighbors']}; in brackets: 95% bootstrap over documents."
    tables = [Table(title, [*columns, *bits], points, note, list(_leakage_records(points)))]
    return tables + [Table("How far RETRO[ON] is below", [*columns, *gains], points)] * bool(gains)


def _of_point(title: str, three: Callable, form: Callable) -> Column:
    return Column(title, lambda point: with_ends(*three(point), form))


def _leakage_records(points: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A flat record for each alpha and column."""
    for point in points:
        counts = {name: point[name] for name in ("alpha", "chunks", "documents", "bytes")}
        for column, bpb in point["bpb"].items():
            low, high = point["interval"][column]
            gain, gain_low, gain_high = point["gain"].get(column, [None] * 3)
            yield {**counts, "column": column, "bpb": bpb, "low": low, "high": high} | {
                "on_is_below": gain, "on_is_below_low": gain_low, "on_is_below_high": gain_high
            }  # fmt: skip


def _sweep(result: dict[str, Any]) -> list[Table]:
    """The curve and the references; among the data the points, if the curve is of means."""
    curve, draws = result["curve"], "draws" in result["curve"][0]
    points = [{"what": "point", **point} for point in result["points"]]
    means = [{"what": "mean", **point} for point in curve] if draws else []
    references = [{"what": "reference", "column": column, **one} for column, one in result["references"].items()]
    columns = [
        _column(result["xlabel"], result["x"], amount, label=True),
        _names(""),
        _column("bits per byte", "bpb"),
        _between("from, to", "low", "high"),
    ]
    if any("gain" in point for point in curve):
        columns.append(_column("below RETRO[OFF]", "gain", percent))
        columns.append(_between("from, to", "gain_low", "gain_high", percent))
    note = f"{result['documents']} documents, {result['bytes']:,} bytes. From, to: {result['band']}."
    shown = [*(means or points), *references]
    return [Table(f"Sweep over {result['sweep']}", columns, shown, note, [*points, *means, *references])]


# Baselines


def _baselines(result: dict[str, Any]) -> list[Table]:
    """All documents, and those that are no near copies where there are both."""
    rows = result["rows"]
    columns = [
        _column("", "label", str, label=True),
        _column("model", "model", plain_cell, label=True),
        _column("k", "k", plain_cell),
        _column("bits per byte", "bpb"),
        _column(f"below {rows[0]['label']}, in % (95%)", "gain", _in_percent),
        _column(f"{_LITTLE}, bits per byte", "bpb_little_overlap"),
        _column(f"{_LITTLE}, below", "gain_little_overlap", _in_percent),
    ]
    costs = [
        Column("GFLOPs", lambda row: figure(sum(row[f"{of}flops_per_1000_tokens"] for of in ("", "search_")) / 1e9, 1)),
        _column("ms", "ms_per_token", lambda x: figure(x, 2)),
        _column("searching, ms", "search_ms_per_token", lambda x: figure(x, 2)),
        _column("weights trained", "trained_weights", plain_cell),
    ]
    note = (
        f"{result['windows']:,} windows of {result['documents']:,} documents, the same {result['tokens']:,} target "
        "tokens in every row. GFLOPs are of 1,000 of them; milliseconds of one, the median over documents, on "
        f"{result['device']}, threads: {result['threads']}. {_ABOUT_LITTLE}."
    )
    note = " ".join([note, *(_chosen(row) for row in rows if row["chosen"])])
    tables = [Table("Baselines on the same store", [*columns, *costs], rows, note, list(map(_flat, rows)))]
    tables += _pairs(rows, columns[:3])
    if "without_near_copies" not in rows[0]:
        return tables
    title = f"Without near copies ({len(result['near_copies'])}), of whose 13-grams one document of the store has half"
    return [*tables, Table(title, columns, [row | row["without_near_copies"] for row in rows])]


def _pairs(rows: Sequence[dict[str, Any]], names: Sequence[Column]) -> list[Table]:
    """How far rows are below those that differ in one thing, document by document."""
    paired = [row for row in rows if row.get("below")]
    titles = {"random": "its random neighbors", "prompt": "the prompt with as many"}
    columns = [
        Column(f"{what}{title}", lambda row, key=key, field=field: _in_percent(row["below"].get(key, {}).get(field)))
        for key, title in titles.items()
        if any(key in row["below"] for row in paired)
        for field, what in (("gain", "below "), ("gain_little_overlap", f"{_LITTLE}, below "))
    ]
    return [Table("Against the same with other neighbors, in % (95%)", [*names, *columns], paired)] if columns else []


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Its numbers with names for the ends of intervals and for what is in a field."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(zip(("", "low", "high")[-len(value) :], value, strict=True))
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}_{own}".rstrip("_"): one for own, one in inner.items()}
    return flat


def _chosen(row: dict[str, Any]) -> str:
    return f"{row['label']}: {', '.join(f'{name} {plain_cell(x)}' for name, x in row['chosen'].items())}."


# Tasks


def figures_of(task: dict[str, Any]) -> list[str]:
    """The fields of a task's result that hold figures with intervals, by column."""
    is_figure = lambda one: isinstance(one, dict) and {"value", "interval"} <= set(one)  # noqa: E731
    return [
        name
        for name, field in task.items()
        if isinstance(field, dict) and field and all(map(is_figure, field.values()))
    ]


def _task(result: dict[str, Any]) -> list[Table]:
    names = figures_of(result)
    records = [
        {"column": column} | {name: result[name].get(column) for name in names}
        for column in dict.fromkeys(column for name in names for column in result[name])
    ]
    counted = [name for name in ("examples", "questions", "bytes", "tokens") if isinstance(result.get(name), int)]
    over = f"their {result['right_passages']:,} passages" if result.get("right_passages") else "them"
    note = f"{', '.join(f'{result[name]:,} {name}' for name in counted)}; in brackets: 95% bootstrap over {over}."
    if "retro_on" in result.get("accuracy", {}) and "read_neighbors" in result:
        note += f" {percent(result['read_neighbors'])} of the last words could read a neighbor."
    columns = [_names(""), *(_column(name.replace("_", " "), name, _task_cell) for name in names)]
    tables = [Table(f"Task: {result['task']}", columns, records, note * bool(counted))] if records else []
    return [*tables, _recall(result["recall"])] if result.get("recall") else tables


def answers_tables(result: dict[str, Any]) -> list[Table]:
    """The first answers of a task that has any."""
    answers = result.get("answers") or []
    title, shown = f"The first of {len(answers):,} answers", answers[:_MOST_ANSWERS]
    return [records_table(title, shown, len(_fields(shown)))] * bool(answers)


def _recall(by_index: dict[str, Any]) -> Table:
    records = [
        {"index": index, "right": kind.replace("_", " "), **one[kind]}
        for index, one in by_index.items()
        for kind in ("by_id", "by_answer", "by_document")
        if one.get(kind)
    ]
    ks = [name for name in _fields(records) if name not in ("index", "right")]
    columns = [_column(name, name, str, label=True) for name in ("index", "right")]
    note = "By id, by document: a passage of a right document; by answer: it holds a right answer. In brackets: 95%."
    columns += [_column(k if "@" in str(k) else f"@{k}", k, _task_cell) for k in ks]
    return Table("Recall of the right passage", columns, records, note)


def _lm_eval(result: dict[str, Any]) -> list[Table]:
    """Metrics as lm_eval names them, "metric,filter", with their standard errors."""
    records = []
    for task, found in result["results"].items():
        count = result.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in found.items():
            metric, _, chosen = name.partition(",")
            if isinstance(value, (int, float)) and chosen and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{chosen}")
                records.append(dict(task=task, metric=metric, value=value, standard_error=error, examples=count))
    return [records_table("Tasks of lm_eval", records, 2)]


# Columns


def _column(title: str, name: Any, form: Callable = figure, label: bool = False, width: int = 0) -> Column:
    """One field of a record, by default a figure."""
    return Column(title, lambda record: form(record.get(name)), label, width)


def _names(title: str, width: int = 0) -> Column:
    """The records' own column."""
    return _column(title, "column", lambda column: TITLES.get(column, column), label=True, width=width)


def _between(title: str, low: str, high: str, form: Callable = figure) -> Column:
    """The ends of an interval."""
    return Column(title, lambda record: ends([record.get(low), record.get(high)], form))


def _task_cell(cell: dict[str, Any] | None) -> str:
    form = lambda value: figure(value) if abs(value) < 1000 else plain_cell(value)  # noqa: E731
    return NOTHING if cell is None else with_ends(cell["value"], *cell["interval"], form)


def _short(value: float | None) -> str:
    """A perplexity; that of words is beyond all bounds where a model knows little."""
    return figure(value, 3) if value is None or not value >= 1e6 else f"{value:.3g}"


def _fields(records: Iterable[dict[Any, Any]]) -> list[Any]:
    """In the order in which they first occur."""
    return list(dict.fromkeys(name for record in records for name in record))
