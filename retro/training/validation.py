"""Bits per token and per byte of the validation windows, during training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from retro.common.products import fast_products
from retro.retrieval import Store
from retro.training.batches import count_targets, sum_over_processes, to_device
from retro.training.setup import TrainingRun
from retro.training.windows import IGNORED, Batch


@torch.no_grad()
@fast_products()
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
        own_targets = count_targets(batch)
        sums["tokens"] += own_targets
        sums["bytes"] += scored_bytes(valid.store, batch)
        batch = to_device(batch, accelerator.device)
        for mode in modes:
            given = batch if mode == "on" else {k: v for k, v in batch.items() if not k.startswith("neighbor_")}
            sums[mode] += model(**given, return_logits=False).loss.item() * own_targets
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

    All processes have the same number of batches; the last may be empty.
    """
    count = min(run.settings.eval_windows or len(run.valid), len(run.valid))
    chosen = np.linspace(0, len(run.valid) - 1, count).round().astype(np.int64)
    own = chosen[run.accelerator.process_index :: run.accelerator.num_processes]
    most = math.ceil(count / run.accelerator.num_processes)
    return (own[i : i + run.settings.batch_size] for i in range(0, most, run.settings.batch_size))
