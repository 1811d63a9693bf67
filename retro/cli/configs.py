"""The verb that lists the packaged configurations: configs."""

from __future__ import annotations

import re
from pathlib import Path

from retro.common.settings import find_config, packaged_configs

VERBS = {"train": "retro train", "retrofit": "retro retrofit", "finetune": "retro task finetune"}


def configs(name: str | None = None, /) -> None:
    """List the packaged configurations, or print one of them.

    Arguments:
        name: The configuration to print. Default: all are listed, with the verb that reads each, what it is for and
            what it costs.
    """
    if name is not None:
        print(find_config(name).read_text(encoding="utf-8"), end="")
        return
    for file in packaged_configs():
        purpose, cost = about(file)
        print(f"{VERBS[file.stem.partition('_')[0]]} {file.stem}\n    {purpose}")
        if cost:
            print(f"    Cost: {cost}")


def about(file: Path) -> tuple[str, str]:
    """What a configuration is for, the first sentence of its head comment; and what it costs, if the head says it."""
    head = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    text = " ".join(head)
    cost = re.search(r"Costs: (.*?)(?: (?:Gave|Not run)\b|$)", text)
    return re.match(r".*?[.:](?= [A-Z`]|$)", text)[0].rstrip(":"), cost[1] if cost else ""
