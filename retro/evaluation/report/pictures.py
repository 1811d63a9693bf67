"""The plots of a report, each as an address that holds the whole picture, with its data beside it."""

from __future__ import annotations

import base64
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from retro.evaluation.bits import COLUMNS
from retro.evaluation.plots import LOOKS, OTHER_LOOKS, picture, plot_leakage, plot_sweep
from retro.evaluation.report.files import Result, TrainedModel
from retro.evaluation.tables import TITLES, Table, figures_of, records_table, tables_of
from retro.sampling import visible

_MOST_LINES = 200  # of the metrics of one run


@dataclass(frozen=True)
class Picture:
    """address: a data: address of an SVG; caption: what it shows, also for those who do not see it."""

    address: str
    caption: str
    data: Table


def picture_of(result: Result) -> Picture | None:
    """The plot of a result; None for samples and for what holds no figures."""
    value, data = result.value, [record for table in tables_of(result.value) for record in table.data]
    if result.kind == "leakage":
        caption = "Bits per byte, what RETRO[ON] gains, and chunks, over the chunks with r(C) up to a share"
        return _drawn(lambda file: plot_leakage(value, file), caption, data)
    if result.kind == "sweep":
        caption = f"Bits per byte against {value['xlabel']}; bars: {value['band']}"
        return _drawn(lambda file: plot_sweep(value, file), caption, data)
    if result.kind == "baselines":
        name = lambda row: f"{row['label']}, {_short(row['model'])}" + f", k = {row['k']}" * bool(row["k"])  # noqa: E731
        bars = [_bar(name(row), row["method"], row["bpb"], row["interval"]) for row in value["rows"]]
        return _bars(bars, "bits per byte", data)
    if result.kind == "task" and figures_of(value):
        name = figures_of(value)[0]
        bars = [_bar(TITLES.get(c, c), c, x["value"], x["interval"]) for c, x in value[name].items()]
        return _bars(bars, name.replace("_", " "))
    return None


def picture_of_bits(results: Sequence[Result]) -> Picture:
    """Bits per byte of results over the same text."""
    bars = []
    for result in results:
        value = result.value
        for column, bpb in value["bpb"].items():
            name = f"{_short(value.get('model') or result.name)}: " * (len(results) > 1) + COLUMNS[column]
            bars.append(_bar(name, column, bpb, value.get("interval", {}).get(column)))
    return _bars(bars, "bits per byte")


def picture_of_losses(models: Sequence[TrainedModel]) -> Picture | None:
    """Training loss of runs over tokens; None where no run has logged one."""
    records = []
    for model in models:
        logged = [line for line in model.metrics if "loss" in line]
        for line in logged[:: -(-len(logged) // _MOST_LINES) or 1]:
            records.append({"run": model.name, "tokens": line["tokens"], "loss": line["loss"]})
    if not records:
        return None

    def draw(file: Path) -> None:
        with picture(file) as axes:
            for name, look in zip(dict.fromkeys(record["run"] for record in records), cycle(OTHER_LOOKS)):
                own = [record for record in records if record["run"] == name]
                x, y = ([one[what] for one in own] for what in ("tokens", "loss"))
                axes.plot(x, y, label=_short(name), **look | {"marker": ""})
            axes.set(xlabel="training tokens", ylabel="training loss, nats per token")

    return _drawn(draw, "Training loss, as it was logged", records)


def _bar(name: str, column: str, value: float | int, ends: Sequence[float] | None) -> dict[str, Any]:
    low, high = (float("nan"), float("nan")) if ends is None else ends
    return {"name": name, "column": column, "value": value, "low": low, "high": high}


def _bars(bars: list[dict[str, Any]], what: str, records: list[dict[str, Any]] | None = None) -> Picture:
    """A dot for each value, with its interval."""
    known = any(not math.isnan(bar["low"]) for bar in bars)

    def draw(file: Path) -> None:
        with picture(file, size=(6.0, 0.8 + 0.27 * len(bars))) as axes:
            for place, bar in enumerate(bars):
                look = LOOKS.get(bar["column"], OTHER_LOOKS[-2]) | {"linestyle": ""}
                ends = [[max(bar["value"] - bar["low"], 0)], [max(bar["high"] - bar["value"], 0)]]
                axes.errorbar(bar["value"], place, xerr=ends, **look)
            axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars])
            axes.set(xlabel=what + "; bars: 95% intervals over documents" * known, ylim=(len(bars) - 0.5, -0.5))
            axes.grid(False, axis="y")

    caption = what[:1].upper() + what[1:] + ", with 95% intervals" * known
    return _drawn(draw, caption, bars if records is None else records)


def _drawn(draw: Callable[[Path], None], caption: str, records: list[dict[str, Any]]) -> Picture:
    """The picture that a plotting function writes."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of characters that the font has not
        file = Path(folder) / "picture.svg"
        draw(file)
        encoded = base64.b64encode(file.read_bytes()).decode()
    return Picture(f"data:image/svg+xml;base64,{encoded}", caption, records_table("", records))


def _short(name: Any) -> str:
    """The end of a path, as a picture has room for it."""
    short = "/".join(Path(visible(str(name))).parts[-2:])[-40:]
    return f" {short}" if short.startswith("_") else short  # matplotlib leaves names with _ out of legends
