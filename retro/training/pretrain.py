"""Pretrain a RETRO, or the same decoder without retrieval, from scratch.

The script train/pretrain.py is the same, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

from retro.common.settings import find_config, load_settings
from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import Store
from retro.training.loop import fit
from retro.training.settings import TrainSettings
from retro.training.setup import setup


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Train as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    A run that finds its own checkpoint in `output` goes on from it. Raises ValueError or OSError for what
    the user can mend.
    """
    settings = load_settings(TrainSettings, find_config(config, "train"), list(overrides))
    return fit(setup(settings, model_config, RetroForCausalLM))


def model_config(settings: TrainSettings, store: Store) -> RetroConfig:
    """The model's configuration: `settings.model` over what store and settings say.

    Raises ValueError for fields that RetroConfig does not know or refuses, or that contradict the store.
    """
    tokenizer = store.tokenizer
    implied = {
        "vocab_size": len(tokenizer),
        "pad_token_id": store.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chunk_len": store.chunk_len,
        "num_neighbors": settings.num_neighbors,
        "max_position_embeddings": settings.window_len,
    }
    fields = {**implied, **settings.model}
    if fields["chunk_len"] != store.chunk_len:
        raise ValueError(f"model.chunk_len: {fields['chunk_len']} is not the store's {store.chunk_len}; leave it out")
    if not settings.retrieval:
        fields["cca_layers"] = []
    preset = fields.pop("preset", None)
    try:
        config = RetroConfig.checked(**fields) if preset is None else RetroConfig.from_preset(preset, **fields)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size: {config.vocab_size} is below the tokenizer's {len(tokenizer)}; leave it out"
        )
    return config
