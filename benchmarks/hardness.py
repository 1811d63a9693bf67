"""What a search costs among keys of text, from an eighth of them to all: exact, ScaNN, faiss and routed lists.

Each index is tuned to recall@10 by 1,024 keys that it does not hold (retro.retrieval.search.hardness). How even that
recall is, is told by the tenth of these queries whose 10th neighbor is farthest (the sparsest regions), or nearest,
and by their routes: of the groups of the routed index in which they fall, the tenth that are found worst.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from made_stores import show
from synthetic import TreeKeys

from retro.evaluation.plots import OTHER_LOOKS, picture, short
from retro.retrieval import Store
from retro.retrieval.search.dense import Effort, QuerySample
from retro.retrieval.search.engines.clustering import k_means
from retro.retrieval.search.hardness import Cost, fit, measure, sample_keys

RECALL = 0.95
_GROUPS = 50


def text(arguments: argparse.Namespace) -> dict[str, Any]:
    """Points, exponents and the recall of the worst tenths; drawn if --text-plot is given."""
    keys = keys_of(arguments)
    points: list[dict[str, Any]] = []
    for cost, segment, sample in measure(arguments.text_kinds, keys, RECALL, arguments.key_dtype, settings):
        points.append(vars(cost) | ({} if segment is None else worst_tenths(cost, sample)))
        print(
            ", ".join(f"{n} {x:.4g}" if isinstance(x, float) else f"{n} {x}" for n, x in points[-1].items()), flush=True
        )
    lines, exponents = [], {}
    for kind in arguments.text_kinds:
        own = [point for point in points if point["kind"] == kind]
        exponents[kind] = {
            name: vars(fit([point["rows"] for point in own], [point[name] for point in own]))
            for name in ("rows_compared", "cpu_ms")
        }
        powers = [f"{e['exponent']:.2f} +- {(e['high'] - e['low']) / 2:.2f}" for e in exponents[kind].values()]
        largest = own[0]
        lines.append([kind, largest["rows_compared"], powers[0], largest["cpu_ms"], powers[1]])
        lines[-1] += [float(largest.get(name, 1.0)) for name in WORST]
    columns = ["rows compared", "exponent", "CPU ms", "exponent", *WORST]
    show(f"{points[0]['rows']:,} keys of text, recall@10 {RECALL}", columns, lines)
    if arguments.text_plot:
        draw(points, arguments.text_plot)
    return {"points": points, "exponents": exponents}


def keys_of(arguments: argparse.Namespace) -> np.ndarray:
    """Those of a store, else made-up ones that are about as hard."""
    if arguments.store:
        return sample_keys(Store.open(arguments.store), arguments.text_rows, arguments.seed)
    return TreeKeys(arguments.dim, arguments.seed).rows(0, arguments.text_rows)


def settings(kind: str, rows: int) -> dict[str, Any]:
    """One layout for all sizes, that which ScaNN and faiss have from 100,000 rows on."""
    trees = {"scann": {"codes": "ah-float32", "leaves": isqrt(rows)}}
    return (trees | {"faiss": {"codes": "ivf-flat", "lists": 4 * isqrt(rows)}}).get(kind, {})


WORST = ("groups", "sparse", "dense")


def worst_tenths(cost: Cost, sample: QuerySample) -> dict[str, float]:
    """Recall of the queries in the worst tenth of groups, and in the sparsest and densest tenth of the space."""
    each = sample.recall_of_each(Effort(cost.lists, cost.candidates))
    by_density = each[np.argsort(sample.distances, kind="stable")]
    tenth = len(each) // 10
    centroids = k_means(sample.queries, _GROUPS, 8)
    groups = np.argmin(np.square(centroids).sum(1) - 2 * sample.queries @ centroids.T, axis=1)
    means = np.sort([each[groups == group].mean() for group in np.unique(groups)])
    found = (means[: max(len(means) // 10, 1)].mean(), by_density[-tenth:].mean(), by_density[:tenth].mean())
    return dict(zip(WORST, map(float, found), strict=True))


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """Rows compared and CPU ms of a query, by the rows of the store."""
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = {"rows_compared": "rows compared by a search", "cpu_ms": "CPU ms of a search"}
    with picture(file, columns=2, size=(7.0, 3.2)) as panels:
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            for look, kind in zip(cycle(OTHER_LOOKS), dict.fromkeys(point["kind"] for point in points)):
                own = [(point["rows"], point[name]) for point in points if point["kind"] == kind]
                axes.plot(*zip(*own, strict=True), label=kind, **look)
            axes.set(xlabel="keys of the store", ylabel=label, xscale="log", yscale="log")
            places = sorted({point["rows"] for point in points})[::-2]
            axes.set_xticks(places, [short(place) for place in places])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter(lambda number, _: f"{number:,g}")
            axes.yaxis.set_minor_formatter(lambda *_: "")
