"""Reading a fitted folder again: which options are whose, whether the base is the one, and the new weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from retro.retrofit.config import RetrofitConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
AUTO_OPTIONS = ("_from_auto", "_commit_hash", "adapter_kwargs", "torch_dtype")  # what AutoModel adds


def split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the hub, which hold for folder and base alike, and those for loading the base."""
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in (*HUB_OPTIONS, *AUTO_OPTIONS)}
    return hub, rest


def check_base(config: RetrofitConfig, base: nn.Module) -> None:
    """Raise ValueError, naming the field, for another base than the one that was fitted."""
    mine, given = config.base_config.get_text_config(), base.config.get_text_config()
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(mine, name, None) != getattr(given, name, None):
            raise ValueError(
                f"base has {name} {getattr(given, name, None)}, the one that was fitted {getattr(mine, name, None)}; "
                f"give that base{f', {config.base_name_or_path}' if config.base_name_or_path else ''}."
            )


def load_new_weights(model: nn.Module, folder: str, hub: dict[str, Any]) -> None:
    """Put a folder's weights into the form. Raises ValueError, naming one, if some are missing or left over."""
    state = {}
    for file in _weight_files(folder, hub):
        state |= load_file(file)
    own = dict(model.form.state_dict(prefix="form."))
    for name in sorted(own.keys() ^ state.keys()):
        side = "lacks" if name in own else "holds"
        raise ValueError(f"{folder} {side} the weight {name}, unlike its config.json; copy the folder again.")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(state[name].shape)}, its config.json says {list(tensor.shape)}; "
                "copy the folder again."
            )
    for name, parameter in model.form.named_parameters():
        parameter.data = state[f"form.{name}"].to(parameter.device)
    for name, buffer in model.form.named_buffers():
        if f"form.{name}" in state:
            buffer.copy_(state[f"form.{name}"])


def _weight_files(folder: str, hub: dict[str, Any]) -> list[Path]:
    whole = cached_file(folder, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}; give the folder that save_pretrained wrote.")
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cached_file(folder, name, **hub)) for name in names]
