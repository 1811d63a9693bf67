"""RETRO-fit a pretrained causal LM: the base stays as it is, only what reads the neighbors is trained.

retro retrofit retrofit_smollm2 store=stores/docs output=runs/fitted
accelerate launch train/retrofit.py retrofit_smollm2 store=stores/docs output=runs/fitted
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retro.common.settings import find_config, load_settings
from retro.training.loop import fit
from retro.training.retrofit import RetrofitModelFactory
from retro.training.script import leave, run_script
from retro.training.settings import RetrofitSettings
from retro.training.setup import setup


def main(config: str, overrides: Sequence[str] = ()) -> bool:
    """Fit as a configuration (a file, or a packaged name) and `key=value` say; True if the run reached its last step.

    The parts are the library's; copy this file to change one.
    """
    # what is to be done: defaults <- one YAML file <- key=value
    settings = load_settings(RetrofitSettings, find_config(config, "retrofit"), list(overrides))
    # how the base is loaded and fitted
    factory = RetrofitModelFactory(settings)
    # the device, the store, the frozen base, windows with their neighbors, and what is added, new or as last saved
    run = setup(settings, factory.config, factory)
    if run.accelerator.is_main_process:
        run.state.model.print_trainable_parameters()
    # every step, with validation and checkpoints; a signal stops it after a step, and the same command goes on
    return fit(run)


if __name__ == "__main__":
    sys.exit(leave(run_script(main)))
