"""Fine-tune a trained RETRO, or what a RETRO-fit added, to answer questions from passages: the loss is on answers only.

    retro task finetune finetune_qa start=runs/fitted store=stores/docs questions=train.json output=runs/qa
    retro task qa runs/qa --data test.json

A text is what `retro task qa` reads: the prompt, filled up in front so that it ends a chunk whose neighbors are the
passages, then one of the answers and its end; a chat's turns where the tokenizer has a chat template. Source: RETRO,
section 4.3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro.common.settings import find_config, load_settings
from retro.training.finetune import FinetuneModelFactory
from retro.training.loop import fit
from retro.training.script import leave, run_script
from retro.training.settings import FinetuneSettings
from retro.training.setup import setup


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Train as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    The parts are the library's; copy this file to change one.
    """
    # what is to be done: defaults <- one YAML file <- key=value
    settings = load_settings(FinetuneSettings, find_config(config, "finetune"), list(overrides))
    # how the trained model to start from is loaded
    factory = FinetuneModelFactory(settings)
    # the device, the store, the model (the last checkpoint, or the one to start from), the questions and their passages
    run = setup(settings, factory.config, factory, factory.windows)
    # every step, with checkpoints; a signal stops it after a step, and the same command goes on
    return fit(run)


if __name__ == "__main__":
    sys.exit(leave(run_script(main)))
