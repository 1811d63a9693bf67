"""Where a run may write: a folder of its own, and one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retro.common.files import LOCK_FILE, write_lock
from retro.common.own import check_no_links


def check_output(output: Path) -> None:
    """Refuse an output in which a run would spoil something else, or which another run is writing."""
    place = output.resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is no folder; give another path")
    for taken, what in ((Path.cwd(), "the current folder"), (Path.home(), "the home folder")):
        if place in (taken.resolve(), *taken.resolve().parents):
            raise ValueError(f"output: {output} is {what} or holds it; give a folder of its own, such as runs/a")
    for folder in (place, *place.parents):
        if (folder / "manifest.json").is_file() and (folder / "shards").is_dir():
            raise ValueError(
                f"output: {output} lies in the datastore {folder}; give a folder of its own, such as runs/a"
            )
    if output.is_dir():
        with held(output):
            pass


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold a run's folder, made if it is missing; ValueError if another run has it. A killed holder's is free."""
    output.mkdir(parents=True, exist_ok=True)
    check_no_links(output, "checkpoints")
    with write_lock(output):
        try:
            yield
        finally:
            (output / LOCK_FILE).unlink(missing_ok=True)  # while it is held: of others, who opened it, each looks again
