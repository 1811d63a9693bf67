"""One run of the benchmark over widths: a process of its own that trains and scores."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from retro.evaluation import bits
from retro.evaluation import data as held_out
from retro.evaluation.bits import ChunkScores
from retro.evaluation.data import EvaluationData
from retro.model import RetroForCausalLM
from retro.retrieval import Store, open_neighbors
from retro.text.chunks import decode_chunks
from retro.text.documents import Document
from retro.training.batches import count_targets
from retro.training.loop import StepTimer, read_results, train_step
from retro.training.pretrain import model_config
from retro.training.settings import TrainSettings
from retro.training.setup import TrainingRun, setup

PER_CHUNK = ("tokens", "lens", "num_bytes", "scored", "rows", "leak_rows", "overlap")
PROBE_STEPS, PROBE_SECONDS, PROBE_TOKENS = 2, 10.0, 2048  # steps that do not count, seconds of those that do, scored

# Evaluation data


def evaluation_data(store: Store, valid: Store, k: int, index: str | None) -> EvaluationData:
    """The chunks of a validation store as `bits` scores them, with their neighbors from the tables beside `store`.

    The text, and so its bytes, is what the tokens spell. Raises ValueError if it is not cut into the same tokens.
    """
    rows = valid.live_rows(np.arange(valid.num_live_chunks))
    borders = np.flatnonzero(np.diff(valid.document_rows(rows), prepend=-1, append=-1)).tolist()
    spans = [rows[first:end] for first, end in zip(borders[:-1], borders[1:], strict=True)]
    texts = enumerate(decode_chunks(valid.tokenizer, [np.concatenate(valid.token_lists(span)) for span in spans]))
    data = held_out.prepare([Document(str(n), text) for n, text in texts], valid.tokenizer, valid.chunk_len)
    if not np.array_equal(data.tokens, valid.chunks(rows)):
        raise ValueError(f"the tokens of {valid.path} spell a text of other tokens, so that its bytes are not known")
    found = open_neighbors(store, valid, k, index=index).rows[rows]
    leak_rows = open_neighbors(store, valid, index=index).rows[rows][:, : held_out.LEAKAGE_NEIGHBORS]
    return replace(data, rows=found, leak_rows=leak_rows, overlap=held_out.overlap_of(data, leak_rows, store))


def part_of(data: EvaluationData, window_len: int, num_tokens: int) -> tuple[EvaluationData, EvaluationData]:
    """About so many scored tokens in windows evenly spread: with their documents, and with each as its own, to score.

    So a window scores what it scores in `data`, and its chunks cost what they cost there.
    """
    window_len, stride = held_out.window_of([], data.chunk_len, window_len)
    windows = list(held_out.windows_of(data, window_len // data.chunk_len, stride // data.chunk_len))
    count = min(max(1, round(len(windows) * num_tokens / data.scored.sum())), len(windows))
    chosen = [windows[number] for number in np.linspace(0, len(windows) - 1, count).round().astype(int)]
    chunks = np.concatenate([np.arange(start, stop) for start, stop, _ in chosen])
    is_new = np.concatenate([np.arange(start, stop) >= first_new for start, stop, first_new in chosen])
    values = {name: getattr(data, name)[chunks] for name in PER_CHUNK}
    values["scored"] = values["scored"] & is_new[:, None]
    kept, values["documents"] = np.unique(data.documents[chunks], return_inverse=True)
    values |= {"words": data.words[kept], "line_ends": data.line_ends[kept]}
    part = replace(data, **values, document_ids=[data.document_ids[number] for number in kept])
    return part, replace(part, documents=np.repeat(np.arange(count), [stop - start for start, stop, _ in chosen]))


# A run: a process of its own, asked and answering through a pipe


def serve(pipe: Any, settings: TrainSettings, data: dict[str, EvaluationData], points: int) -> None:
    """The process of one run: an event and what there is to say of it, until nobody asks any more."""
    pipe.send(("ready", {}))
    try:
        while True:
            asked, value = pipe.recv()
            if asked == "probe":
                pipe.send(("speed", probe(settings, data["end"], value)))
            else:
                for event in train(replace(settings, max_tokens=value), data, points):
                    pipe.send(event)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        pipe.send(("failed", {"failed": f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"}))


def probe(settings: TrainSettings, data: EvaluationData, seconds: float) -> dict[str, float]:
    """Seconds to set up, of a token in training and of a scored one, by a model that is thrown away."""
    started, pace = time.monotonic(), StepTimer()
    run = setup(replace(settings, max_tokens=2**40), model_config, RetroForCausalLM)
    with closing(iter(run.loader)) as batches:
        for _ in range(PROBE_STEPS):
            step(run, batches)
        setting_up = time.monotonic() - started
        while not pace.steps or pace.seconds < seconds:
            with pace:
                step(run, batches)
                read_results(run)
    _, few = part_of(data, settings.window_len, PROBE_TOKENS)
    scoring = sum(one.elapsed_seconds for one in score(run, few).values()) / max(1, int(few.scored.sum()))
    del run
    gc.collect()
    torch.cuda.empty_cache()
    return {"setup": setting_up, "token": pace.seconds / pace.steps / step_tokens(settings), "scored": scoring}


def train(settings: TrainSettings, data: dict[str, EvaluationData], points: int) -> Iterator[tuple[str, dict]]:
    """Train to the end, and score where it is due: the first of the data at every point, all at the last."""
    run, pace = setup(settings, model_config, RetroForCausalLM), StepTimer()
    state, last = run.state, run.num_steps
    parameters = sum(one.numel() for one in state.model.parameters())
    yield "started", {"parameters": parameters, "steps": last, "tokens": last * step_tokens(settings)}
    with closing(iter(run.loader)) as batches:
        for stop in sorted({-(-last * (number + 1) // points) for number in range(points)}):
            while state.step < stop:
                with pace:
                    step(run, batches)
            with pace:
                read_results(run)
            about = dict(tokens=state.tokens, loss=state.loss_sum / max(1, state.loss_tokens), seconds=pace.seconds)
            state.loss_sum, state.loss_tokens = 0.0, 0
            for name in list(data)[: None if stop == last else 1]:
                yield "point", {"data": name, "scores": score(run, data[name]), **about}
    yield "done", {"seconds": pace.seconds}


def step(run: TrainingRun, batches: Iterator) -> None:
    micro_batches = next(batches)
    train_step(run, micro_batches, sum(map(count_targets, micro_batches)))


def score(run: TrainingRun, data: EvaluationData) -> dict[str, ChunkScores]:
    given = dict(window_len=run.settings.window_len, seed=run.settings.seed)
    return bits.score_columns(run.state.model, data, run.store, run.settings.num_neighbors, **given)


def step_tokens(settings: TrainSettings) -> int:
    return settings.windows_per_step(1) * settings.window_len


@dataclass(eq=False)
class Trial:
    """One run, and what it said: of itself (speed, parameters, steps, tokens, seconds, failed), and at its points."""

    width: int
    start: str
    settings: TrainSettings
    about: dict[str, Any] = field(default_factory=dict)
    points: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)  # by data and tokens
    pipe: Any = None

    def __str__(self) -> str:
        return f"d {self.width} {self.start} {self.model}"

    @property
    def model(self) -> str:
        return "RETRO" if self.settings.retrieval else "LM"

    @property
    def kind(self) -> tuple[int, bool]:
        """Runs of a kind are equally fast."""
        return self.width, self.settings.retrieval

    @property
    def is_lost(self) -> bool:
        return "failed" in self.about

    def open(self, data: dict[str, EvaluationData], points: int) -> None:
        """Start the process, which ends with this one and leaves Ctrl-C to it."""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        context.Process(target=serve, args=(theirs, self.settings, data, points), daemon=True).start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def ask(self, what: str, value: float) -> None:
        with suppress(OSError):  # it has ended: `hear` says so
            self.pipe.send((what, value))

    def hear(self) -> tuple[str, dict[str, Any]]:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return "failed", {"failed": "its process ended"}
