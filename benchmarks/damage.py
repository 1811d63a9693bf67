"""Does a changed byte mislead? One bit of one file is turned at a time, then all is read again.

The victims are a datastore with all kinds of indexes, a neighbor table and removed documents, and a checkpoint. Files
are drawn with equal chances, then a place in the file. What is read: a store's documents, values, searches of every
kind and a batch of training; a checkpoint as a run goes on from it, and as a model. Outcomes:

    survived     every answer is what it was: the byte is not read, says the same (white space in JSON), or what it
                 belongs to was built again
    refused      an error in one sentence, ValueError or OSError, which names the file; other answers are what they were
    traceback    any other error
    silent       an answer is another one

    python benchmarks/damage.py --tries 300 --checkpoint-tries 200
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import SyntheticKeys, write_synthetic_store

from retro import load
from retro.model import RetroForCausalLM
from retro.retrieval import Store, build_index, build_neighbors, open_neighbors, remove_documents, verify_store
from retro.retrieval.search.index import open_index
from retro.retrieval.search.lexical import build_lexical
from retro.retrieval.search.queries import Queries
from retro.training.checkpoint import last_checkpoint
from retro.training.loop import fit
from retro.training.pretrain import model_config
from retro.training.settings import TrainSettings
from retro.training.setup import setup
from retro.training.windows import Loader, Windows

DIM, WINDOW = 64, 128
DENSE, LEXICAL = ("scann", "faiss:pq"), ("tfidf", "bm25", "tfidf:exact")
Reads = dict[str, Callable[[Path], Any]]
OUTCOMES = ("survived", "refused", "traceback", "silent")


def make_store(path: Path, rows: int, kinds: tuple[str, ...] = DENSE) -> None:
    write_synthetic_store(path, rows, DIM, shard_chunks=rows // 2, seed=0)
    remove_documents(path, ["document 3", "document 17"])
    store = Store.open(path)
    for kind in kinds:
        build_index(store, kind)
    build_lexical(store, "bm25")
    build_lexical(store, "tfidf")
    build_neighbors(store, 2)


def make_run(output: Path, store: Path) -> TrainSettings:
    """A run of four steps with two checkpoints."""
    model = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "cca_layers": [2]}
    model |= {"encoder_num_layers": 1, "retrieved_len": 128}
    settings = TrainSettings(
        output=str(output), store=str(store), model=model, window_len=WINDOW, batch_size=1, max_steps=4, save_every=2
    )
    fit(prepared(settings))
    return settings


def prepared(settings: TrainSettings) -> Any:
    return setup(settings, model_config, RetroForCausalLM)


def store_reads(rows: int, kinds: tuple[str, ...] = DENSE) -> Reads:
    """What is read of a store, each with its answer."""
    keys, drawn = SyntheticKeys(rows, DIM).queries(4), np.random.default_rng(1).integers(0, rows, 8)

    def asked(store: Store) -> Queries:
        return Queries(store.tokenizer, tokens=[np.arange(3 + 5 * q, 30 + 5 * q) for q in range(4)])

    def documents(path: Path) -> Any:
        store = Store.open(path)
        return [vars(store.document(int(row))) for row in store.document_rows(drawn)], store.num_searchable

    def values(path: Path) -> Any:
        store = Store.open(path)
        return store.values(drawn, 128), store.keys(drawn), store.text(drawn)

    def batch(path: Path) -> Any:
        store = Store.open(path)
        windows = Windows(store, open_neighbors(store, k=2), window_len=WINDOW)
        return {name: x.numpy() for name, x in Loader(windows, 8, seed=0).step({"epoch": 0, "window": 0})[0].items()}

    def dense(path: Path, kind: str) -> Any:
        return open_index(Store.open(path), kind).search(keys, 10)

    def lexical(path: Path, kind: str) -> Any:
        store = Store.open(path)
        return build_lexical(store, kind).search(asked(store), 10)

    reads: Reads = {"documents": documents, "values": values, "batch": batch, "exact": partial(dense, kind="exact")}
    reads |= {kind: partial(dense, kind=kind) for kind in kinds} | {one: partial(lexical, kind=one) for one in LEXICAL}
    return reads


def verify_reads() -> Reads:
    return {
        level: lambda path, level=level: verify_store(Store.open(path), level)["chunks"] for level in ("quick", "full")
    }


def run_reads(settings: TrainSettings, store: Path) -> Reads:
    """How a run's folder is read: to go on, and as a model."""

    def resumed(path: Path) -> Any:
        settings.output = str(path)
        run = prepared(settings)
        moments = run.state.optimizer.state_dict()["state"]
        tensors = [tensor.numpy() for moment in moments.values() for tensor in moment.values()]
        return run.state.counters(), _weights(run.state.model), tensors, torch.get_rng_state().numpy()

    def loaded(path: Path, part: Callable[[Path], Path]) -> Any:
        model, tokenizer, _ = load(str(part(path)))
        return (
            _weights(model),
            len(tokenizer),
            tokenizer.encode("w7 w8"),
            model.config.to_diff_dict() | {"_name_or_path": None},
        )

    return {
        "resumed": resumed,
        "checkpoint": partial(loaded, part=lambda path: last_checkpoint(path)),
        "model": partial(loaded, part=lambda path: path),
    }


def _weights(model: torch.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in model.parameters()]


def attack(
    victim: Path, reads: Reads, checks: Reads, tries: int, seed: int, work: Path, files: str = "**/*"
) -> tuple[Counter, Counter, list[str]]:
    """Outcomes, what the checks missed, and what was said of tracebacks and wrong answers."""
    draw, answers = np.random.default_rng(seed), {name: _digest(read(victim)) for name, read in reads.items()}
    found = sorted(file for file in victim.glob(files) if file.is_file() and file.stat().st_size)
    outcomes, missed, said, copy = Counter(), Counter(), [], work / victim.name
    for number in range(tries):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(victim, copy)
        file = copy / found[draw.integers(len(found))].relative_to(victim)
        at, bit = int(draw.integers(file.stat().st_size)), int(draw.integers(8))
        content = bytearray(file.read_bytes())
        content[at] ^= 1 << bit
        file.write_bytes(content)
        where = f"{file.relative_to(copy)}, byte {at}, bit {bit}"
        harmless = file.suffix == ".json" and _same_json(victim / file.relative_to(copy), bytes(content))
        for name, check in checks.items():
            if outcome_of(check, copy, None, said, where) != "refused" and not harmless:
                missed[name] += 1
                said.append(f"{where}: missed by {name}")
        each = [outcome_of(read, copy, answers[name], said, f"{where}: {name}") for name, read in reads.items()]
        outcomes[next(one for one in ("silent", "traceback", "refused", "survived") if one in each)] += 1
        if number % 50 == 49:
            print(f"{victim.name}: {number + 1} of {tries}", dict(outcomes), flush=True)
    return outcomes, missed, said


def outcome_of(read: Callable[[Path], Any], path: Path, answer: str | None, said: list[str], where: str) -> str:
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        if "\n" not in str(error).strip():
            return "refused"
        said.append(f"{where}: {error!r}")
        return "traceback"
    except BaseException as error:
        said.append(f"{where}: {''.join(traceback.format_exception(error)[-3:])}")
        return "traceback"
    if answer in (None, _digest(found)):
        return "survived"
    said.append(f"{where}: another answer")
    return "silent"


def _same_json(sound: Path, content: bytes) -> bool:
    try:
        return json.loads(content) == json.loads(sound.read_bytes())
    except ValueError:
        return False


def _digest(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return hashlib.sha256(repr((value.shape, value.dtype)).encode() + value.tobytes()).hexdigest()
    if isinstance(value, dict):
        return _digest([[key, _digest(one)] for key, one in sorted(value.items())])
    if isinstance(value, (list, tuple)):
        return hashlib.sha256("".join(map(_digest, value)).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=300, help="flips in the store")
    parser.add_argument("--checkpoint-tries", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4000, help="chunks of the store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        store, run, work = Path(folder, "store"), Path(folder, "run"), Path(folder, "work")
        make_store(store, arguments.rows)
        settings, made = make_run(run, store), {}
        made["store"] = attack(
            store, store_reads(arguments.rows), verify_reads(), arguments.tries, arguments.seed, work
        )
        tries, reads = arguments.checkpoint_tries, run_reads(settings, store)
        newest = f"checkpoints/{last_checkpoint(run).name}/**/*"
        made["checkpoint"] = attack(run, reads, {}, tries, arguments.seed, work, newest)
        made["trained folder"] = attack(run, reads, {}, tries // 2, arguments.seed, work, "*")
    print(f"\n{'flips in':16}{'tries':>8}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES) + "   missed by verify")
    for name, (outcomes, missed, said) in made.items():
        print(f"{name:16}{outcomes.total():8}" + "".join(f"{outcomes[one]:12}" for one in OUTCOMES), dict(missed) or "")
        for line in said:
            print("   ", line)
    if arguments.json:
        found = {
            name: {"outcomes": outcomes, "missed": missed, "said": said}
            for name, (outcomes, missed, said) in made.items()
        }
        arguments.json.write_text(json.dumps({"settings": str(vars(arguments)), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
