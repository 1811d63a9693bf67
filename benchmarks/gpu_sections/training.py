"""Sections `training`, `run` and `profile`: steps of training, ours and others', a whole run, a step by kernel."""

from __future__ import annotations

import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, PEERS, Contestant, Shape, formula, installed, model_fields, ours
from gpu_sections.bench import Bench, Figures
from synthetic import write_synthetic_store

from retro.model import RetroForCausalLM
from retro.retrieval import Store, build_neighbors
from retro.training.loop import fit
from retro.training.pretrain import model_config
from retro.training.settings import TrainSettings
from retro.training.setup import setup

D896 = Shape(896, 2048, 8, layers=12, cca_layers=(6, 9, 12), heads=16, head_dim=64, vocab_size=32_000)  # 172M
D1536 = Shape(1536, 2048, 4, layers=12, cca_layers=(6, 9, 12), heads=12, head_dim=128, vocab_size=32_000)  # 425M
TINY = Shape(64, 128, 1, layers=2, cca_layers=(2,), encoder_layers=1, heads=2)
# In the order of interest: the first are measured where time is short, and what compiles takes a minute each.
EAGER = ("ON-packed", "ON", "OFF", "relative", "retro-pytorch", "llama", "labml", "liger", "paper")
COMPILED = ("ON-packed", "OFF", "relative", "paper", "llama", "ON", "retro-pytorch")
RUNS = {  # what differs from the defaults
    "retro train": {},
    "retro train, compile=false": {"compile": False},
    "retro train, retrieval=false": {"retrieval": False},
}


def training(bench: Bench) -> None:
    """A step: forward, backward and fused AdamW in bf16 autocast over random tokens, all at the same shape.

    Operations are those of the work, not of the program: a RETRO[ON], or [OFF], of that shape with rotary positions,
    the masked half of causal attention left out. So two contestants' shares of the product compare as their times do.
    """
    cases = [(name, "") for name in EAGER] + [(name, "default") for name in bench.pick(COMPILED, COMPILED[:1])]
    for name in sorted({CONTESTANTS[name].peer for name, _ in cases} - {None}):
        if not installed(name):
            print(f"  {CONTESTANTS[name].label} is not installed and is left out; pip install {PEERS[name][1]}")
    for name, mode in cases:
        entry = CONTESTANTS[name]
        if entry.peer is None or installed(entry.peer):
            label = entry.label + (" at 425M" if name == "paper" else "") + (", compiled" if mode else "")
            bench.case(label, partial(step, bench, name, mode))


def contestant(bench: Bench, name: str, mode: str) -> Contestant:
    shape = bench.pick(D1536 if name == "paper" else D896, TINY)
    one = Contestant(name, shape, bench.seed, "fused", "bf16", device=bench.device.type)
    if mode:
        one.model.compile(**bench.compiler)
    return one


def step(bench: Bench, name: str, mode: str) -> Figures:
    one = contestant(bench, name, mode)
    first = bench.once(one.step)
    seconds = bench.seconds(one.step)
    loss = float(one.step())
    if not loss < 2 * torch.tensor(float(one.shape.vocab_size)).log():
        raise ValueError(f"the loss is {loss:g}; the steps that were timed do not train")
    operations = work(one.shape, CONTESTANTS[name].retrieves, paper=name == "paper")
    return {
        "seconds": seconds,
        "tokens_per_second": one.shape.batch * one.shape.n / seconds,
        "share_of_product": bench.share(operations, seconds),
        "first_seconds": first,
        "parameters": one.parameters(),
    }


@cache
def work(shape: Shape, retrieves: bool, paper: bool = False) -> int:
    """Operations of a step of ours, or of the paper's form, at a shape."""
    with torch.device("meta"):
        model, _ = ours(shape, paper=paper, position="rotary")
    return formula(model, shape, retrieves)


# A run of the library, from a store


def run(bench: Bench) -> None:
    """`retro train` itself: windows and neighbors read from a store of made-up chunks, clipping, the log.

    The speed is that of the last line of the log, after the first lines have seen to compiling; saving is no part.
    """
    shape, steps = bench.pick(D896, TINY), bench.pick(60, 4)
    with tempfile.TemporaryDirectory() as folder:
        rows = shape.batch * shape.num_chunks * bench.pick(64, 8)
        store = write_synthetic_store(Path(folder) / "store", rows, 64, document_chunks=5)
        build_neighbors(store, shape.k)
        for label, changes in RUNS.items():
            output = str(Path(folder) / label.replace(" ", "-"))
            bench.case(label, partial(trained, bench, store, shape, output, steps, changes))


def trained(bench: Bench, store: Store, shape: Shape, output: str, steps: int, changes: dict[str, Any]) -> Figures:
    model = model_fields(shape) | {"encoder_shares_embeddings": True}
    sizes = dict(window_len=shape.n, batch_size=shape.batch, num_neighbors=shape.k, max_steps=steps)
    often = dict(log_every=steps // 4, save_every=2 * steps, warmup_steps=1, mixed_precision="bf16")
    settings = TrainSettings(store=str(store.path), output=output, model=model, **sizes, **often, **changes)
    fit(setup(settings, model_config, RetroForCausalLM))
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][-1]
    seconds = shape.batch * shape.n / speed
    operations = work(shape, settings.retrieval)
    return {"seconds": seconds, "tokens_per_second": speed, "share_of_product": bench.share(operations, seconds)}


# Kernel by kernel


def profile(bench: Bench) -> None:
    """Where a step of RETRO[ON] with packed documents goes, before and after compiling: kernels by their time.

    `idle` is the part of a step in which the card has nothing to do; `waits` are the calls in a step that make the
    host wait for the card.
    """
    for label, mode in bench.pick({"eager": "", "compiled": "default"}, {"eager": ""}).items():
        found: dict[str, Figures] = {}
        step = bench.case(f"{label}: the step", partial(profiled, bench, mode, found))
        for name, figures in found.items():
            bench.tell(f"{label}: {name}", {**figures, "share_of_step": figures["seconds"] / step["seconds"]})


def profiled(bench: Bench, mode: str, found: dict[str, Figures]) -> Figures:
    """The whole step; into `found` its parts, the longest first."""
    one = contestant(bench, "ON-packed", mode)
    seconds = bench.seconds(one.step, rounds=5)
    by_kernel, waits = kernels(bench, one)
    if bench.device.type == "cuda":
        found["idle"] = {"seconds": max(0.0, seconds - sum(one["seconds"] for one in by_kernel.values()))}
        found["waits"] = waits
    longest = sorted(by_kernel, key=lambda name: -by_kernel[name]["seconds"])
    found |= {name: by_kernel[name] for name in longest[: bench.pick(14, 4)]}
    return {"seconds": seconds, "calls": sum(one["calls"] for one in by_kernel.values())}


def kernels(bench: Bench, one: Contestant, steps: int = 3) -> tuple[dict[str, Figures], Figures]:
    """Seconds and calls a step of each kernel (on a CPU: operation), and the same of the host's waiting."""
    cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    bench.wait()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            one.step()
        bench.wait()
    found: dict[str, Figures] = {}
    waits = {"seconds": 0.0, "calls": 0.0}
    for event in profiler.key_averages():
        if event.key == "cudaStreamSynchronize":
            waits = {"seconds": event.self_cpu_time_total / 1e6 / steps, "calls": event.count / steps}
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if on_card != cuda or getattr(event, "is_user_annotation", False):
            continue
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / steps
        if seconds:
            found[event.key] = {"seconds": seconds, "calls": event.count / steps}
    return found, waits
