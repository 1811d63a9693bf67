"""Writing a fitted model: its new weights, and of the base what no other place gives."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro.retrofit.bases import config_to_keep, is_quantized, open_base
from retro.retrofit.fingerprint import adapter_prefixes, differing_kind, fingerprint

logger = logging.getLogger(__name__)

BASE_PREFIX = "base."


def prepare_save(
    model: Any, weights: dict[str, Tensor], folder: str | Path, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights that a fitted folder must hold; the model's configuration then says where the base is.

    Those of the base belong to it, as a whole, where its name gives others or it has none; those of its adapter always.
    Raises ValueError for what could not be loaded again.
    """
    base, config = model.base, model.config
    for name in ("variant", "distributed_checkpoint"):
        if options.get(name):
            raise ValueError(f"{name} is {options[name]!r}, and a fitted folder has one file format; leave it out.")
    if config.base_name_or_path is not None and Path(folder).resolve() == Path(config.base_name_or_path).resolve():
        raise ValueError(f"{folder} is the folder of the base, which would be overwritten; save to another.")
    prefixes = _checked_adapters(model)
    own = {name.removeprefix(BASE_PREFIX): x for name, x in weights.items() if name.startswith(BASE_PREFIX)}
    own = own or base.state_dict()
    found = fingerprint(base, own)
    config.base_config, config.base_adapters = config_to_keep(base), _adapter_configs(base)
    if _is_untied(base, own):
        config.tie_word_embeddings = config.base_config.tie_word_embeddings = False
    dtype = str(base.dtype).removeprefix("torch.")
    if config.base_fingerprint is None or dtype != config.base_dtype:
        config.base_dtype, config.base_fingerprint = dtype, _of_named(model)
    is_named = config.base_name_or_path is not None and config.base_fingerprint is not None
    if not found and not is_named:
        raise ValueError(
            "the base's weights are not in memory (the meta device); load it without offloading to save it."
        )
    if not is_named or (found and differing_kind(found, config.base_fingerprint, exact=True)):
        if is_quantized(base.config):
            raise ValueError(
                f"the base is quantized, and not as {config.base_name_or_path or 'any place'} gives it; save it alone "
                "(model.base.save_pretrained), open it from there and fit that."
            )
        config.base_name_or_path, config.base_revision, config.base_fingerprint = None, None, found
        logger.warning("the base is not what a name gives: its weights are written beside the new ones")
    whole = config.base_name_or_path is None
    of_base = {f"{BASE_PREFIX}{name}": x for name, x in own.items() if whole or name.startswith(prefixes)}
    return {name: x for name, x in weights.items() if not name.startswith(BASE_PREFIX)} | of_base


def _of_named(model: Any) -> dict[str, float] | None:
    """The fingerprint of what the base's name gives, in the base's type; None where it gives nothing."""
    config, base = model.config, model.base
    if config.base_name_or_path is None:
        return None
    options = {"dtype": base.dtype, **quantization_of(config)}
    if "quantization_config" in options:
        options["device_map"] = {"": base.device}
    if config.base_revision is not None:
        options["revision"] = config.base_revision
    try:
        with torch.random.fork_rng(devices=[]):
            return fingerprint(open_base(config.base_name_or_path, **options)) or None
    except ValueError:
        return None


def quantization_of(config: Any) -> dict[str, Any]:
    """How a base is quantized while it is loaded, as from_pretrained takes it; nothing where it is not."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    quantization = getattr(config.base_config, "quantization_config", None)
    if quantization is None:
        return {}
    given = AutoQuantizationConfig.from_dict(quantization) if isinstance(quantization, dict) else quantization
    return {"quantization_config": given}


def _is_untied(base: Any, own: dict[str, Tensor]) -> bool:
    """Whether output embeddings have weights of their own, whatever the configuration says."""
    names = {module: f"{name}.weight" for name, module in base.named_modules()}
    both = [own.get(names.get(module)) for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    return all(x is not None for x in both) and (both[0].shape != both[1].shape or not torch.equal(*both))


# Adapters


def _checked_adapters(model: Any) -> tuple[str, ...]:
    """How the names of the base's adapter weights begin; ValueError for adapters that could not be loaded again."""
    base, prefixes = model.base, adapter_prefixes(model.base)
    configs = getattr(base, "peft_config", {}) if prefixes or hasattr(base, "prompt_encoder") else {}
    if adapter_prefixes(model.form) or (prefixes and not configs):
        raise ValueError(
            "adapters lie around the fitted model; save the PEFT model that holds them, or the fitted model after "
            "merge_and_unload()."
        )
    copied = any(hasattr(layer, "original_module") for layer in base.modules())
    if len(configs) > 1 or copied or any(one.is_prompt_learning for one in configs.values()):
        kinds = ", ".join(f"{name} ({one.peft_type.value})" for name, one in configs.items())
        raise ValueError(
            f"the base carries the adapters {kinds}; a fitted folder holds one, without prompts and modules_to_save: "
            "fit the base after merge_and_unload(), or save the adapters alone."
        )
    if any(getattr(layer, "merged", False) for layer in base.modules()):
        raise ValueError("the base's adapter is merged, but still there; call unmerge_adapter() or merge_and_unload().")
    return prefixes


def _adapter_configs(base: Any) -> dict[str, dict] | None:
    if not adapter_prefixes(base):
        return None
    return {name: json.loads(json.dumps(one.to_dict(), default=list)) for name, one in base.peft_config.items()}
