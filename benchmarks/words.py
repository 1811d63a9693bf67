"""Search by words: what a query costs and what it finds, over every chunk, and by rare terms with numba and without.

Below 16,384 chunks all three are the same.

CPU milliseconds a query of one thread, the median of the rounds, in turns; and the share of the exact form's best
chunks that is found. Queries are chunks of the store, as text and as tokens, whose documents are left out.

    taskset -c 0 python benchmarks/words.py store
"""

import argparse
import time
from functools import partial

import numpy as np
from made_stores import in_turns, recall, show

from retro.retrieval import Store
from retro.retrieval.search import candidates
from retro.retrieval.search.lexical import LexicalIndex, build_lexical
from retro.retrieval.search.queries import Queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--kinds", nargs="+", default=["tfidf", "bm25"])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = Store.open(arguments.store)
    drawn = np.random.default_rng(arguments.seed)
    rows = np.sort(drawn.choice(store.searchable_rows, min(arguments.queries, store.num_searchable), replace=False))
    texts, tokens = store.text(rows), store.token_lists(rows)
    excluded = [{int(document)} for document in store.document_rows(rows)]
    by_numba = candidates._by_numba
    for kind in arguments.kinds:
        exact, index = build_lexical(store, f"{kind}:exact"), build_lexical(store, kind)
        found: dict[str, np.ndarray] = {}

        def search(name: str, index: LexicalIndex, is_compiled: bool = True) -> None:
            candidates._by_numba = by_numba if is_compiled else lambda: None
            queries = Queries(store.tokenizer, texts, tokens)
            found[name] = index.search(queries, arguments.k, excluded)[0]  # noqa: B023

        ways = {"exact": (exact,), "numba": (index,), "scipy": (index, False)}
        seconds = in_turns(
            {name: partial(search, name, *how) for name, how in ways.items()}, arguments.rounds, time.process_time
        )
        lines = [
            [name, 1000 * of / len(rows), seconds["exact"] / of]
            + [recall(found[name][:, :k], found["exact"][:, :k]) for k in (2, arguments.k)]
            for name, of in seconds.items()
        ]
        columns = ["CPU ms / query", "times exact", "recall@2", f"recall@{arguments.k}"]
        show(f"{kind}, {store.num_searchable:,} chunks", columns, lines)


if __name__ == "__main__":
    main()
