"""The training loop: set up, fit, validate. One process or many (accelerate), on CPU or GPU.

output/
  config.yaml                the resolved settings
  metrics.jsonl              one line per log or evaluation
  checkpoints/step-*/        the newest states (see retro.train.checkpoint)
  config.json  model.safetensors  tokenizer*  retro.json      the trained model, when the run is done
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from retro.data import IGNORED, Batch, Loader, Windows, check_window
from retro.model import RetroForCausalLM
from retro.products import fast_products
from retro.provenance import write_provenance
from retro.retrieval import NeighborTable, Store, open_neighbors
from retro.settings import save_settings, to_plain
from retro.train.checkpoint import (
    TrainState,
    check_identity,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    sync_files,
)
from retro.train.memory import keep_freed_memory
from retro.train.optimizer import make_optimizer
from retro.train.settings import FREE_FIELDS, TrainSettings, learning_rate
from retro.train.sharding import shard, whole, whole_weights

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What does not change during a run, and its state."""

    settings: TrainSettings
    accelerator: Accelerator
    store: Store
    loader: Loader
    valid: Windows | None
    wrapped: nn.Module  # the state's model as accelerate runs it
    state: TrainState
    identity: dict[str, Any]
    output: Path
    num_steps: int


# Setup


def setup(
    settings: TrainSettings,
    make_config: Callable[[TrainSettings, Store], PreTrainedConfig],
    model_class: type[PreTrainedModel],
    make_windows: Callable[[TrainSettings, Store, int], Windows] | None = None,
) -> Run:
    """Open the data, make the model or read it from the last checkpoint of the output folder, check that both fit.

    make_config: the model's configuration for a store. model_class: makes a model of it, and reads checkpoints.
    make_windows: what is trained on, from settings, store and r, if not the windows of the store.
    Raises ValueError for data or a checkpoint that do not fit the settings.
    """
    store = Store.open(settings.store)
    check_window(settings.window_len, store.chunk_len)
    config = make_config(settings, store)
    windows = (make_windows or training_windows)(settings, store, config.retrieved_len)
    valid = validation_windows(settings, store, config.retrieved_len)
    accelerator, output = make_accelerator(settings), Path(settings.output)
    identity = run_identity(settings, windows, accelerator.num_processes)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    set_seed(settings.seed)
    model = make_model(settings, config, model_class, checkpoint)
    wrapped = spread(model, settings, accelerator)
    state = TrainState(model, make_optimizer(model, settings))
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, accelerator.process_index)
        logger.info("going on from %s", checkpoint)
    loader = make_loader(settings, windows, accelerator, state.position)
    num_steps = settings.num_steps(accelerator.num_processes)
    return Run(settings, accelerator, store, loader, valid, wrapped, state, identity, output, num_steps)


def make_model(
    settings: TrainSettings, config: PreTrainedConfig, model_class: type[PreTrainedModel], checkpoint: Path | None
) -> PreTrainedModel:
    """A model of random weights, or that of a checkpoint, in float32."""
    if checkpoint is None:
        model = model_class(config)
    else:
        with without_loading_bars():
            model = model_class.from_pretrained(checkpoint, dtype=torch.float32)
    if settings.gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def spread(model: PreTrainedModel, settings: TrainSettings, accelerator: Accelerator) -> nn.Module:
    """The model as the processes run it together: each a whole one, or sharded in place."""
    if not settings.fsdp:
        return accelerator.prepare_model(model)
    if not isinstance(model, RetroForCausalLM):
        raise ValueError(f"fsdp is true, and {type(model).__name__} is no RetroForCausalLM; leave it out")
    if accelerator.num_processes == 1:
        raise ValueError("fsdp is true with a single process; launch several, or leave it out")
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)  # device and autocast alone
    shard(model, accelerator.device.type)
    return wrapped


def make_loader(
    settings: TrainSettings, windows: Windows, accelerator: Accelerator, position: dict[str, int]
) -> Loader:
    """This process's batches from a position on."""
    return Loader(
        windows,
        settings.batch_size,
        seed=settings.seed,
        accumulation=settings.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        position=position,
        drop_neighbors=settings.drop_neighbors,
    )


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Device, processes and precision as accelerate finds them, with the settings' tracker."""
    tracker = None if settings.tracker == "none" else settings.tracker
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # several processes without a GPU then talk by gloo
            mixed_precision="no" if settings.mixed_precision == "none" else settings.mixed_precision,
            log_with=tracker,
            project_dir=settings.output,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error
    if tracker is not None and tracker not in [getattr(one, "value", one) for one in accelerator.log_with]:
        raise ValueError(f"tracker: {tracker} is not installed; pip install {tracker}, or take tracker=none")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}, so that each would "
            "train alone into the same folder; launch with torchrun or `accelerate launch`"
        )
    return accelerator


def run_identity(settings: TrainSettings, windows: Windows, world_size: int) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint: all but FREE_FIELDS, and the data by content."""
    fixed = {name: value for name, value in to_plain(settings).items() if name not in FREE_FIELDS}
    table = None if windows.neighbors is None else windows.neighbors.record
    return {
        **fixed,
        "store_fingerprint": windows.store.fingerprint,
        "neighbor_table": table and {name: table[name] for name in ("exclude", "index")},
        "windows_per_step": settings.windows_per_step(world_size),
    }


def training_windows(settings: TrainSettings, store: Store, retrieved_len: int) -> Windows:
    """The windows of the store to train on."""
    table = open_neighbors(store, k=settings.num_neighbors, index=settings.index) if settings.retrieval else None
    return _windows(settings, store, table, store, retrieved_len)


def validation_windows(settings: TrainSettings, store: Store, retrieved_len: int) -> Windows | None:
    """The windows of the validation store, with neighbors in the store to train on; None without a validation store."""
    if settings.valid_store is None:
        return None
    valid = Store.open(settings.valid_store)
    if valid.tokenizer_fingerprint != store.tokenizer_fingerprint or valid.chunk_len != store.chunk_len:
        raise ValueError(
            f"valid_store {settings.valid_store} and store {settings.store} differ in tokenizer or chunk length; "
            "build both with the same"
        )
    table = open_neighbors(store, valid, settings.num_neighbors, index=settings.index) if settings.retrieval else None
    return _windows(settings, valid, table, store, retrieved_len)


def _windows(
    settings: TrainSettings, store: Store, table: NeighborTable | None, neighbor_store: Store, retrieved_len: int
) -> Windows:
    return Windows(
        store,
        table,
        window_len=settings.window_len,
        num_neighbors=None if table is None else settings.num_neighbors,
        retrieved_len=retrieved_len,
        neighbor_store=neighbor_store,
        random_seed=settings.seed if settings.random_neighbors else None,
    )


# Fit


def fit(run: Run) -> bool:
    """Train to the last step; True if it was reached, False if SIGTERM or SIGINT asked to stop (the state is saved).

    Raises ValueError, naming the step, if the loss is not finite; the last good checkpoint stays.
    """
    settings, state, accelerator = run.settings, run.state, run.accelerator
    prepare_output(run)
    started_at, elapsed_before = time.monotonic(), state.elapsed_seconds
    last_saved, since_log = state.step, Pace()
    with stop_requests() as stop, _progress(run) as progress, closing(iter(run.loader)) as batches:
        while state.step < run.num_steps:
            with since_log:
                micro_batches = next(batches)
                num_targets, stopping = _agree(accelerator, micro_batches, stop.is_requested)
                if stopping:
                    break
                grad_norm = train_step(run, micro_batches, num_targets)
            state.position = dict(run.loader.position)
            state.elapsed_seconds = elapsed_before + time.monotonic() - started_at
            progress.update()
            if _is_due(run, settings.log_every):
                _log_training(run, progress, grad_norm, since_log)
            if run.valid is not None and _is_due(run, settings.eval_every):
                log_metrics(run, validate(run))
            if _is_due(run, settings.save_every):
                save(run)
                last_saved = state.step
        if state.step > last_saved:
            save(run)
    if state.step < run.num_steps:
        logger.info("stopped after step %d as asked", state.step)
        return False
    finish(run)
    return True


@fast_products()
def train_step(run: Run, micro_batches: list[Batch], num_targets: int) -> float:
    """One step of the optimizer: the loss is the mean over all predicted tokens of all processes' micro-batches.

    The model gives the mean over its own micro-batch, and data-parallel gradients are averaged over processes; so each
    micro-batch is weighted by its tokens * processes / tokens of the step. Returns the gradient's norm before clipping.
    """
    state, accelerator = run.state, run.accelerator
    rate = learning_rate(state.step, run.num_steps, run.settings)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    run.wrapped.train()
    losses = []
    for number, batch in enumerate(micro_batches, start=1):
        own_targets = count_targets(batch)
        with nullcontext() if number == len(micro_batches) else accelerator.no_sync(run.wrapped):
            loss = run.wrapped(**_to(batch, accelerator.device)).loss
            accelerator.backward(loss * (own_targets * accelerator.num_processes / max(1, num_targets)))
        losses.append((loss.detach(), own_targets))
    grad_norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), run.settings.max_grad_norm)).item()
    (loss_sum,) = sum_over_processes(accelerator, sum(loss.item() * weight for loss, weight in losses))
    _require_finite(run, loss_sum / max(1, num_targets), grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * accelerator.num_processes
    state.loss_sum, state.loss_tokens = state.loss_sum + loss_sum, state.loss_tokens + num_targets
    return grad_norm


def count_targets(batch: Batch) -> int:
    """Predicted tokens of a batch; the first of a window never is one."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _agree(accelerator: Accelerator, micro_batches: list[Batch], stop_requested: bool) -> tuple[int, bool]:
    """Predicted tokens of all processes in this step, and whether any of them was asked to stop."""
    own_targets = sum(map(count_targets, micro_batches))
    total, stops = sum_over_processes(accelerator, own_targets, stop_requested)
    return int(total), stops > 0


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all processes, in float64."""
    device = accelerator.device if accelerator.num_processes > 1 else "cpu"
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum").tolist()


def _require_finite(run: Run, loss: float, grad_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    kept = last_checkpoint(run.output)
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    raise ValueError(
        f"{what} at step {run.state.step + 1}, so the run stops before its weights are spoiled; "
        f"{f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}; "
        "try a lower lr or a longer warm-up"
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# Validate


@torch.no_grad()
@fast_products()
def validate(run: Run) -> dict[str, float]:
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
        batch = _to(batch, accelerator.device)
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


def _own_validation(run: Run) -> Iterator[np.ndarray]:
    """This process's batches of validation windows: evenly spread over the store, at most `eval_windows` in all.

    All processes have the same number of batches; the last may be empty.
    """
    count = min(run.settings.eval_windows or len(run.valid), len(run.valid))
    chosen = np.linspace(0, len(run.valid) - 1, count).round().astype(np.int64)
    own = chosen[run.accelerator.process_index :: run.accelerator.num_processes]
    most = math.ceil(count / run.accelerator.num_processes)
    return (own[i : i + run.settings.batch_size] for i in range(0, most, run.settings.batch_size))


# Output


def prepare_output(run: Run) -> None:
    """Make the output folder, write the settings, and cut from metrics.jsonl what comes after the state's step."""
    if run.accelerator.is_main_process:
        run.output.mkdir(parents=True, exist_ok=True)
        save_settings(run.settings, run.output / "config.yaml")
        metrics = run.output / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.state.step]
        metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        flat = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in to_plain(run.settings).items()
        }
        run.accelerator.init_trackers("retro", config=flat, init_kwargs={"wandb": {"dir": str(run.output)}})


def log_metrics(run: Run, values: dict[str, float]) -> None:
    """One line of metrics.jsonl, and the same for the tracker."""
    state = run.state
    line = {"step": state.step, "tokens": state.tokens, **values, "elapsed_seconds": round(state.elapsed_seconds, 3)}
    if run.accelerator.is_main_process:
        with open(run.output / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if run.settings.tracker != "none":
        run.accelerator.log(values, step=state.step)


def save(run: Run) -> Path:
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


def write_model(run: Run, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """The trained folder: model, tokenizer, resolved settings and where it comes from.

    weights: of a model that is sharded.
    """
    with without_loading_bars():
        run.state.model.save_pretrained(folder, state_dict=weights)
    run.store.tokenizer.save_pretrained(folder)
    save_settings(run.settings, folder / "config.yaml")
    write_provenance(folder, run.store, run.loader.windows.index)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """transformers' own progress bars stay away from the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def finish(run: Run) -> None:
    """Put the trained model into the output folder itself, each file written aside and renamed."""
    weights = whole_weights(run.state.model, keep=run.accelerator.is_main_process)
    if run.accelerator.is_main_process:
        aside = run.output / "writing-model"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_model(run, aside, weights)
        sync_files(aside)
        for file in aside.iterdir():
            os.replace(file, run.output / file.name)
        aside.rmdir()
    run.accelerator.wait_for_everyone()
    if run.settings.tracker != "none":
        run.accelerator.end_training()


def _log_training(run: Run, progress: tqdm, grad_norm: float, pace: Pace) -> None:
    """Log the mean loss over the tokens since the last line, and start the next line."""
    state = run.state
    loss, rate = state.loss_sum / max(1, state.loss_tokens), learning_rate(state.step - 1, run.num_steps, run.settings)
    tokens = pace.steps * run.loader.windows_per_step * run.settings.window_len
    speed = round(tokens / max(1e-9, pace.seconds), 1)
    log_metrics(run, {"loss": loss, "lr": rate, "grad_norm": grad_norm, "tokens_per_second": speed})
    state.loss_sum, state.loss_tokens, pace.steps, pace.seconds = 0.0, 0, 0, 0.0
    progress.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{speed:,.0f}", refresh=False)


@dataclass
class Pace:
    """Steps and the seconds spent in them, without evaluation and saving."""

    steps: int = 0
    seconds: float = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *raised: Any) -> None:
        self.steps += 1
        self.seconds += time.monotonic() - self._entered


def _is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.num_steps


def _progress(run: Run) -> tqdm:
    hidden = not run.accelerator.is_main_process
    return tqdm(total=run.num_steps, initial=run.state.step, unit="step", desc="train", disable=hidden or None)


class StopRequest:
    """Whether a signal has asked the run to stop."""

    is_requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGTERM and the first SIGINT ask the run to stop after its step; a second SIGINT interrupts at once."""
    request, before = StopRequest(), {}

    def ask(number: int, frame: Any) -> None:
        request.is_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        logger.warning("not in the main thread: SIGTERM and SIGINT will not save a checkpoint")
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[str, Sequence[str]], bool]) -> int:
    """Run a recipe as a script: its arguments are CONFIG key=value ...; a user's error is one line and exit code 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: {Path(sys.argv[0]).name} CONFIG [key=value ...]", file=sys.stderr)
        return 0 if len(sys.argv) > 1 else 2
    try:
        if not main(sys.argv[1], sys.argv[2:]):
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
