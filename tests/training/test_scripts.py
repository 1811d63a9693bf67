"""The scripts of train/: they load, and do what the verbs of `retro` do."""

import runpy
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "train").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_reads_what_its_verb_reads(script):
    said = []
    for main in (runpy.run_path(str(script))["main"], import_module(f"retro.training.{script.stem}").main):
        with pytest.raises(FileNotFoundError, match="these are packaged") as error:
            main("nothing")
        said.append(str(error.value))
    assert said[0] == said[1]


def test_there_is_a_script_for_every_recipe():
    assert [script.stem for script in SCRIPTS] == ["finetune", "pretrain", "retrofit"]
