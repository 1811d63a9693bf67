"""The verbs of training: train, retrofit; and what `retro task finetune` shares with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from cyclopts import Parameter

Config = Annotated[str, Parameter(help="A YAML file, or the name of a packaged configuration; see `retro configs`.")]
KeyValue = Annotated[
    str, Parameter(help="Settings as key=value, which go before those of the file; see the list below.")
]


def train(config: Config, /, *settings: KeyValue) -> int:
    """Train a RETRO, or a plain language model, from scratch.

    An example is `retro train train_small store=stores/docs output=runs/a lr=1e-3`. The same command goes on from
    the last checkpoint in `output`.
    """
    from retro.training.pretrain import main

    return run_recipe(main, config, settings)


def retrofit(config: Config, /, *settings: KeyValue) -> int:
    """Teach a pretrained language model to read neighbors; its own weights stay as they are.

    An example is `retro retrofit retrofit_smollm2 base=gpt2 store=stores/docs output=runs/fitted`. The same command
    goes on from the last checkpoint in `output`.
    """
    from retro.training.retrofit import main

    return run_recipe(main, config, settings)


def run_recipe(main: Callable[[str, Sequence[str]], bool], config: str, settings: Sequence[str]) -> int:
    """Run a recipe to its end, or until it is stopped."""
    from retro.training.sayings import speak
    from retro.training.script import leave

    speak()
    if not main(config, settings):
        print("stopped; the same command goes on from the last checkpoint")
    return leave(0)
