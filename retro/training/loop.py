"""The training loop over what `setup` gives. One process or many (accelerate), on CPU or GPU.

output/
  config.yaml                the resolved settings
  metrics.jsonl              one line per log or evaluation
  checkpoints/step-*/        the newest states (see retro.training.checkpoint)
  config.json  model.safetensors  tokenizer*  retro.json      the trained model, when the run is done
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from retro.common.products import fast_products
from retro.training.batches import count_targets, sum_over_processes, to_device
from retro.training.checkpoint import clear_leftovers, last_checkpoint
from retro.training.optimizer import step_if_finite
from retro.training.output import finish, log_metrics, prepare_output, save
from retro.training.place import held
from retro.training.sayings import say_begin, say_end, say_line
from retro.training.settings import learning_rate
from retro.training.setup import TrainingRun
from retro.training.sharding import whole
from retro.training.unread import ReadStep, StepResult
from retro.training.validation import validate
from retro.training.windows import Batch

logger = logging.getLogger(__name__)


def fit(run: TrainingRun) -> bool:
    """Train to the last step; True if it was reached, False if SIGTERM or SIGINT asked to stop (the state is saved).

    Raises ValueError, naming the step, if a loss or a gradient is not finite: at the next log, evaluation or
    checkpoint, since nobody looks at the numbers before. The last good checkpoint stays. Also if another run is writing
    the same output.
    """
    with held(run.output) if run.accelerator.is_main_process else nullcontext():
        return _fit(run)


def _fit(run: TrainingRun) -> bool:
    settings, state, accelerator = run.settings, run.state, run.accelerator
    if accelerator.is_main_process:
        clear_leftovers(run.output)
    prepare_output(run)
    intervals = settings.log_every, settings.eval_every, settings.save_every
    say_begin(run)
    started_at, elapsed_before = time.monotonic(), state.elapsed_seconds
    last_saved, since_log = state.step, StepTimer()
    with stop_requests() as stop, _progress(run) as progress, closing(iter(run.loader)) as batches:
        while state.step < run.num_steps:
            with since_log:
                micro_batches = next(batches)
                num_targets, stopping = _agree(accelerator, micro_batches, stop.is_requested)
                if stopping:
                    break
                train_step(run, micro_batches, num_targets)
                state.position = dict(run.loader.position)
                logs, evaluates, saves = (_is_due(run, every) for every in intervals)
                grad_norm = read_results(run) if logs or evaluates or saves else None
            state.elapsed_seconds = elapsed_before + time.monotonic() - started_at
            progress.update()
            if logs:
                _log_training(run, progress, grad_norm, since_log)
            if run.valid is not None and evaluates:
                say_line(run, progress, log_metrics(run, validate(run)))
            if saves:
                save(run)
                last_saved = state.step
        read_results(run)
        if state.step > last_saved:
            save(run)
    if state.step < run.num_steps:
        logger.info("stopped after step %d as asked", state.step)
        return False
    finish(run)
    say_end(run)
    return True


@fast_products()
def train_step(run: TrainingRun, micro_batches: list[Batch], num_targets: int) -> None:
    """One step of the optimizer: the loss is the mean over all predicted tokens of all processes' micro-batches.

    The model gives the mean over its own micro-batch, and data-parallel gradients are averaged over processes; so each
    micro-batch is weighted by its tokens * processes / tokens of the step.

    The host waits for no result: losses and the gradient's norm before clipping are left in `run.unread`, and a step
    whose norm is not finite leaves weights and moments as they are.
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
            loss = run.wrapped(**to_device(batch, accelerator.device)).loss
            accelerator.backward(loss * (own_targets * accelerator.num_processes / max(1, num_targets)))
        losses.append((loss.detach(), own_targets))
    grad_norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), run.settings.max_grad_norm))
    step_if_finite(state.optimizer, grad_norm)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * accelerator.num_processes
    run.unread.results.append(StepResult(state.step, losses, grad_norm, num_targets))


def read_results(run: TrainingRun) -> float | None:
    """Read what the steps gave since the last time into the state; the last gradient's norm, None without steps.

    Raises ValueError for the first step with a loss or a gradient that is not finite.
    """
    state, read = run.state, run.unread.read()
    if not read:
        return None
    sums = sum_over_processes(run.accelerator, *(result.loss_sum for result in read))
    for result in (result._replace(loss_sum=one) for result, one in zip(read, sums, strict=True)):
        _require_finite(run, result)
        state.loss_sum, state.loss_tokens = state.loss_sum + result.loss_sum, state.loss_tokens + result.num_targets
    return read[-1].grad_norm


def _agree(accelerator: Accelerator, micro_batches: list[Batch], stop_requested: bool) -> tuple[int, bool]:
    """Predicted tokens of all processes in this step, and whether any of them was asked to stop."""
    own_targets = sum(map(count_targets, micro_batches))
    total, stops = sum_over_processes(accelerator, own_targets, stop_requested)
    return int(total), stops > 0


def _require_finite(run: TrainingRun, result: ReadStep) -> None:
    if result.wrong is None:
        return
    kept = last_checkpoint(run.output)
    raise ValueError(
        f"{result.wrong} at step {result.step}, so the run stops before its weights are spoiled; "
        f"{f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}; "
        "try a lower lr or a longer warm-up"
    )


def _log_training(run: TrainingRun, progress: tqdm, grad_norm: float, pace: StepTimer) -> None:
    """Log the mean loss over the tokens since the last line, and start the next line."""
    state = run.state
    loss, rate = state.loss_sum / max(1, state.loss_tokens), learning_rate(state.step - 1, run.num_steps, run.settings)
    tokens = pace.steps * run.loader.windows_per_step * run.settings.window_len
    speed = round(tokens / max(1e-9, pace.seconds), 1)
    line = log_metrics(run, {"loss": loss, "lr": rate, "grad_norm": grad_norm, "tokens_per_second": speed})
    say_line(run, progress, line)
    state.loss_sum, state.loss_tokens, pace.steps, pace.seconds = 0.0, 0, 0, 0.0
    progress.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{speed:,.0f}", refresh=False)


@dataclass
class StepTimer:
    """Steps and the seconds spent in them, without evaluation and saving."""

    steps: int = 0
    seconds: float = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *raised: Any) -> None:
        self.steps += 1
        self.seconds += time.monotonic() - self._entered


def _is_due(run: TrainingRun, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.num_steps


def _progress(run: TrainingRun) -> tqdm:
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
