"""Pictures of measurements, and the data beside them. matplotlib comes with retro-lm[eval]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retro.common.extras import check_installed
from retro.common.files import writing
from retro.evaluation.bits import COLUMNS

# told apart in grey too, by marker and line
LOOKS = {
    "lm": {"color": "#4d4d4d", "marker": "s", "linestyle": "--"},
    "retro_off": {"color": "#d55e00", "marker": "^", "linestyle": "-.", "markerfacecolor": "white"},
    "retro_on": {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    "retro_on_random": {"color": "#009e73", "marker": "D", "linestyle": ":", "markerfacecolor": "white"},
}
OTHER_LOOKS = [
    {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    {"color": "#d55e00", "marker": "s", "linestyle": "--"},
    {"color": "#009e73", "marker": "^", "linestyle": "-."},
    {"color": "#6a4c93", "marker": "D", "linestyle": ":"},
    {"color": "#4d4d4d", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
]
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # names are taken as they are
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "retro",
}


def check_plot(file: str | Path) -> None:
    """Raise ValueError, before anything is measured, if a picture cannot be written there."""
    check_installed("matplotlib", "a plot")
    file = Path(file)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the plot {file} ends in {file.suffix!r}; let it end in .png, .svg or .pdf")


@contextmanager
def picture(
    file: str | Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 3.6), **options: Any
) -> Iterator[Any]:
    """Axes to draw on (a list where there are several); at the end each line gets its legend and the file is written.

    The legend stands below the axes where all share one, otherwise at the right of each, never over the data.
    """
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
        yield axes[0] if len(axes) == 1 else axes
        named = {one: dict(zip(*reversed(one.get_legend_handles_labels()), strict=True)) for one in axes}
        lines = {label: line for names in named.values() for label, line in names.items()}
        if lines and any(set(names) == set(lines) for names in named.values()):
            fit = max(int(size[0] / (0.7 + 0.07 * max(map(len, lines)))), 1)  # inches
            ncols = math.ceil(len(lines) / math.ceil(len(lines) / fit))
            figure.legend(lines.values(), lines, loc="outside lower center", ncols=ncols)
        else:
            for one, names in ((one, names) for one, names in named.items() if names):
                one.legend(names.values(), names, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        with writing(file):
            figure.savefig(file)


def curve(
    axes: Any, places: Sequence[float | int], values: Any, label: str, look: dict[str, Any], shift: float = 0
) -> None:
    """A line through values, [n, 3], with bars between their low and high ends; `shift` points to the right, so that
    bars of several curves stand side by side.
    """
    from matplotlib.transforms import ScaledTranslation

    middle, low, high = np.array(values, float).T
    beside = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    ends = np.maximum([middle - low, high - middle], 0)  # an interval need not hold the figure
    for drawn in axes.errorbar(places, middle, ends, label=label, elinewidth=0.8, **look).get_children():
        drawn.set_transform(beside)


def plot_leakage(result: dict[str, Any], file: str | Path) -> None:
    """The paper's figure 6: bpb(alpha) of each column, what RETRO[ON] gains over each, and the chunks behind it."""
    points = result["points"]
    alphas = [100 * point["alpha"] for point in points]
    with picture(file, 3, size=(6.0, 7.0), sharex=True, height_ratios=(3, 2.4, 1)) as (bits, gains, counts):
        _columns(bits, {c: (alphas, [[p["bpb"][c], *p["interval"][c]] for p in points]) for c in points[0]["bpb"]})
        _columns(gains, {c: (alphas, [[100 * x for x in p["gain"][c]] for p in points]) for c in points[0]["gain"]})
        counts.bar(alphas, [point["chunks"] for point in points], width=6, color="#8c8c8c")
        measured = f"{result['documents']} documents, k = {result['num_neighbors']}"
        bits.set(ylabel="bits per byte", title=f"{measured}; bars: 95% intervals over documents")
        gains.axhline(0, color="black", linewidth=0.8)
        gains.set(ylabel="RETRO[ON] below it, %")
        counts.set(xlabel="chunks with at most this share of tokens in one common run, r(C), %", ylabel="chunks")
        counts.yaxis.set_major_formatter("{x:,.0f}")
        counts.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])


def plot_sweep(result: dict[str, Any], file: str | Path) -> None:
    """Bits per byte and gain over RETRO[OFF] against what was swept, on a logarithmic axis (0 included)."""
    x, points = result["x"], result["curve"]
    with picture(file, 2, size=(6.0, 5.4), sharex=True, height_ratios=(3, 2)) as (bits, gains):
        for axes, names, scale in ((bits, ("bpb", "low", "high"), 1), (gains, ("gain", "gain_low", "gain_high"), 100)):
            curves: dict[str, tuple[list, list]] = {}
            for point in sorted(points, key=lambda point: point[x]):
                if names[0] in point:
                    places, values = curves.setdefault(point["column"], ([], []))
                    places.append(point[x])
                    values.append([scale * point[name] for name in names])
            _columns(axes, curves)
        for column, reference in result["references"].items():
            look = LOOKS[column] | {"marker": ""}
            bits.axhline(reference["bpb"], label=COLUMNS[column], **look)
        bits.set(ylabel="bits per byte", title=f"{result['documents']} documents; bars: {result['band']}")
        gains.axhline(0, color="black", linewidth=0.8)
        gains.set(xlabel=result["xlabel"], ylabel="below RETRO[OFF], %")
        _logarithmic(gains, sorted({point[x] for point in points}))


def _columns(axes: Any, curves: dict[str, tuple[list, list]]) -> None:
    """The curve of each column, places and values, their bars side by side."""
    for number, (column, (places, values)) in enumerate(curves.items()):
        curve(axes, places, values, COLUMNS[column], LOOKS[column], 2.5 * (number - (len(curves) - 1) / 2))


def _logarithmic(axes: Any, places: list) -> None:
    """A logarithmic axis, linear between 0 and the smallest place above it, with a tick at each place."""
    if places[0] == 0:
        axes.set_xscale("symlog", linthresh=places[1])
    else:
        axes.set_xscale("log")
    axes.autoscale_view()
    axes.set_xticks(places, [short(place) for place in places])
    axes.set_xticks([], minor=True)


def short(number: float | int) -> str:
    """A number as the ticks of an axis have room for it: 2.5k, 10M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
