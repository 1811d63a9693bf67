"""Bits per token and per byte of the validation windows, during training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from retro.evaluation.scorer import MAX_LOGITS, score_batch
from retro.retrieval import Store
from retro.training.batches import count_targets, sum_over_processes
from retro.training.setup import TrainingRun
from retro.training.windows import IGNORED, Batch


def validate(run: TrainingRun) -> dict[str, float]:
    """Bits per token and per byte of the validation windows, with neighbors (on) and without (off).

    Sums in float64 over all processes, divided once. Bytes are the scored tokens' share of their documents' UTF-8 bytes
    (bytes / tokens of the document). For the figures of a finished model over whole documents see `retro evaluate`.
    """
    accelerator, model, valid = run.accelerator, run.state.model, run.valid
    modes = ("on", "off") if valid.neighbors is not None else ("off",)
    sums = dict.fromkeys((*modes, "tokens", "bytes"), 0.0)
    model.eval()
    for windows in _own_validation(run):
        batch = valid.batch(windows if len(windows) else np.zeros(1, np.int64))
        if not len(windows):  # others have one more, and a sharded model runs in step
            batch["labels"].fill_(IGNORED)
        sums["tokens"] += count_targets(batch)
        sums["bytes"] += scored_bytes(valid.store, batch)
        labels = batch.pop("labels")[:, 1:]
        lines, columns = (labels != IGNORED).nonzero(as_tuple=True)
        for mode in modes:
            given = batch if mode == "on" else {k: v for k, v in batch.items() if not k.startswith("neighbor_")}
            found = score_batch(model, given, lines, columns, labels[lines, columns])
            sums[mode] -= found.log_probs.sum(dtype=np.float64)
    totals = dict(zip(sums, sum_over_processes(accelerator, *sums.values()), strict=True))
    model.train()
    bits = {mode: totals[mode] / math.log(2) for mode in modes}
    return {
        **{f"bits_per_token_{mode}": bits[mode] / max(1, totals["tokens"]) for mode in modes},
        **{f"bits_per_byte_{mode}": bits[mode] / max(1, totals["bytes"]) for mode in modes},
        "valid_tokens": int(totals["tokens"]),
        "valid_bytes": totals["bytes"],
    }


def scored_bytes(store: Store, batch: Batch) -> float:
    """UTF-8 bytes of a batch's predicted tokens: each counts as bytes / tokens of its document."""
    predicted = batch["labels"] != IGNORED
    predicted[:, 0] = False
    documents, counts = np.unique(batch["document_ids"][predicted].numpy(), return_counts=True)
    records = [store.document(int(row)) for row in documents]
    return float(sum(count * one.num_bytes / one.num_tokens for count, one in zip(counts, records, strict=True)))


def _own_validation(run: TrainingRun) -> Iterator[np.ndarray]:
    """This process's batches of validation windows: evenly spread over the store, at most `eval_windows` in all.

    All processes have the same number of batches, of as many windows as logits leave room for; the last may be empty.
    """
    logits = run.settings.window_len * run.state.model.config.get_text_config().vocab_size
    size = max(1, min(run.settings.batch_size, MAX_LOGITS // logits))
    count = min(run.settings.eval_windows or len(run.valid), len(run.valid))
    chosen = np.linspace(0, len(run.valid) - 1, count).round().astype(np.int64)
    own = chosen[run.accelerator.process_index :: run.accelerator.num_processes]
    most = math.ceil(count / run.accelerator.num_processes)
    return (own[i : i + size] for i in range(0, most, size))
