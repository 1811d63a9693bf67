"""RETRO-fit a pretrained causal LM: the base stays as it is, only what reads the neighbors is trained.

The script train/retrofit.py is the same, step by step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from retro.common.settings import find_config, load_settings
from retro.retrieval import Store
from retro.retrofit import RetrofitConfig, RetrofitForCausalLM, base_tokenizer, open_base, retrofit
from retro.training.loop import fit
from retro.training.settings import RetrofitSettings
from retro.training.setup import TrainingRun, check_start, setup
from retro.training.windows import Windows

START_TOKENS, START_CHUNKS = 16_384, 8

logger = logging.getLogger(__name__)


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Fit as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    A run that finds its own checkpoint in `output` goes on from it. Raises ValueError or OSError for what
    the user can mend.
    """
    settings = load_settings(RetrofitSettings, find_config(config, "retrofit"), list(overrides))
    return fit(prepare_run(settings))


def prepare_run(settings: RetrofitSettings) -> TrainingRun:
    """Open base and data, and fit the base or read what was trained from the last checkpoint."""
    factory = RetrofitModelFactory(settings)
    run = setup(settings, factory.config, factory)
    if run.accelerator.is_main_process:
        run.state.model.print_trainable_parameters()
    return run


class RetrofitModelFactory:
    """How the loop makes its model: from a configuration, or from a checkpoint over the same base. Nothing is loaded
    before `config`.
    """

    def __init__(self, settings: RetrofitSettings):
        self.settings = settings
        if Path(settings.output).resolve() == Path(settings.base).resolve():
            raise ValueError(
                f"output: {settings.output} is the folder of the base, which it would overwrite; give another"
            )
        self.base: PreTrainedModel | None = None
        self.fitted: RetrofitForCausalLM | None = None
        self.store: Store | None = None

    def config(self, settings: RetrofitSettings, store: Store) -> RetrofitConfig:
        """Loads the base, and gives the configuration of it fitted: `settings.model` over what store and settings say.

        Raises ValueError for fields that are unknown or refused, and for a store of another tokenizer.
        """
        revision = {} if settings.revision is None else {"revision": settings.revision}
        self.base = open_base(settings.base, dtype=getattr(torch, settings.base_dtype), **revision)
        check_tokenizer(settings.base, self.base, store)
        self.store = store
        implied = {"chunk_len": store.chunk_len, "num_neighbors": settings.num_neighbors}
        fields = {**implied, **settings.model}
        if fields["chunk_len"] != store.chunk_len:
            raise ValueError(
                f"model.chunk_len: {fields['chunk_len']} is not the store's {store.chunk_len}; leave it out"
            )
        self.fitted = retrofit(self.base, **self._origin(), **fields)
        return self.fitted.config

    def __call__(self, config: RetrofitConfig) -> PreTrainedModel:
        """A model at the start of its training, drawn again with the loop's seed."""
        if self.settings.start:
            started = self.from_pretrained(self.settings.start)
            check_start(Path(self.settings.start), self.store, started.config, config)
            return started
        start_from(self.store, self.fitted)
        return self.fitted

    def from_pretrained(self, folder: str | Path, dtype: Any = None) -> PreTrainedModel:
        """The model of a checkpoint; the base keeps the type of the settings."""
        return RetrofitForCausalLM.from_pretrained(folder, base=self.base)

    def _origin(self) -> dict[str, Any]:
        from retro.retrofit.bases import stored_name

        origin = {"base_name_or_path": stored_name(self.settings.base)}
        return origin if self.settings.revision is None else {**origin, "base_revision": self.settings.revision}


def start_from(store: Store, model: RetrofitForCausalLM) -> None:
    """Give a fitted base its start from a store's text, on the device where it will be trained."""
    model.to(PartialState().device)
    model.start(start_text(store))


def start_text(store: Store) -> Int[Tensor, "q n"]:
    """Some windows from all over a store, without padding, from which the new weights take their start.

    Where the tokenizer puts a bos before a text, each row begins with it, as windows of training do.
    """
    windows = Windows(store, window_len=START_CHUNKS * store.chunk_len)
    wanted = min(len(windows), max(1, START_TOKENS // windows.window_len))
    ids = windows.batch(np.arange(wanted) * len(windows) // wanted)["input_ids"]
    text = ids[ids != store.pad_token_id]
    length = min(len(text), windows.window_len)
    rows = text[: len(text) // length * length].view(-1, length)
    if store.bos_token_id is not None:
        rows[:, 0] = store.bos_token_id
    return rows


def check_tokenizer(base_name: str, base: PreTrainedModel, store: Store) -> None:
    """Raise ValueError unless the store's tokens are the base's; a base without a tokenizer passes with a warning."""
    vocab_size, tokens = base.config.get_text_config().vocab_size, store.num_embeddings
    if tokens > vocab_size:
        raise ValueError(
            f"the store {store.path} has {tokens} tokens, the base {base_name} {vocab_size}; "
            "build a store with the base's tokenizer"
        )
    try:
        vocabulary = base_tokenizer(base_name).get_vocab()
    except (ValueError, TypeError) as error:
        logger.warning("whether the store has the tokenizer of %s is not checked: %s", base_name, error)
        return
    if vocabulary != store.tokenizer.get_vocab():
        raise ValueError(
            f"the store {store.path} was built with another tokenizer than that of the base {base_name}; "
            f"build it with --tokenizer {base_name}"
        )
