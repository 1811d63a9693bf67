"""The command `retro`: one verb, one function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Group, Parameter

from retro.cli.configs import configs
from retro.cli.datastore import build, neighbors, plan, search, tokenizer
from retro.cli.measuring import (
    baselines,
    evaluate,
    leakage,
    report,
    sweep_datastore,
    sweep_models,
    sweep_neighbors,
    sweep_tokens,
)
from retro.cli.options import recipe_help, shown_default
from retro.cli.sampling import demo, generate
from retro.cli.serving import serve, serve_store
from retro.cli.tasks import finetune, lambada, lm_eval, qa, recall, summaries
from retro.cli.training import retrofit, train
from retro.cli.updating import add, compact, remove, verify
from retro.common.devices import DEVICE, DTYPE
from retro.common.extras import EXTRAS, missing
from retro.training.settings import FinetuneSettings, RetrofitSettings, TrainSettings
from retro.version import __version__

_SWEEP = App("sweep", help="Measure bits per byte over neighbors, datastore size, models or training tokens.")
_TASK = App("task", help="Measure tasks with right answers, or train a model for one.")
_VERBS: dict[str, tuple[Callable | App, ...]] = {
    "Datastore": (plan, build, tokenizer, neighbors, search, add, remove, compact, verify),
    "Training": (train, retrofit),
    "Text": (generate, demo),
    "Measuring": (evaluate, leakage, _SWEEP, baselines, _TASK, report),
    "Serving": (serve, serve_store),
    "Help": (configs,),
}
_RECIPES = {train: TrainSettings, retrofit: RetrofitSettings, finetune: FinetuneSettings}


def _app() -> App:
    """The verbs in their groups and order."""
    app = App(
        name="retro",
        help="Language models that read from a datastore.",
        version=__version__,
        default_parameter=Parameter(consume_multiple=(1, None), negative=(), show_default=shown_default),
        result_action="return_value",
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        print_error=False,
    )
    for number, (name, verbs) in enumerate(_VERBS.items(), start=1):
        group = Group(name, sort_key=number)
        for verb in verbs:
            _add(app, verb, group)
    app["--help"].group = app["--version"].group = group
    for verb in (sweep_neighbors, sweep_datastore, sweep_models, sweep_tokens):
        _add(_SWEEP, verb, drop="sweep_")
    for verb in (lambada, summaries, qa, recall, lm_eval, finetune):
        _add(_TASK, verb)
    return app


def _add(app: App, verb: Callable | App, group: Group | None = None, drop: str = "") -> None:
    """Add a verb; its name is that of its function, without the word to drop."""
    if not isinstance(verb, App):
        added = App(verb.__name__.removeprefix(drop).replace("_", "-"))
        added.help_epilogue = recipe_help(_RECIPES[verb]) if verb in _RECIPES else None
        added.default(verb)
        verb = added
    verb.group, verb.sort_key = group, len(list(app))
    app.command(verb)


app = _app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; what the user can mend is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _prepare_terminal()
    words, before = sys.argv[1:] if argv is None else list(argv), dict(os.environ)
    try:
        for word in words:
            _check_text(word)
        code = app(words) or 0
        sys.stdout.flush()  # so that a reader that has gone is noticed here
        return code
    except CycloptsError as error:
        return _refuse(f"{error} See {' '.join(['retro', *(error.command_chain or ())])} --help.")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _refuse(missing(error.name, "this"))
    except BrokenPipeError:  # as in `retro search ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:
        from retro.common.files import os_error_text

        if error.errno == errno.ENOSPC and error.filename is None:  # nor has the interpreter's end any place for it
            error.filename = "standard output"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _refuse(os_error_text(error))
    except KeyboardInterrupt:
        print("retro: stopped", file=sys.stderr)
        return 130
    finally:
        for name in (DEVICE, DTYPE):  # of this verb alone
            os.environ.pop(name, None)
            os.environ |= {name: before[name]} if name in before else {}


def _prepare_terminal() -> None:
    """What a terminal cannot show is shown as ?; help wants a few columns, or it never ends; bars are for terminals."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # those of other libraries
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if os.environ.get("COLUMNS") in ("0", "1", "2", "3", "4"):
        del os.environ["COLUMNS"]


def _check_text(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the argument {word!r} is no UTF-8 text; write it in UTF-8, or set PYTHONUTF8=1.") from None


def _refuse(reason: str) -> int:
    print(f"retro: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2
