"""What a run is made of: data, model, processes, optimizer and the last checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from retro.common.devices import find_device
from retro.common.settings import to_plain
from retro.model import RetroConfig, RetroForCausalLM
from retro.provenance import check_store
from retro.retrieval import NeighborTable, Store, open_neighbors
from retro.retrofit import RetrofitForCausalLM
from retro.training.checkpoint import TrainState, check_identity, load_checkpoint, whole_checkpoint
from retro.training.compiling import compile_base, compiled, wants_compile
from retro.training.memory import keep_freed_memory
from retro.training.optimizer import make_optimizer
from retro.training.place import check_output
from retro.training.settings import FREE_FIELDS, RetrofitSettings, TrainSettings
from retro.training.sharding import shard
from retro.training.unread import Unread
from retro.training.windows import Loader, Windows, check_window

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
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
    unread: Unread = field(default_factory=Unread)


# Setup


def setup(
    settings: TrainSettings,
    make_config: Callable[[TrainSettings, Store], PreTrainedConfig],
    model_class: type[PreTrainedModel],
    make_windows: Callable[[TrainSettings, Store, int], Windows] | None = None,
) -> TrainingRun:
    """Find the device, open the data, make the model or read it from the last checkpoint of the output folder, check
    that all fit.

    make_config: the model's configuration for a store; loads what it needs for it. model_class: makes a model of it,
    and reads checkpoints. make_windows: what is trained on, from settings, store and r, if not the windows of the
    store.
    Raises ValueError for data or a checkpoint that do not fit the settings, and for an output that is no place for it.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        check_output(Path(settings.output))
    accelerator, output = make_accelerator(settings), Path(settings.output)
    store = Store.open(settings.store)
    check_window(settings.window_len, store.chunk_len)
    config = make_config(settings, store)
    check_positions(settings, config)
    windows = (make_windows or training_windows)(settings, store, config.retrieved_len)
    valid = validation_windows(settings, store, config.retrieved_len)
    identity = run_identity(settings, windows, accelerator.num_processes)
    checkpoint = whole_checkpoint(output)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    set_seed(settings.seed)
    start = Path(settings.start) if settings.start and isinstance(model_class, type) else None
    model = make_model(settings, config, model_class, checkpoint or start)
    if checkpoint is None and start is not None:
        check_start(start, store, model.config, config)
    wrapped = spread(model, settings, accelerator)
    state = TrainState(model, make_optimizer(model, settings))
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, accelerator.process_index)
        logger.info("going on from %s", checkpoint)
    loader = make_loader(settings, windows, accelerator, state.position)
    num_steps = settings.num_steps(accelerator.num_processes)
    return TrainingRun(settings, accelerator, store, loader, valid, wrapped, state, identity, output, num_steps)


def check_positions(settings: TrainSettings, config: PreTrainedConfig) -> None:
    """Raise ValueError for windows that are longer than what a pretrained decoder reads; ours have no table of it."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and settings.window_len > limit and not isinstance(config, RetroConfig):
        raise ValueError(
            f"window_len: {settings.window_len} is more than the {limit} positions of the model; give {limit} or fewer"
        )


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


def check_start(start: Path, store: Store, found: PreTrainedConfig, wanted: PreTrainedConfig) -> None:
    """ValueError unless the model in a folder is the one that the settings describe, of the store's tokenizer."""
    check_store(start, store)
    own, other = wanted.to_diff_dict(), found.to_diff_dict()
    names = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    names = [name for name in names if name not in ("dtype", "architectures", "transformers_version", "_name_or_path")]
    if names:
        sides = ", ".join(f"{name} ({other.get(name)} there, {own.get(name)} here)" for name in names)
        raise ValueError(f"start: {start} is another model: {sides}; give the settings of its config.yaml")


def spread(model: PreTrainedModel, settings: TrainSettings, accelerator: Accelerator) -> nn.Module:
    """The model as the processes run it together: each a whole one, or sharded in place; compiled, if it shall be."""
    compiles = wants_compile(settings, model, accelerator.device)
    if settings.fsdp:
        return _sharded(model, accelerator, compiles)
    if compiles and isinstance(model, RetrofitForCausalLM):
        compile_base(model)
    wrapped = accelerator.prepare_model(model)
    if compiles and isinstance(model, RetroForCausalLM):
        graph = compiled(model, settings.gradient_checkpointing)
        if wrapped is model:
            return graph
        wrapped.module = graph  # inside of DistributedDataParallel, which is no part of it
    return wrapped


def _sharded(model: PreTrainedModel, accelerator: Accelerator, compiles: bool) -> nn.Module:
    if not isinstance(model, RetroForCausalLM):
        raise ValueError(f"fsdp is true, and {type(model).__name__} is no RetroForCausalLM; leave it out")
    if accelerator.num_processes == 1:
        raise ValueError("fsdp is true with a single process; launch several, or leave it out")
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)  # device and autocast alone
    shard(model, accelerator.device.type, compiles)
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
        pin_memory=accelerator.device.type == "cuda",
    )


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Device, processes and precision as accelerate finds them, with the settings' tracker."""
    tracker, device = None if settings.tracker == "none" else settings.tracker, find_device(settings.device)
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",  # several processes without a GPU then talk by gloo
            mixed_precision="no" if settings.mixed_precision == "none" else settings.mixed_precision,
            log_with=tracker,
            project_dir=settings.output,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error
    if tracker is not None and tracker not in [getattr(one, "value", one) for one in accelerator.log_with]:
        raise ValueError(
            f'tracker: {tracker} is not installed; pip install "retro-lm[{tracker}]", or take tracker=none'
        )
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
        bos=store.bos_token_id if isinstance(settings, RetrofitSettings) else None,  # see window_start
    )


# Output


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
