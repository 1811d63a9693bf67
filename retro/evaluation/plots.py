"""Pictures of measurements, and the data beside them. matplotlib comes with retro-lm[eval]."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro.evaluation.bits import COLUMNS

COLORS = {"lm": "tab:gray", "retro_off": "tab:orange", "retro_on": "tab:blue", "retro_on_random": "tab:green"}


def check_plot(file: str | Path) -> None:
    """Raise ValueError, before anything is measured, if a picture cannot be written there."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib, which is not installed; pip install retro-lm[eval]")
    file = Path(file)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the plot {file} ends in {file.suffix!r}; let it end in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise ValueError(f"the folder {file.parent} of the plot is not there; make it first")


@contextmanager
def picture(file: str | Path, rows: int = 1, size: tuple[float, float] = (7.0, 4.5), **options: Any) -> Iterator[Any]:
    """Axes to draw on (a list where there are several rows); the picture is written at the end."""
    check_plot(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, **options)
    yield axes
    for one in axes if rows > 1 else [axes]:
        one.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def plot_leakage(result: dict[str, Any], file: str | Path) -> None:
    """The paper's figure 6: bpb(alpha) of each column, what RETRO[ON] gains over each, and the chunks behind it."""
    points = result["points"]
    alphas = [100 * point["alpha"] for point in points]
    with picture(file, 3, (7.0, 8.0), sharex=True, height_ratios=(3, 2, 1)) as (curves, gains, counts):
        for column in points[0]["bpb"]:
            _curve(curves, column, alphas, [[p["bpb"][column], *p["interval"][column]] for p in points])
        for column in points[0]["gain"]:
            _curve(gains, column, alphas, [[100 * x for x in p["gain"][column]] for p in points])
        counts.bar(alphas, [point["chunks"] for point in points], width=6, color="tab:gray")
        curves.set(ylabel="bits per byte", title=f"{result['documents']} documents, k = {result['num_neighbors']}")
        curves.legend()
        gains.axhline(0, color="black", linewidth=0.8)
        gains.set(ylabel="RETRO[ON] below it, %")
        counts.set(xlabel="chunks with at most this share of tokens in one common run, r(C), %", ylabel="chunks")
        counts.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])


def plot_sweep(result: dict[str, Any], file: str | Path) -> None:
    """Bits per byte and gain over RETRO[OFF] against what was swept, on a logarithmic axis (0 included)."""
    x, curve = result["x"], result["curve"]
    with picture(file, 2, (7.0, 6.0), sharex=True, height_ratios=(3, 2)) as (bits, gains):
        for column in dict.fromkeys(point["column"] for point in curve):
            points = sorted((point for point in curve if point["column"] == column), key=lambda point: point[x])
            places = [point[x] for point in points]
            _curve(bits, column, places, [[point[name] for name in ("bpb", "low", "high")] for point in points])
            if "gain" in points[0]:
                ends = [[100 * point[name] for name in ("gain", "gain_low", "gain_high")] for point in points]
                _curve(gains, column, places, ends)
        for column, reference in result["references"].items():
            bits.axhline(reference["bpb"], color=COLORS[column], linestyle="--", label=COLUMNS[column])
        bits.set(ylabel="bits per byte", title=f"{result['documents']} documents; band: {result['band']}")
        bits.legend()
        gains.axhline(0, color="black", linewidth=0.8)
        gains.set(xlabel=result["xlabel"], ylabel="below RETRO[OFF], %")
        _logarithmic(gains, sorted({point[x] for point in curve}))


def _logarithmic(axes: Any, places: list) -> None:
    """A logarithmic axis, linear between 0 and the smallest place above it, with a tick at each place."""
    if places[0] == 0:
        axes.set_xscale("symlog", linthresh=places[1])
    else:
        axes.set_xscale("log")
    axes.set_xticks(places, [_short(place) for place in places])
    axes.set_xticks([], minor=True)


def _short(number: float | int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _curve(axes: Any, column: str, places: list, values: list[list[float]]) -> None:
    """A line through values with the band between their low and high ends."""
    middle, low, high = zip(*values, strict=True)
    axes.plot(places, middle, marker="o", color=COLORS[column], label=COLUMNS[column])
    axes.fill_between(places, low, high, alpha=0.12, color=COLORS[column], linewidth=0)


def plain(value: Any) -> Any:
    """A result as JSON can hold it: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: str | Path, result: dict[str, Any]) -> None:
    """A result as JSON."""
    text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)
    Path(file).write_text(text + "\n", encoding="utf-8")


def write_csv(file: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Flat records as CSV, the columns in the order in which they first occur."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(plain(list(rows)))
