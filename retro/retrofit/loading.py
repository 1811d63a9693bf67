"""Reading a fitted folder again: which options are whose, whether the base is the one, and the new weights."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from retro.common.files import load_json
from retro.common.own import check_names
from retro.common.pretrained import check_folder, check_kernels, check_num_weights, named_kernels
from retro.common.values import check_record
from retro.retrofit.bases import HUB_OPTIONS, IMPLEMENTATIONS, LOADING, find_base, is_quantized, open_base, random_base
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.fingerprint import adapter_prefixes, differing_kind, fingerprint
from retro.retrofit.saving import BASE_PREFIX, quantization_of

logger = logging.getLogger(__name__)
FOLDER_OPTIONS = ("revision", "subfolder")  # of the folder; the configuration has those of the base
AUTO_OPTIONS = ("_from_auto", "_commit_hash", "adapter_kwargs", "torch_dtype")  # what AutoModel adds


def split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for finding the folder's files, and those for finding and loading the base.

    Raises ValueError for use_safetensors=False.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors is False, but pickled weights, which could run code, are not read.")
    find = {name: kwargs[name] for name in (*HUB_OPTIONS, *FOLDER_OPTIONS) if kwargs.get(name) is not None}
    rest = {name: value for name, value in kwargs.items() if name not in (*FOLDER_OPTIONS, *AUTO_OPTIONS)}
    return find, rest


def read_fit(
    folder: str | Path | None,
    hub: dict[str, Any],
    options: dict[str, Any],
    config: RetrofitConfig | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> tuple[RetrofitConfig, dict[str, Tensor]]:
    """The configuration and all weights of a fitted folder, but for what is given in place of its own.

    Raises ValueError where the folder's own configuration, and no argument, names code on the hub.
    """
    if folder is None and (config is None or state_dict is None):
        raise ValueError("no folder is given; give one, or both config and state_dict.")
    asked = {name: options[name] for name in IMPLEMENTATIONS if options.get(name) is not None}
    given = {} if config is None else named_kernels(config)  # AutoModel puts there what its caller asks for
    own = named_kernels(read_config(str(folder), hub)) if given and folder is not None else {}
    config = read_config(str(folder), hub) if config is None else config
    for name, value in asked.items():
        setattr(config, f"_{name}", value)
    check_kernels(config, f"config.json of {folder}", {*asked.values(), *(given.keys() - own.keys())})
    return config, read_weights(str(folder), hub) if state_dict is None else state_dict


def read_config(folder: str, hub: dict[str, Any]) -> RetrofitConfig:
    """The configuration of a fitted folder; ValueError for a folder of another model."""
    check_folder(Path(folder, hub.get("subfolder", "")))
    kind = RetrofitConfig.get_config_dict(folder, **hub)[0].get("model_type")
    if kind != RetrofitConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind}, no RETRO-fitted model; open it with AutoModelForCausalLM, or fit it."
        )
    return RetrofitConfig.from_pretrained(folder, **hub)


def open_fitted_base(
    config: RetrofitConfig, base: Any, weights: dict[str, Tensor], folder: str, options: dict[str, Any]
) -> nn.Module:
    """The base of a fitted folder with its adapter: given, in the folder itself, or where it says.

    options: as for `open_base`. Raises ValueError for a base that is missing, or another than the one that was fitted.
    """
    if config._attn_implementation is not None:  # AutoModel puts it there
        options.setdefault("attn_implementation", config._attn_implementation)
    own = {_plain_name(name): x for name, x in weights.items() if name.startswith(BASE_PREFIX)}
    form_bytes = sum(x.numel() * x.element_size() for name, x in weights.items() if not name.startswith(BASE_PREFIX))
    check_num_weights(lambda: random_base(config).form, form_bytes, f"config.json of {folder}")
    options = {"dtype": config.base_dtype or "auto"} | options
    if base is None and config.base_name_or_path is None:
        return _add_adapter(config, _own_base(config, own, folder, options), own)
    if base is None or isinstance(base, (str, Path)):
        place = find_base(config.base_name_or_path, folder) if base is None else str(base)
        if base is None and config.base_revision is not None:
            options["revision"] = config.base_revision
        base = open_base(place, **_quantization(config, place, options), **options)
    check_base(config, base)
    return _add_adapter(config, base, own)


def _own_base(config: RetrofitConfig, own: dict[str, Tensor], folder: str, options: dict[str, Any]) -> nn.Module:
    """The base whose weights are in the folder."""
    weights = {name: x for name, x in own.items() if not _of_adapter(config, name)}
    if not weights:
        raise ValueError(f"{folder} holds no base and names none; give it: from_pretrained(..., base=...).")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
    stored = sum(x.numel() * x.element_size() for x in weights.values())
    check_num_weights(lambda: random_base(config.base_config), stored, f"config.json of {folder}")
    given = {"config": copy.deepcopy(config.base_config), "state_dict": weights, "output_loading_info": True}
    with LOADING:
        base, info = kind.from_pretrained(None, **given, **options)
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks the weight {BASE_PREFIX}{name} of its base; copy the folder again.")
    return base.eval()


def _quantization(config: RetrofitConfig, place: str, options: dict[str, Any]) -> dict[str, Any]:
    """How the base was quantized while it was loaded; nothing where its place says so itself."""
    if not is_quantized(config.base_config) or "quantization_config" in options:
        return {}
    hub = {name: options[name] for name in (*HUB_OPTIONS, "revision") if name in options}
    stored = AutoConfig.from_pretrained(place, trust_remote_code=False, **hub)
    return {} if hasattr(stored, "quantization_config") else quantization_of(config)


def check_base(config: RetrofitConfig, base: nn.Module) -> None:
    """Raise ValueError, naming the field, for another base than the one that was fitted."""
    mine, given = config.base_config.get_text_config(), base.config.get_text_config()
    remedy = f"give that base{f', {config.base_name_or_path}' if config.base_name_or_path else ''}."
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(mine, name, None) != getattr(given, name, None):
            raise ValueError(
                f"base has {name} {getattr(given, name, None)}, the one that was fitted {getattr(mine, name, None)}; "
                f"{remedy}"
            )
    for name, value in _computing(given).items():
        if value != (fitted := _computing(mine).get(name, value)):
            logger.warning(
                "base has %s %s, the one that was fitted %s; unless that is meant, %s", name, value, fitted, remedy
            )
    if config.base_fingerprint is None:
        return
    quantized = is_quantized(config.base_config) or is_quantized(base.config)
    exact = not quantized and str(base.dtype).removeprefix("torch.") == config.base_dtype
    found = fingerprint(base)
    kind = differing_kind(found, config.base_fingerprint, exact)
    if found and kind is not None:
        raise ValueError(
            f"base {getattr(base, 'name_or_path', '') or type(base).__name__} has other weights ({kind}) than the one "
            f"that was fitted, though its sizes are the same; {remedy}"
        )


def _computing(config: PreTrainedConfig) -> dict[str, Any]:
    """What may change what a base computes, its weights apart."""
    beside = {*PreTrainedConfig().to_dict(), "initializer_range", "quantization_config", "use_cache"}
    fields = config.to_dict().items()
    return {name: x for name, x in fields if name not in beside and not re.search("_dropout|dropout_|_token_id$", name)}


def _add_adapter(config: RetrofitConfig, base: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The base with its adapter again, in the place of what one of that name in a base that was given holds."""
    if not config.base_adapters:
        return base
    from peft import PeftConfig

    if not adapter_prefixes(base):
        for name, fields in config.base_adapters.items():
            base.add_adapter(PeftConfig.from_peft_type(**fields), name)
    prefixes = adapter_prefixes(base)
    own = {_plain_name(name): x for name, x in base.named_parameters() if name.startswith(prefixes)}
    for name in sorted(own.keys() ^ {name for name in weights if _of_adapter(config, name)}):
        raise ValueError(
            f"the base's adapter has the weight {name} on one side only; give a base without adapters, and the PEFT "
            "that the folder was saved by."
        )
    for name, x in own.items():
        x.data = weights[name].to(x.device)
    return base.eval()


def _of_adapter(config: RetrofitConfig, name: str) -> bool:
    if not config.base_adapters:
        return False
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return any(f".{PEFT_TYPE_TO_PREFIX_MAPPING[one['peft_type']]}" in name for one in config.base_adapters.values())


def _plain_name(name: str) -> str:
    """The name of a weight in the base itself, without what PEFT puts around it."""
    return name.removeprefix(BASE_PREFIX).removeprefix("base_model.model.").replace(".base_layer.", ".")


def read_weights(folder: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """All weights of a folder by name; ValueError if there are none, or a file of them is damaged."""
    weights = {}
    for file in _weight_files(folder, hub):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); copy the folder again.") from None
    return weights


def load_new_weights(model: nn.Module, folder: str, weights: dict[str, Tensor]) -> None:
    """Put a folder's weights into the form. Raises ValueError, naming one, if some are missing or left over."""
    own = dict(model.form.state_dict(prefix="form."))
    state = {name: x for name, x in weights.items() if not name.startswith(BASE_PREFIX)}
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


def nothing_missing() -> dict[str, Any]:
    """What Hugging Face tells of weights that are loaded whole, as those of a fit are, or not at all."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def load_generation_config(model: Any, folder: str | Path | None, hub: dict[str, Any]) -> None:
    """What generate() does unless told otherwise, where the folder says so."""
    if folder is None:
        return
    if cached_file(folder, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(folder, **hub)


def _weight_files(folder: str, hub: dict[str, Any]) -> list[Path]:
    whole = cached_file(folder, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}; give the folder that save_pretrained wrote.")
    names = check_record(index, load_json(Path(index)), {"weight_map": dict[str, str]})["weight_map"]
    names = sorted(set(names.values()))
    check_names(index, names)
    return [Path(cached_file(folder, name, **hub)) for name in names]
