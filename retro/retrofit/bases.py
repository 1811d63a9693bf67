"""Opening a base: by Hugging Face name, folder, GGUF file, the GGUF file of an installed package, or an object."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

from retro.common.pretrained import (
    PACKAGE,
    check_folder,
    check_kernels,
    check_weights,
    first_line,
    own_code,
    pretrained_place,
)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
LOADING = RLock()  # from_pretrained swaps functions of torch: of two at once, both fail, and each that follows


def open_base(base: Any, /, **options) -> Any:
    """The causal LM that `base` names, in evaluation mode; an object is returned as it is.

    Args:
        base: A Hugging Face name, a folder, a GGUF file, or "package:NAME" for the GGUF file that an installed
            package holds (nothing of it is imported); or a model.
        options: As for AutoModelForCausalLM.from_pretrained: dtype, revision, device_map, attn_implementation,
            quantization_config ...

    Raises ValueError, in one sentence, for a base that cannot be loaded.
    """
    if not isinstance(base, (str, Path)):
        return base
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place, gguf = pretrained_place(base)
    options |= {"trust_remote_code": False, **(gguf or {"use_safetensors": True})}
    try:
        if not gguf:
            _check(place, options)
        with LOADING:
            return AutoModelForCausalLM.from_pretrained(place, **options).eval()
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{base} holds a damaged model ({error}); copy it again from where it was trained.") from None
    except (OSError, ImportError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(_sentence("base", base, error)) from None


def _check(place: str, options: dict[str, Any]) -> None:
    """Refuse what a place, or the base that its adapter names, asks for: see `check_kernels` and `check_weights`."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    asked = {name: options[name] for name in IMPLEMENTATIONS if name in options}
    where = {name: options[name] for name in (*HUB_OPTIONS, "revision", "subfolder") if name in options}

    def find(place: str, name: str) -> str | None:
        return cached_file(place, name, _raise_exceptions_for_missing_entries=False, **where)

    places, adapter = [place], find(place, "adapter_config.json")
    if adapter is not None:
        named = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        places += [named] if named else []
    for place in places:
        folder = Path(place, options.get("subfolder") or "")
        check_folder(folder)
        if find(place, "config.json") is None:
            check_weights(folder, lambda: None)
            continue
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **where, **asked)
        if config.model_type != "retrofit":  # which opens its base by itself
            check_kernels(config, f"config.json of {place}", asked.values())
            check_weights(folder, partial(random_base, config))


def random_base(config: Any, attn_implementation: str | None = None) -> Any:
    """A causal LM of random weights."""
    from transformers import AutoModelForCausalLM

    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **chosen)


def base_tokenizer(base: str | Path) -> Any:
    """The tokenizer that comes with a base given by name, folder, GGUF file or package."""
    from transformers import AutoTokenizer

    place, gguf = pretrained_place(base)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **gguf)
    except Exception as error:  # tokenizers raises no other
        raise ValueError(_sentence("tokenizer", base, error)) from None


def stored_name(base: Any) -> str | None:
    """Under which name a fitted folder remembers its base: local paths are made absolute."""
    if not isinstance(base, (str, Path)):
        base = getattr(base, "name_or_path", None) or None
    if base is None or str(base).startswith(PACKAGE):
        return base
    return str(Path(base).resolve()) if Path(base).exists() else str(base)


def find_base(name: str, folder: str | Path) -> str:
    """Where a fitted folder's base lies now: under its name, or, where both were moved, beside the folder as before.

    Raises ValueError for a local path that is neither.
    """
    path = Path(name)
    if not path.is_absolute() or path.exists():
        return name
    above = Path(folder).resolve().parents
    for start in range(1, len(path.parts)):
        for parent in above:
            if parent.joinpath(*path.parts[start:]).exists():
                return str(parent.joinpath(*path.parts[start:]))
    raise ValueError(
        f"{folder} names the base {name}, which is not there; put it beside the folder, or say where it is: --base, or "
        "from Python base=."
    )


def config_to_keep(base: Any) -> Any:
    """A copy of a base's configuration, without where its file lay."""
    config = copy.deepcopy(base.config)
    config.name_or_path = ""
    if hasattr(config, "quantization_config") and not is_quantized(config):
        del config.quantization_config
    return config


def is_quantized(config: Any) -> bool:
    """Whether a base is held in few bits. One of a GGUF file is not: that is the type of the file."""
    quantization = getattr(config, "quantization_config", None)
    return quantization is not None and not str(getattr(quantization, "quant_method", "")).lower().endswith("gguf")


def _sentence(what: str, base: Any, error: Exception) -> str:
    if isinstance(error, ValueError) and (said := own_code(base)):
        return f"{what}: {said}"
    return f"{what}: {base} cannot be loaded ({first_line(error)}); give a Hugging Face name, a folder or a GGUF file."
