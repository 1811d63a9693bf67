"""What a folder of ours may touch: names that stay inside it, and no link that leads out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PLAIN = re.compile(r"[^/\\:\x00-\x1f\x7f]+")  # one part of a path; ":" ends a drive


def check_names(where: Any, names: Iterable[Any]) -> None:
    """Refuse a name of a record that is no plain path below the record's folder, such as "../x" or "/x".

    where: what the sentence of the ValueError calls the record.
    """
    for name in names:
        parts = name.split("/") if isinstance(name, str) else [""]
        if not all(_PLAIN.fullmatch(part) and part not in (".", "..") for part in parts):
            raise ValueError(f"{where} names the file {name!r}, which is no plain name in its folder; get it anew")


def check_no_links(root: Path, *names: str) -> None:
    """Refuse a folder of which files below `names` are about to be written or deleted while some of them are links."""
    for name in names:
        check_inside(root / name, root)
        for folder, folders, files in os.walk(root / name):
            for one in (*folders, *files):
                if os.path.islink(os.path.join(folder, one)):
                    check_inside(Path(folder, one), root)


def check_inside(path: Path, root: Path) -> None:
    """ValueError if a path below `root` is a link, or leads through one."""
    if path.resolve() != root.resolve() / path.relative_to(root):
        raise ValueError(
            f"{path} is a link or lies behind one, and nothing outside of {root} is written or deleted; "
            "put the files themselves in its place"
        )
