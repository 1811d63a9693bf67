"""What a datastore is worth: bits per byte of held-out text with and without it, and how the gain grows with its size.

    python examples/evaluate_datastore.py MODEL STORE HELD_OUT [PLOT]
    python examples/evaluate_datastore.py demo/retro demo/store demo/valid.jsonl growth.svg

Nothing is trained: MODEL is a trained RETRO or a fitted base, STORE any datastore in its tokens, HELD_OUT text that
the model has not seen. Read three things: RETRO[ON] against RETRO[OFF] is the gain; against random neighbors, what of
it the search brings; over the chunks with r <= 12.5%, what of it is not copying. Intervals are 95% over documents, so
that few documents have wide ones.

It costs some 10 passes over the held-out text: 40 s for 99,008 tokens and the demo's model on two CPU cores, and as
much again for each share of the datastore and each draw of it.
What to change: INDEX (a fitted base of fit_base.py reads by "tfidf"), SHARES and DRAWS for a finer curve,
num_neighbors= in both measurements for another k. A store that may hold the held-out text itself is built with
decontaminate=[HELD_OUT].
"""

import sys

import retro
from retro.evaluation import ScoringSettings, sweep_datastore, table_text
from retro.evaluation.plots import plot_sweep

INDEX = "exact"  # or "tfidf": by words
SHARES = (1 / 16, 1 / 4, 1.0)
DRAWS = 3  # of each share below 1


def main(model: str, store: str, held_out: str, plot: str | None = None) -> None:
    model, _, retriever = retro.load(model, store, index=INDEX)
    documents = list(retro.read_documents([held_out]))

    # the whole datastore: RETRO[OFF], RETRO[ON], RETRO[ON] with random neighbors
    print(table_text(retro.bits_per_byte(model, documents, retriever, scoring=ScoringSettings(progress=True))))

    # shares of its documents; nothing is built again
    growth = sweep_datastore(model, documents, retriever.store, SHARES, DRAWS, index=INDEX)
    print(table_text(growth))
    if plot:
        plot_sweep(growth, plot)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else print(__doc__)
