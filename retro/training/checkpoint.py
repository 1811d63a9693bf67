"""Checkpoints: the state of a run as a folder that is also a model folder. Nothing is pickled.

    output/checkpoints/step-00000500/
      config.json  model.safetensors       the model, as save_pretrained writes it
      tokenizer.json ...  retro.json       the tokenizer, and which store the model was trained on
      config.yaml                          the resolved settings of the run
      optimizer.safetensors                the moments of the optimizer, by parameter name
      state.json                           step, position of the loader, counters, and what tells this run from others
      rng-0.json  rng-1.json ...           random states of Python, NumPy and torch, one file per process
      checksums.json                       of all these files

A checkpoint is written aside, synced and renamed: one that is there is whole, unless it was damaged since.
"""

from __future__ import annotations

import base64
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from retro.common.files import TEMPORARY_PREFIX, delete, load_json, save_json, sync, writing
from retro.common.records import SUMS_FILE, check_sums, save_sums
from retro.common.settings import differing
from retro.common.values import CountOrZero, NotNegative, check_record
from retro.training.optimizer import MuonAndAdamW
from retro.training.sharding import gathered, spread_as

_WRITING = "writing-"  # before the name of what is no checkpoint yet


@dataclass
class TrainState:
    """All that a run needs to go on exactly: this object is the checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | MuonAndAdamW
    step: int = 0  # steps done
    position: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "window": 0})
    tokens: int = 0  # input tokens of all processes
    elapsed_seconds: float = 0.0
    loss_sum: float = 0.0  # nats since the last log line
    loss_tokens: int = 0

    def counters(self) -> dict[str, Any]:
        """The state without model and optimizer."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "optimizer")}


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run's folder, None if there is none."""
    return max(_steps(output / "checkpoints"), default=None)


def save_checkpoint(
    output: Path,
    state: TrainState,
    accelerator: Accelerator,
    identity: dict[str, Any],
    write_model: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write the state under its step, whole or not at all, and remove all but the newest `keep`; all processes call it.

    identity: what must be the same in a run that goes on from here. write_model: writes the model's own files.
    """
    folder = output / "checkpoints" / f"step-{state.step:08d}"
    aside = folder.with_name(f"{_WRITING}{folder.name}")
    if accelerator.is_main_process:
        delete(aside)
        aside.mkdir(parents=True)
    moments = _optimizer_tensors(state, keep=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    save_json(aside / f"rng-{accelerator.process_index}.json", random_states())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writing(aside):
            write_model(aside)
            save_file(moments, aside / "optimizer.safetensors")
            save_json(aside / "state.json", {**state.counters(), "identity": identity})
            save_sums(aside)
            sync_files(aside)
        delete(folder)
        os.replace(aside, folder)
        _keep_newest(folder.parent, keep)
    accelerator.wait_for_everyone()
    return folder


def clear_leftovers(output: Path) -> None:
    """Delete what a killed run had half written, and checkpoints that it had half deleted."""
    for place in (f"checkpoints/{_WRITING}*", f"checkpoints/{TEMPORARY_PREFIX}*", f"{TEMPORARY_PREFIX}*"):
        for left in output.glob(place):
            delete(left)


def load_checkpoint(folder: Path, state: TrainState, process_index: int) -> None:
    """Put optimizer, counters and random states of a checkpoint in place; the model is built from the folder before."""
    saved = read_state(folder)
    for name in state.counters():
        setattr(state, name, saved[name])
    own = folder / f"rng-{process_index}.json"
    try:
        file = folder / "optimizer.safetensors"
        _load_optimizer(state, load_file(file))
        if (file := own).is_file():
            restore_random_states(load_json(own))
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"{file} is no part of this run's checkpoint ({said}); delete {folder}.") from None


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json; ValueError names a field that is missing or none."""
    file, position = folder / "state.json", {"epoch": CountOrZero, "window": CountOrZero}
    counts = {"step": CountOrZero, "tokens": CountOrZero, "loss_tokens": CountOrZero}
    seconds = {"elapsed_seconds": NotNegative, "loss_sum": float}
    return check_record(file, load_json(file), {**counts, **seconds, "position": position, "identity": dict[str, Any]})


def whole_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run's folder, None if there is none; one that is damaged is refused, and the newest
    that is not is named."""
    newest, *older = sorted(_steps(output / "checkpoints"), reverse=True) or [None]
    if newest is not None and (damage := _damage(newest)):
        sound = next((folder for folder in older if not _damage(folder)), None)
        remedy = f"to go on from {sound.name}, which is whole" if sound else "and older ones, of which none is whole"
        raise ValueError(f"the checkpoint {newest} is damaged ({damage}); delete it {remedy}.")
    return newest


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    try:
        if not (folder / SUMS_FILE).is_file():
            return f"{SUMS_FILE} is missing"
        check_sums(folder)
        read_state(folder)
    except ValueError as error:
        return str(error).partition(";")[0]


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another configuration, naming the fields that differ."""
    saved = read_state(folder)["identity"]
    names = differing(saved, identity)
    if names:
        sides = ", ".join(f"{name} ({_at(saved, name)} there, {_at(identity, name)} now)" for name in names)
        raise ValueError(
            f"{folder} is a checkpoint of another configuration: {sides}; "
            "give another output, or the settings in its config.yaml"
        )


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, as JSON values."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(one) for one in cuda],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo `random_states`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decode(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(one) for one in states["cuda"]])


def sync_files(folder: Path) -> None:
    """Flush every file of a folder to disk."""
    for file in folder.iterdir():
        sync(file)


def _parameter_names(state: TrainState) -> list[str]:
    """Names of the optimizer's parameters, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(state: TrainState, keep: bool) -> dict[str, torch.Tensor]:
    """The moments by name; all processes call this together, and one keeps what it gives."""
    names, moments = _parameter_names(state), state.optimizer.state_dict()["state"]
    named = {f"{names[i]}/{key}": tensor for i, entry in moments.items() for key, tensor in entry.items()}
    return gathered(named, keep)


def _load_optimizer(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    index = {name: i for i, name in enumerate(_parameter_names(state))}
    parameters = dict(state.model.named_parameters())
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(index[name], {})[moment] = spread_as(tensor, parameters[name])
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _keep_newest(checkpoints: Path, keep: int) -> None:
    for old in sorted(_steps(checkpoints))[:-keep]:
        delete(old)


def _steps(checkpoints: Path) -> list[Path]:
    """The folders of our names; what else lies there is not ours to read or to delete."""
    return [folder for folder in checkpoints.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", folder.name)]


def _at(values: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
