"""The verbs of training: train, retrofit; and task finetune, see retro.cli.tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def train(config: str, /, *settings: str) -> int:
    """Train a RETRO, or a plain language model, from scratch.

    The same command goes on from the last checkpoint in `output`.

    Arguments:
        config: A YAML file, or the name of a packaged configuration such as train_small; see `retro configs`.
        settings: Settings as key=value, such as store=stores/docs output=runs/a lr=1e-3; they go before those of the
            file. All of them are listed below.
    """
    from retro.training.pretrain import main

    return run_recipe(main, config, settings)


def retrofit(config: str, /, *settings: str) -> int:
    """Teach a pretrained language model to read neighbors; its own weights stay as they are.

    The same command goes on from the last checkpoint in `output`.

    Arguments:
        config: A YAML file, or the name of a packaged configuration such as retrofit_smollm2; see `retro configs`.
        settings: Settings as key=value, such as base=gpt2 store=stores/docs output=runs/fitted; they go before those of
            the file. All of them are listed below.
    """
    from retro.training.retrofit import main

    return run_recipe(main, config, settings)


def run_recipe(main: Callable[[str, Sequence[str]], bool], config: str, settings: Sequence[str]) -> int:
    """Run a recipe to its end, or until it is stopped."""
    if not main(config, settings):
        print("stopped; the same command goes on from the last checkpoint")
    return 0
