"""A recipe as a script."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import distributed

from retro.training.sayings import speak


def run_script(main: Callable[[str, Sequence[str]], bool]) -> int:
    """Run a recipe as a script: its arguments are CONFIG key=value ...; a user's error is one line and exit code 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: {Path(sys.argv[0]).name} CONFIG [key=value ...]", file=sys.stderr)
        print("retro train, retrofit and task finetune list the settings with --help", file=sys.stderr)
        return 0 if len(sys.argv) > 1 else 2
    speak()
    try:
        if not main(sys.argv[1], sys.argv[2:]):
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def leave(code: int) -> int:
    """The exit code of a process that has trained; one of several ends here, without taking the interpreter down.

    The threads of a process group free tensors whenever they get to it. One that does so while the interpreter goes
    down aborts a process whose work is done and saved (pytorch/pytorch#179291), and torchrun reports a failed run.
    """
    if distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
