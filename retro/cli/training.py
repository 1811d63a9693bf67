"""The verbs of training: train, retrofit."""

from __future__ import annotations

import argparse
from typing import Any

from retro.cli.shared import add_recipe, run_recipe, verb

# train


def add_train(verbs: Any) -> None:
    parser = verb(verbs, "train", train, "train a RETRO, or a plain LM, from scratch")
    add_recipe(parser, "train_small ...", "store=stores/docs output=runs/a lr=1e-3")


def train(args: argparse.Namespace) -> int:
    """Train as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    from retro.training.pretrain import main

    return run_recipe(main, args)


# retrofit


def add_retrofit(verbs: Any) -> None:
    parser = verb(verbs, "retrofit", retrofit, "teach a pretrained LM to read neighbors; its own weights stay")
    add_recipe(parser, "retrofit_smollm2", "base=gpt2 store=stores/docs output=runs/fitted")


def retrofit(args: argparse.Namespace) -> int:
    """RETRO-fit as CONFIG and key=value say. The same command goes on from the last checkpoint in `output`."""
    from retro.training.retrofit import main

    return run_recipe(main, args)
