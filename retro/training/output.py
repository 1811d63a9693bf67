"""The folder of a run: settings, metrics, checkpoints, and the trained model at the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from retro.common.files import write_text, writing
from retro.common.settings import save_settings, to_plain
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
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.state.step]
        write_text(metrics, "".join(f"{line}\n" for line in kept))
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        flat = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in to_plain(run.settings).items()
        }
        run.accelerator.init_trackers("retro", config=flat, init_kwargs={"wandb": {"dir": str(run.output)}})


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
            sync_files(aside)
        for file in aside.iterdir():
            os.replace(file, run.output / file.name)
        aside.rmdir()
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        run.accelerator.end_training()
