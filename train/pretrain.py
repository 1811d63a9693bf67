"""Pretrain a RETRO, or the same decoder without retrieval, from scratch.

    retro train train_small store=stores/docs output=runs/small
    accelerate launch train/pretrain.py train_small store=stores/docs output=runs/small
    torchrun --nproc_per_node 2 train/pretrain.py ...

accelerate starts several processes on GPUs only; on CPUs torchrun does, and they talk by gloo.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro.common.settings import find_config, load_settings
from retro.model import RetroForCausalLM
from retro.training.loop import fit
from retro.training.pretrain import model_config
from retro.training.script import leave, run_script
from retro.training.settings import TrainSettings
from retro.training.setup import setup


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Train as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    The parts are the library's; copy this file to change one.
    """
    # what is to be done: defaults <- one YAML file <- key=value
    settings = load_settings(TrainSettings, find_config(config, "train"), list(overrides))
    # the store, windows of its chunks with their neighbors, and a model: a new one, or that of the last checkpoint
    run = setup(settings, model_config, RetroForCausalLM)
    # every step, with validation and checkpoints; a signal stops it after a step, and the same command goes on
    return fit(run)


if __name__ == "__main__":
    sys.exit(leave(run_script(main)))
