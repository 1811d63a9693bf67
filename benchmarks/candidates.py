"""How much of the text to come do neighbors hold, by index? No model is needed.

The share of the tokens of C_{u+1} that end a run of 4 tokens which one of the k neighbors [N, F] of C_u has, too, over
held-out documents; and by how much each index is above the first, with an interval over documents.

    python benchmarks/candidates.py store --data heldout.jsonl --index tfidf "tfidf>continuation"
"""

import argparse

import numpy as np

from retro import Retriever
from retro.evaluation import EvaluationData, prepare
from retro.evaluation.intervals import quotient
from retro.evaluation.neighbors import random_neighbors
from retro.retrieval import Store
from retro.text.corpus import read_documents

RUN = 4


def tokens_held(data: EvaluationData, store: Store, chunks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of the chunk after each of `chunks`, the tokens that end a run which any of the rows [c, k] has."""
    values, mask = store.values(rows, 2 * store.chunk_len)
    found = []
    for chunk, ids, real in zip(chunks, values, mask, strict=True):
        text = np.concatenate([data.tokens[chunk][1 - RUN :], data.tokens[chunk + 1][data.mask[chunk + 1]]]).tolist()
        runs = {run for one, own in zip(ids, real, strict=True) for run in grams(one[own].tolist())}
        found.append(sum(run in runs for run in grams(text)))
    return np.asarray(found)


def grams(tokens: list[int]) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(RUN)), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--data", nargs="+", required=True, help="held-out documents, as for `retro build`")
    parser.add_argument("--index", nargs="+", required=True)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=0, help="of random neighbors")
    arguments = parser.parse_args()
    store, documents = Store.open(arguments.store), list(read_documents(arguments.data))
    first: dict[int, np.ndarray] = {}
    for kind in [*arguments.index, "random"]:
        retriever = Retriever(store, arguments.index[0] if kind == "random" else kind)
        data = prepare(documents, store.tokenizer, store.chunk_len, retriever, max(arguments.k), cache=False)
        rows = random_neighbors(store, data.rows, arguments.seed) if kind == "random" else data.rows
        chunks = np.flatnonzero(data.documents[1:] == data.documents[:-1])
        per_document = lambda counts: np.bincount(data.documents[chunks], counts)  # noqa: B023, E731
        tokens = per_document(data.lens[chunks + 1])
        has_any = tokens > 0
        for k in arguments.k:
            held = per_document(tokens_held(data, store, chunks, rows[chunks, :k]))
            above = held - first.setdefault(k, held)
            share, more = (100 * np.asarray(quotient(part[has_any], tokens[has_any])) for part in (held, above))
            print(
                f"{kind:24} k = {k}  {share[0]:6.2f}%   {more[0]:+6.2f} ({more[1]:+.2f} to {more[2]:+.2f})", flush=True
            )


if __name__ == "__main__":
    main()
