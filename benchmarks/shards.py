"""How many of the shards of a distributed search a query asks: lists placed by similarity, and dealt out at random."""

import argparse
from typing import Any

import numpy as np
from made_stores import made_store, queries_of, show

from retro.retrieval import Store, build_index
from retro.retrieval.search.gathering import open_divided
from retro.retrieval.search.index import served_by
from retro.retrieval.search.placement import plan_shards


def shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mean and largest number of shards that a query asks, by how many there are; of --store, or made-up keys."""
    store = Store.open(arguments.store) if arguments.store else made_store(arguments, arguments.rows)
    index, points = build_index(store, "routed"), []
    queries = drawn_keys(store, arguments) if arguments.store else queries_of(arguments, arguments.rows)
    for count in arguments.shards:
        plan = plan_shards(store, "routed", count)
        segments = open_divided(store, "routed", served_by(store, "routed"), plan)
        asked = {
            "placed": np.concatenate([placed(segment, queries) for segment in segments], 1),
            "random": np.concatenate([placed(segment, queries, arguments.seed) for segment in segments], 1),
        }
        counts = {name: distinct(found) for name, found in asked.items()}
        sizes = [sum(len(groups) for *_, groups in part["routed"].lists) for part in plan]
        points.append({"shards": count, "groups_of_shards": sizes, "most": int(counts["placed"].max())})
        points[-1] |= {name: float(found.mean()) for name, found in counts.items()}
    lines = [[f"{p['shards']} shards", p["placed"], p["most"], p["random"]] for p in points]
    show(f"{store.num_chunks:,} chunks, recall {index.recall:.3f}", ["asked", "most", "placed at random"], lines)
    return {"rows": store.num_chunks, "recall": index.recall, "points": points}


def drawn_keys(store: Store, arguments: argparse.Namespace) -> np.ndarray:
    """Keys of some chunks."""
    return store.keys(np.sort(np.random.default_rng(arguments.seed).choice(store.num_chunks, arguments.queries)))


def placed(segment: Any, queries: np.ndarray, seed: int | None = None) -> np.ndarray:
    """The shard of every list that a query visits, -1 for none; with a seed, as if groups were dealt out by lot."""
    of_list = segment.shard_of_list
    if seed is not None:
        groups = segment.engine.group_of_list
        of_group = np.empty(groups.max() + 1, np.int64)
        of_group[groups] = of_list[:-1]
        of_list = np.append(np.random.default_rng(seed).permutation(of_group)[groups], -1)
    return of_list[segment.engine.route(queries, segment.effort.lists)]


def distinct(found: np.ndarray) -> np.ndarray:
    """How many different numbers there are in each row, without -1."""
    found = np.sort(found, axis=1)
    return ((np.diff(found, axis=1, prepend=-1) != 0) & (found >= 0)).sum(1)
