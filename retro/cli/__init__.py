"""The command `retro`: one verb, one function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from retro.cli.datastore import add_build, add_neighbors, add_search, add_tokenizer
from retro.cli.measuring import add_baselines, add_evaluate, add_leakage, add_report, add_sweep
from retro.cli.planning import add_plan
from retro.cli.sampling import add_demo, add_generate, add_serve
from retro.cli.searching import add_serve_store
from retro.cli.tasks import add_task
from retro.cli.training import add_retrofit, add_train
from retro.cli.updating import add_add, add_compact, add_remove, add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; what the user can mend is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"retro: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("retro: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retro", description="Language models that read from a datastore.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data, models = (add_build, add_tokenizer, add_neighbors, add_search), (add_train, add_retrofit)
    updates = (add_add, add_remove, add_compact, add_verify, add_plan)
    measures = (add_evaluate, add_leakage, add_sweep, add_baselines, add_task)
    for add in (*data, *updates, *models, *measures, add_report, add_generate, add_serve, add_serve_store, add_demo):
        add(verbs)
    return parser
