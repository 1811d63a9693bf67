"""The folder of a run: settings, metrics, checkpoints, and the trained model at the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from retro.common.files import read_text, write_text, writing
from retro.common.records import SUMS_FILE, forget_sums, save_sums
from retro.common.settings import save_settings, to_plain
from retro.common.values import CountOrZero, check_value, shown
from retro.provenance import write_provenance
from retro.training.checkpoint import save_checkpoint, sync_files
from retro.training.setup import TrainingRun, without_loading_bars
from retro.training.sharding import whole_weights


def prepare_output(run: TrainingRun) -> None:
    """Make the output folder, write the settings, and cut from metrics.jsonl what comes after the state's step."""
    if run.accelerator.is_main_process:
        run.output.mkdir(parents=True, exist_ok=True)
        save_settings(run.settings, run.output / "config.yaml")
        metrics = run.output / "metrics.jsonl"
        kept = [line for line in read_metrics(metrics) if line["step"] <= run.state.step]
        write_text(metrics, "".join(f"{json.dumps(line)}\n" for line in kept))
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        flat = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in to_plain(run.settings).items()
        }
        run.accelerator.init_trackers("retro", config=flat, init_kwargs={"wandb": {"dir": str(run.output)}})


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl but one that a killed run has left unfinished; ValueError names one that is none."""
    lines = enumerate(read_text(file).splitlines() if file.is_file() else [], start=1)
    return [_metrics(f"{file}, line {number}", line) for number, line in lines if line.endswith("}")]


def _metrics(where: str, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        check_value("step", found["step"], CountOrZero)
        return found
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{where}: {shown(line)} is no line of metrics; delete it.") from None


def log_metrics(run: TrainingRun, values: dict[str, float]) -> dict[str, float]:
    """One line of metrics.jsonl, which is returned, and the same for the tracker."""
    state = run.state
    line = {"step": state.step, "tokens": state.tokens, **values, "elapsed_seconds": round(state.elapsed_seconds, 3)}
    if run.accelerator.is_main_process:
        file = run.output / "metrics.jsonl"
        with writing(file), open(file, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
    if run.settings.tracker != "none":
        run.accelerator.log(values, step=state.step)
    return line


def save(run: TrainingRun) -> Path:
    """Write a checkpoint of the state."""
    weights = whole_weights(run.state.model, keep=run.accelerator.is_main_process)
    return save_checkpoint(
        run.output,
        run.state,
        run.accelerator,
        run.identity,
        lambda folder: write_model(run, folder, weights),
        run.settings.keep_checkpoints,
    )


def write_model(run: TrainingRun, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """The trained folder: model, tokenizer, resolved settings and where it comes from.

    weights: of a model that is sharded.
    """
    with without_loading_bars():
        run.state.model.save_pretrained(folder, state_dict=weights)
    run.store.tokenizer.save_pretrained(folder)
    save_settings(run.settings, folder / "config.yaml")
    write_provenance(folder, run.store, run.loader.windows.index)


def finish(run: TrainingRun) -> None:
    """Put the trained model into the output folder itself, each file written aside and renamed."""
    weights = whole_weights(run.state.model, keep=run.accelerator.is_main_process)
    if run.accelerator.is_main_process:
        aside = run.output / "writing-model"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with writing(aside):
            write_model(run, aside, weights)
            save_sums(aside)
            sync_files(aside)
        forget_sums(run.output)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == SUMS_FILE):
            os.replace(file, run.output / file.name)
        aside.rmdir()
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        run.accelerator.end_training()
