"""What a run says of itself: at its beginning, every `log_every` steps where no bar shows them, and at its end."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from typing import Any

from retro.training.output import read_metrics
from retro.training.settings import FinetuneSettings
from retro.training.setup import TrainingRun

logger = logging.getLogger(__name__)
_SHOWN = ("loss", "lr", "tokens_per_second", "bits_per_byte_on", "bits_per_byte_off")


def speak() -> None:
    """Let runs of this process say what they do, on standard error."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)


def say_begin(run: TrainingRun) -> None:
    """How long the run is, on what, and whether anything is measured on the way."""
    if not run.accelerator.is_main_process:
        return
    steps = f"{run.num_steps:,} steps of {run.loader.windows_per_step * run.settings.window_len:,} tokens"
    begun = f", from step {run.state.step:,} on" if run.state.step else ""
    logger.info("%s: training on %s, %s%s", run.output, run.accelerator.device, steps, begun)
    if run.valid is None and not isinstance(run.settings, FinetuneSettings):
        logger.info("nothing is measured on the way; give valid_store=STORE, a store of held-out documents, for that")


def say_line(run: TrainingRun, progress: Any, line: dict[str, float]) -> None:
    """A line of metrics.jsonl, where no bar is shown."""
    if not (progress.disable and run.accelerator.is_main_process):
        return
    done = line["step"] / max(1, run.num_steps)
    left = timedelta(seconds=round(line["elapsed_seconds"] / done - line["elapsed_seconds"]))
    shown = ", ".join(f"{name.replace('_', ' ')} {line[name]:.4g}" for name in _SHOWN if name in line)
    logger.info("step %d of %d: %s; %s left", line["step"], run.num_steps, shown, left)


def say_end(run: TrainingRun) -> None:
    """Where the model is, its last loss, how long it took, and what to do next."""
    if not run.accelerator.is_main_process:
        return
    lines = read_metrics(run.output / "metrics.jsonl")
    loss = next((f"loss {line['loss']:.3f}, " for line in reversed(lines) if "loss" in line), "")
    spent = timedelta(seconds=round(run.state.elapsed_seconds))
    store = f" --store {run.settings.store}" if run.settings.retrieval else ""
    logger.info("%s: the model is trained, %d steps, %s%s", run.output, run.state.step, loss, spent)
    logger.info(
        "next: retro evaluate %s%s --data HELDOUT, or retro generate %s TEXT%s",
        run.output,
        store,
        run.output,
        store or " --no-retrieval",
    )
