"""RETRO and the plain LM at several widths and starts, side by side: does retrieval still gain in a larger model?

For each width and start a RETRO and the same decoder without retrieval see the same tokens in the same order, and are
measured on a validation store at points of training evenly apart: bits per byte of LM, RETRO[OFF], RETRO[ON] and
RETRO[ON] with random neighbors, over all chunks and over those with r(C) <= 12.5%. Intervals are of the bootstrap over
documents, 95%. Sizes other than width, heads, layers and CCA layers are those of the recipe. Starts:

    induction       the recipe's
    random          the paper's: random weights, plain keys, positions in every channel of CCA. All weights learn at the
                    recipe's rate x 128 / d, since the rates of single weights are made for the other start; encoder,
                    dropped neighbors and all else are the recipe's
    no-multiplier   the recipe's, with token embeddings that are not multiplied

    python benchmarks/widths.py --store docs --valid held-out --widths 128 256 512 --minutes 30 --json widths.json
    python benchmarks/widths.py --store docs --valid held-out --widths 256 --starts induction random --tokens 3000000 \\
        --index tfidf --valid-tokens 50000 --plot widths.pdf --set weight_decay=0.05 --set model.encoder_num_layers=2

Every run is a process of its own: all at once on a GPU, one after another on CPUs. With --minutes they first measure
how fast they train and score, and the tokens are what fits: on CPUs as many for every width, on a GPU as many for every
run of a width, at most --tokens. --valid-tokens and --end-tokens measure on windows evenly spread, else on everything.
Needed are torch, transformers, accelerate, einops, jaxtyping, this checkout and the two stores with their neighbor
tables (`retro neighbors`); the other needs of the library may be missing.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # a checkout that is not installed

from machine import machine
from trials import PROBE_SECONDS, Trial, evaluation_data, part_of, step_tokens

from retro.common.files import write_result
from retro.common.settings import find_config, read_yaml, to_plain, unknown_name
from retro.evaluation import bits
from retro.evaluation.bits import ChunkScores
from retro.evaluation.data import EvaluationData
from retro.evaluation.plots import OTHER_LOOKS, check_plot, curve, picture
from retro.provenance import versions
from retro.retrieval import Store
from retro.training.settings import TrainSettings

STARTS: dict[str, dict[str, Any]] = {
    "induction": {},
    "random": {
        "model.cca_init": "random",
        "model.smeared_keys": False,
        "model.cca_partial_rotary_factor": 1.0,
        "lr_ratios": {},  # a random start has nothing to protect
        "lr_width": None,
    },
    "no-multiplier": {"model.embedding_multiplier": 1},
}
COLUMNS = {"lm": "LM", "retro_off": "OFF", "retro_on": "ON", "retro_on_random": "random"}
CHUNKS = {"all": "all chunks", "little": "r <= 12.5%"}
GAINS = {  # how far the first is below the second
    "ON below its LM": ("retro_on", "lm"),
    "ON below the best LM": ("retro_on", "best_lm"),  # of that width
    "ON below random": ("retro_on", "retro_on_random"),
    "OFF below its LM": ("retro_off", "lm"),
}
SPARE = 0.05  # of the time

# Settings


def settings_of(given: argparse.Namespace, width: int, start: str, retrieval: bool, output: str = ".") -> TrainSettings:
    """The recipe at a width and start. Raises ValueError for a setting that is none."""
    head_dim = 64 if width >= 256 else 32
    if width % head_dim:
        raise ValueError(f"width {width} is no multiple of its head size {head_dim}; give one that is")
    changes = {"num_neighbors": given.k, "mixed_precision": given.precision, "max_tokens": given.tokens or 1}
    changes |= {name: getattr(given, name) for name in ("batch_size", "window_len", "index", "lr", "seed")}
    changes |= {"model.hidden_size": width, "model.num_attention_heads": width // head_dim}
    changes |= {"model.num_hidden_layers": given.layers, "model.cca_layers": given.cca_layers}
    changes = {name: value for name, value in changes.items() if value is not None} | STARTS[start] | dict(given.set)
    values = {**read_yaml(find_config(given.config, "train")), "max_steps": None}
    if start == "random" and values.get("lr_width") and "lr" not in changes and changes["lr_width"] is None:
        changes["lr"] = values["lr"] * values["lr_width"] / width
    for name, value in changes.items():
        *path, last = name.split(".")
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    known = {one.name for one in fields(TrainSettings)}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(unknown_name(unknown[0], known))
    return TrainSettings(**{**values, "output": output, "store": str(given.store), "retrieval": retrieval})


def key_value(text: str) -> tuple[str, Any]:
    """`key=value`, the value as YAML has it, and 1e-3 a number too."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value; write for example weight_decay=0.05")
    read = yaml.safe_load(value)
    with suppress(ValueError):
        return key, float(read) if isinstance(read, str) else read
    return key, read


# All runs together


def affordable(costs: list[tuple[int, float, float]], seconds: float, together: bool) -> dict[int, float]:
    """Tokens for each width, from the width, the fixed seconds and the seconds a token of all runs.

    together: all run for that long, and a width has what its slowest run can do; else they take turns, and all widths
    have as many.
    """
    if not together:
        each = (seconds - sum(cost[1] for cost in costs)) / sum(cost[2] for cost in costs)
        return {width: each for width, _, _ in costs}
    found: dict[int, float] = {}
    for width, fixed, token in costs:
        found[width] = min(found.get(width, np.inf), (seconds - fixed) / token)
    return found


def measured(scores: dict[str, ChunkScores], data: EvaluationData, seed: int) -> dict[str, Any]:
    """Bits per byte of each column over what `data` scores, and the gains between them, with intervals."""
    seen = {column: replace(one, bits=one.bits * data.scored.any(-1)) for column, one in scores.items()}
    pairs = {name: pair for name, pair in GAINS.items() if {*pair} <= {*seen}}
    return {
        "bpb": {column: one.bits_per_byte(data) for column, one in seen.items()},
        "interval": {column: bits.bpb_interval(one, data, seed) for column, one in seen.items()},
        "gain": {name: bits.gain(seen[one], seen[other], data, seed) for name, (one, other) in pairs.items()},
    }


class WidthSweep:
    """The runs, and what follows from what they say."""

    def __init__(self, given: argparse.Namespace, output: str) -> None:
        self.given, self.started_at, self.together = given, time.monotonic(), torch.cuda.is_available()
        given.precision = given.precision or ("bf16" if self.together else None)
        sizes = [(width, start) for width in given.widths for start in given.starts]
        self.trials = [Trial(*size, settings_of(given, *size, on, output)) for size in sizes for on in (False, True)]
        self.settings, store = self.trials[0].settings, Store.open(given.store)
        data = evaluation_data(store, Store.open(given.valid), self.settings.num_neighbors, self.settings.index)
        tokens = {"points": given.valid_tokens, "end": given.end_tokens or data.scored.sum()}
        parts = {name: part_of(data, self.settings.window_len, size) for name, size in tokens.items() if size}
        self.data = {name: part for name, (part, _) in parts.items()}
        self.to_score = {name: part for name, (_, part) in parts.items()}
        self.rows: dict[tuple[int, str, str, int], dict[str, Any]] = {}
        self.about = {**machine(), "threads": torch.get_num_threads()}
        self.about["versions"] |= versions()
        self.about["gpu"] = torch.cuda.get_device_name() if self.together else None
        self.measured_on = {name: described(one) for name, one in self.data.items()}

    def introduce(self) -> None:
        """Say what will be run, and what it will be measured on."""
        settings, where = self.settings, self.about["gpu"] or f"{self.about['threads']} CPU threads"
        say(f"{len(self.trials)} runs on {where}, precision {settings.mixed_precision}, k = {settings.num_neighbors}")
        for name, one in self.measured_on.items():
            text = "{documents:,} documents, {bytes:,} bytes, {chunks:,} chunks, {little:,} of them with r(C) <= 12.5%"
            say(f"[{name}] measured on {text.format(**one)}")
        say(f"r(C): the longest run in common with any of {self.measured_on['end']['overlap_neighbors']} neighbors")

    def run(self) -> None:
        """All runs to their ends; those that fail are left behind."""
        if self.given.minutes:
            kinds = {trial.kind: trial for trial in self.trials}
            probed = self.trials if self.together else list(kinds.values())
            seconds = 60 * self.given.minutes * SPARE / (1 if self.together else len(probed))
            self.phase(probed, "probe", lambda trial: min(PROBE_SECONDS, seconds), until="speed")
            self.share_out(60 * self.given.minutes * (1 - SPARE) - (time.monotonic() - self.started_at))
        self.phase(self.trials, "train", lambda trial: trial.settings.max_tokens, until="done")

    def phase(self, trials: list[Trial], what: str, value: Callable[[Trial], float], until: str) -> None:
        """Ask the runs and wait for their answers: together, or one after another."""
        for group in [trials] if self.together else [[trial] for trial in trials]:
            new = [trial for trial in group if trial.pipe is None and not trial.is_lost]
            for trial in new:
                trial.open(self.to_score, self.given.points)
            self.wait(new, "ready")
            asked = [trial for trial in group if not trial.is_lost]
            for trial in asked:
                trial.ask(what, value(trial))
            self.wait(asked, until)

    def wait(self, trials: list[Trial], until: str) -> None:
        """Take what the runs say until each has said this, or has failed."""
        waiting = {trial.pipe: trial for trial in trials}
        while waiting:
            for pipe in connection.wait(list(waiting)):
                event, said = waiting[pipe].hear()
                self.take(waiting[pipe], event, said)
                if event in (until, "failed"):
                    del waiting[pipe]

    def share_out(self, seconds: float) -> None:
        """Give every run as many tokens as the measured speeds allow in so many seconds."""
        speeds = {trial.kind: trial.about["speed"] for trial in self.trials if "speed" in trial.about}
        for trial in self.trials:
            if trial.kind in speeds:
                trial.about.setdefault("speed", speeds[trial.kind])
            elif not trial.is_lost:
                self.take(trial, "failed", {"failed": "no run of its size could be tried"})
        left = [trial for trial in self.trials if not trial.is_lost]
        counts = [int(one.scored.sum()) for one in self.data.values()]
        fixed = lambda s: s["setup"] + s["scored"] * (counts[0] * self.given.points + sum(counts[1:]))  # noqa: E731
        costs = [(trial.width, fixed(trial.about["speed"]), trial.about["speed"]["token"]) for trial in left]
        tokens = affordable(costs, seconds, self.together) if costs else {}
        for trial in left:
            size, most = step_tokens(trial.settings), min(tokens[trial.width], self.given.tokens or np.inf)
            if most < size:
                scoring = (max if self.together else sum)(cost[1] for cost in costs)
                raise ValueError(
                    f"--minutes {self.given.minutes:g} leaves no time to train at width {trial.width}, since scoring "
                    f"takes {scoring:.0f} s; give more, fewer --points, or fewer --valid-tokens and --end-tokens"
                )
            trial.settings = replace(trial.settings, max_tokens=int(most // size) * size)

    def take(self, trial: Trial, event: str, said: dict[str, Any]) -> None:
        """Keep, print and write what a run has said."""
        if event == "point":
            self.take_point(trial, **said)
        elif event == "speed":
            trial.about["speed"] = said
            say(f"[{trial}] {1 / said['token']:,.0f} tokens a second in training, {1 / said['scored']:,.0f} scored")
        elif event == "started":
            say("[{}] {parameters:,} parameters, {tokens:,} tokens in {steps:,} steps".format(trial, **said))
        elif event == "done":
            say(f"[{trial}] done, {said['seconds']:.1f} s of training")
            trial.pipe.close()
        elif event == "failed":
            say(f"[{trial}] failed: {said['failed']}")
        if event in ("started", "done", "failed"):
            trial.about |= said
        if self.given.json and event in ("point", "done", "failed"):
            write_result(self.given.json, self.result())

    def take_point(self, trial: Trial, data: str, tokens: int, **found: Any) -> None:
        trial.points[data, tokens] = found
        known = [start for width, start, *point in self.rows if (width, *point) == (trial.width, data, tokens)]
        for start in dict.fromkeys([*known, trial.start]):  # of the others the best LM may be another now
            self.rows[trial.width, start, data, tokens] = self.compare(trial.width, start, data, tokens)
        text = f"[{trial}] {tokens:,} tokens, {found['seconds']:.1f} s, loss {found['loss']:.3f} [{data}]"
        for name, one in self.rows[trial.width, trial.start, data, tokens]["chunks"].items():
            text += f"; {CHUNKS[name]}: " + ", ".join(f"{COLUMNS[c]} {one['bpb'][c]:.4f}" for c in found["scores"])
            gain = one["gain"].get("ON below its LM")
            text += f", ON below the LM {percent(gain)}%" if gain else ""
        say(text)

    def compare(self, width: int, start: str, data: str, tokens: int) -> dict[str, Any]:
        """What is known at a point of a width and start, as a row of the results; best_lm is the best so far."""
        here = [trial for trial in self.trials if trial.width == width and (data, tokens) in trial.points]
        lms = {t.start: t.points[data, tokens]["scores"]["lm"] for t in here if not t.settings.retrieval}
        best = min(lms, key=lambda start: lms[start].bits.sum(), default=None)
        scores = {"best_lm": lms[best]} if best else {}
        row = {
            "width": width,
            "start": start,
            "data": data,
            "tokens": tokens,
            "best_lm": best,
            "loss": {},
            "seconds": {},
        }
        for trial in here:
            if trial.start == start:
                scores |= (found := trial.points[data, tokens])["scores"]
                row["loss"][trial.model], row["seconds"][trial.model] = found["loss"], found["seconds"]
        parts, seed = by_overlap(self.data[data]), self.settings.seed
        return {**row, "chunks": {name: measured(scores, one, seed) for name, one in parts.items()}}

    def table(self) -> list[dict[str, Any]]:
        """The rows of the end, of what is finished."""
        ends = {(t.width, t.start, "end", t.about["tokens"]): True for t in self.trials if "seconds" in t.about}
        return [self.rows[key] for key in ends]

    def result(self) -> dict[str, Any]:
        """All that is known, for JSON."""
        given = {name: str(value) for name, value in vars(self.given).items()}
        of_run = lambda t: {"settings": {**to_plain(t.settings), "output": None}, **t.about}  # noqa: E731
        runs = [{"width": trial.width, "start": trial.start, **of_run(trial)} for trial in self.trials]
        found = {"runs": runs, "points": list(self.rows.values()), "table": self.table()}
        return {"machine": self.about, "settings": given, "measured_on": self.measured_on, **found}


# What is seen


def by_overlap(data: EvaluationData) -> dict[str, EvaluationData]:
    """All chunks, and those with little overlap."""
    little = data.overlap_ratio <= bits.LITTLE_OVERLAP
    return {"all": data, "little": replace(data, scored=data.scored & little[:, None])}


def described(data: EvaluationData) -> dict[str, int]:
    counted, little = data.scored.any(-1), data.overlap_ratio <= bits.LITTLE_OVERLAP
    sizes = {"documents": data.num_documents, "bytes": int(data.bytes_of_chunk.sum())}
    sizes |= {"tokens": int(data.scored.sum()), "chunks": int(counted.sum()), "little": int((counted & little).sum())}
    return {**sizes, "overlap_neighbors": data.leak_rows.shape[1]}


def say(text: str) -> None:
    print(text, flush=True)


def percent(gain: list[float]) -> str:
    value, low, high = (100 * one for one in gain)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def show(table: list[dict[str, Any]]) -> None:
    """The table of the end: bits per byte, and gains in percent with their intervals."""
    for width, tokens in dict.fromkeys((row["width"], row["tokens"]) for row in table):
        rows = [row for row in table if (row["width"], row["tokens"]) == (width, tokens)]
        say(f"\nd {width}, {tokens:,} tokens; bits per byte, and below in %; the best LM: {rows[-1]['best_lm']}")
        say(f"{'start':15}{'chunks':12}" + "".join(f"{name:>8}" for name in COLUMNS.values())
            + "".join(f"{name:>22}" for name in GAINS) + "  seconds")  # fmt: skip
        for row in rows:
            for name, one in row["chunks"].items():
                cells = [f"{one['bpb'][column]:8.4f}" if column in one["bpb"] else " " * 8 for column in COLUMNS]
                cells += [f"{percent(one['gain'][gain]) if gain in one['gain'] else '':>22}" for gain in GAINS]
                seconds = ", ".join(f"{run} {value:.0f}" for run, value in row["seconds"].items())
                line = (
                    f"{row['start']:15}{CHUNKS[name]:12}" + "".join(cells) + (f"  {seconds}" if name == "all" else "")
                )
                say(line.rstrip())


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """How far RETRO[ON] is below the LM of its width and start, over the tokens of training; nothing if not known."""
    kept = [row for row in points if "ON below its LM" in row["chunks"]["all"]["gain"]]
    kept = [row for row in kept if row["data"] == points[0]["data"]]  # that of every point
    if not kept:
        return
    widths, starts = ([*dict.fromkeys(row[name] for row in kept)] for name in ("width", "start"))
    lines = dict.fromkeys((row["width"], row["start"]) for row in kept)
    with picture(file, 2, size=(6.0, 5.6), sharex=True) as panels:
        for axes, (name, label) in zip(panels, CHUNKS.items(), strict=True):
            for place, (width, start) in enumerate(lines):
                own = sorted((r for r in kept if (r["width"], r["start"]) == (width, start)), key=lambda r: r["tokens"])
                x = [row["tokens"] / 1e6 for row in own]
                y = 100 * np.array([row["chunks"][name]["gain"]["ON below its LM"] for row in own])
                look = OTHER_LOOKS[widths.index(width) % len(OTHER_LOOKS)]
                look = look | {"linestyle": ("-", "--", ":")[starts.index(start)]}
                curve(axes, x, y, f"d {width}, {start}", look, 2.5 * (place - (len(lines) - 1) / 2))
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(ylabel="RETRO[ON] below the LM, %", title=label.replace("r <=", "chunks with r(C) \u2264"))
        panels[0].set_title("all chunks; bars: 95% intervals over documents")
        panels[-1].set(xlabel="tokens of training, millions")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--store", type=Path, required=True, help="the datastore to train on")
    add("--valid", type=Path, required=True, help="a store of held-out documents, with neighbors in --store")
    add("--widths", type=int, nargs="+", default=[128, 256, 512])
    add("--starts", nargs="+", choices=STARTS, default=["induction"])
    add("--minutes", type=float, help="for everything")
    add("--tokens", type=int, help="of training, for every run; with --minutes at most")
    add("--config", default="train_small", help="the recipe: a file or a packaged name")
    add("--layers", type=int, help="default: the recipe's, as for all that follow")
    add("--cca-layers", type=int, nargs="+", metavar="LAYER", help="counted from 1")
    add("--batch-size", type=int, help="windows in a step")
    add("--window-len", type=int)
    add("--k", type=int, help="neighbors of a chunk")
    add("--index", help="whose neighbor table is read: exact, tfidf ...")
    add("--lr", type=float)
    add("--seed", type=int)
    add("--precision", choices=("bf16", "none"), help="default on a GPU: bf16")
    add("--set", type=key_value, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other setting")
    add("--points", type=int, default=6, help="measured at so many points of training")
    add("--valid-tokens", type=int, help="score about so many tokens at the points; default: as at the end")
    add("--end-tokens", type=int, help="score about so many tokens at the end; default: all")
    add("--json", type=Path, help="written at every point")
    add("--plot", type=Path, help="gain over tokens: .pdf, .svg or .png")
    given = parser.parse_args()
    if not (given.minutes or given.tokens):
        parser.error("give --minutes, --tokens or both")
    given.widths, given.starts = list(dict.fromkeys(given.widths)), list(dict.fromkeys(given.starts))
    return given


def main() -> int:
    given, interrupted = parsed(), False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if given.plot and importlib.util.find_spec("matplotlib") is None:
            given.plot = say("matplotlib is not installed, so that there will be no plot; pip install matplotlib")
        if given.plot:
            check_plot(given.plot)
        with tempfile.TemporaryDirectory() as folder:  # stays empty: without a checkpoint there a run is new
            bench = WidthSweep(given, folder)
            bench.introduce()
            try:
                bench.run()
            except KeyboardInterrupt:
                interrupted = True
                say("interrupted; what is finished stays")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(bench.table())
    if given.plot:
        plot(list(bench.rows.values()), given.plot)
    return int(interrupted or any(trial.is_lost for trial in bench.trials))


if __name__ == "__main__":
    sys.exit(main())
