"""The two benchmarks that attack: a few tries each, and that they would tell what they look for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_crashes_kills_and_starts_two_writers(tmp_path):
    given = ["--work", str(tmp_path / "work"), "--only", "build", "--kills", "1", "--disks", "0", "--writers", "1"]
    done = subprocess.run([sys.executable, BENCHMARKS / "crashes.py", *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines() if " of build  " in line)
    told = {name.strip(): outcome.strip() for name, outcome in told.items()}
    assert set(told) == {"kill -9 of build", "two writers of build"}
    assert int(told["kill -9 of build"].removesuffix(" survived")) >= 1
    assert told["two writers of build"] in ("1 refused", "1 survived")


@pytest.fixture
def damage(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import damage

    yield damage
    for name in {"damage", "synthetic"} - before:
        sys.modules.pop(name, None)


def test_damage_turns_bits_and_tells_who_is_misled(damage, tmp_path):
    store = tmp_path / "store"
    damage.make_store(store, 300, kinds=())
    reads = damage.store_reads(300, kinds=())
    outcomes, missed, said = damage.attack(store, reads, damage.verify_reads(), 8, 0, tmp_path / "work")
    assert outcomes.total() == 8 and outcomes["refused"] and set(outcomes) <= {"survived", "refused"}, said
    assert not missed and not said
    unchecked = {"tokens": lambda path: np.load(path / "shards/00000/tokens.npy")}
    outcomes, missed, said = damage.attack(
        store, unchecked, {"nothing": lambda path: None}, 3, 0, tmp_path / "work", "shards/00000/tokens.npy"
    )
    assert outcomes["silent"] and missed["nothing"] == 3 and "another answer" in " ".join(said)
