"""Processes that are killed at moments which do not depend on the clock."""

import itertools
import os
import signal
import sys


def count_calls(action) -> int:
    """The calls of functions while `action` runs, those of its threads and processes left out."""
    numbers = itertools.count()
    _at_each_call(lambda: next(numbers))
    try:
        action()
    finally:
        sys.setprofile(None)
    return next(numbers)


def die_at_call(number: int, with_group: bool = False) -> None:
    """SIGKILL this process, or its whole group, at its so-manieth call of a function from now on."""
    numbers, kill = itertools.count(1), os.killpg if with_group else os.kill
    _at_each_call(lambda: next(numbers) == number and kill(os.getpid(), signal.SIGKILL))


def killed_at_call(number: int, action) -> bool:
    """Run `action` in a fork that dies so; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at_call(number)
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _at_each_call(do) -> None:
    sys.setprofile(lambda frame, event, argument: do() if event in ("call", "c_call") else None)
