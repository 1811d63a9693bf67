"""The benchmark over widths: a whole tiny run where little is installed, and its parts."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from tests.training.runs.conftest import make_store

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "widths.py"
TINY = ["--layers", "2", "--cca-layers", "2", "--window-len", "32", "--batch-size", "4", "--k", "2"]
TINY += ["--set", "model.retrieved_len=16", "warmup_steps=2", "--seed", "1"]
MISSING = "faiss scann datasets jsonargparse wrapt datasketch pyarrow matplotlib sentence_transformers"
BARE = f"""
import sys
for name in "{MISSING}".split():
    sys.modules[name] = None  # imports fail, and nothing is found
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    train = make_store(folder / "train", 30, seed=1)
    return train, make_store(folder / "valid", 8, seed=2, queries_of=train)


@pytest.fixture(scope="module")
def widths():
    spec = spec_from_file_location("benchmark_widths", SCRIPT)
    module = sys.modules["benchmark_widths"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_widths"]


@pytest.fixture
def parse(widths, stores, monkeypatch):
    """parse(*arguments): the arguments of a tiny run."""

    def make(*arguments):
        store, valid = stores
        given = ["widths.py", "--store", str(store), "--valid", str(valid), "--widths", "32", "--tokens", "256", *TINY]
        monkeypatch.setattr(sys, "argv", [*given, *map(str, arguments)])
        return widths.parsed()

    return make


@pytest.fixture
def bench(widths, parse, tmp_path):
    def make(*arguments):
        made = widths.WidthSweep(parse(*arguments, "--json", tmp_path / "widths.json"), str(tmp_path / "none"))
        made.together = False
        return made

    return make


def test_a_tiny_run_needs_little(stores, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    store, valid = stores
    command = [sys.executable, SCRIPT, "--store", store, "--valid", valid, "--widths", 32, "--tokens", 256, *TINY]
    command += ["--points", 2, "--valid-tokens", 50, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.pdf"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "there will be no plot" in done.stdout and not (tmp_path / "out.pdf").exists()
    assert "[d 32 induction LM] 128 tokens" in done.stdout and "ON below the best LM" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["tokens"] for run in found["runs"]] == [256, 256]
    assert [(row["data"], row["tokens"]) for row in found["points"]] == [("points", 128), ("points", 256), ("end", 256)]
    assert found["measured_on"]["points"]["tokens"] < found["measured_on"]["end"]["tokens"]
    (row,) = found["table"]
    assert set(row["seconds"]) == {"LM", "RETRO"} and row["best_lm"] == "induction"
    for one in row["chunks"].values():
        assert set(one["bpb"]) == {"lm", "best_lm", "retro_off", "retro_on", "retro_on_random"}
        assert set(one["gain"]) == {"ON below its LM", "ON below the best LM", "ON below random", "OFF below its LM"}
    assert all(low <= value <= high for value, low, high in row["chunks"]["all"]["gain"].values())


def test_starts_and_settings(widths, parse):
    given = parse("--starts", "induction", "random", "no-multiplier", "--set", "weight_decay=1e-3", "lr_width=64")
    recipe = widths.settings_of(given, 512, "induction", True)
    assert recipe.model["num_attention_heads"] == 8 and recipe.model["cca_init"] == "induction"
    assert widths.settings_of(given, 128, "induction", True).model["num_attention_heads"] == 4
    assert (recipe.weight_decay, recipe.lr_width, recipe.seed) == (1e-3, 64, 1)
    paper = widths.settings_of(parse("--starts", "random"), 512, "random", True)
    assert paper.lr_width is None and paper.lr == recipe.lr * 128 / 512, "one rate for all its weights"
    assert paper.model["cca_init"] == "random" and not paper.model["smeared_keys"] and paper.lr_ratios == {}
    assert widths.settings_of(given, 512, "no-multiplier", False).model["embedding_multiplier"] == 1
    with pytest.raises(ValueError, match="no multiple of its head size 32"):
        widths.settings_of(given, 100, "induction", True)
    with pytest.raises(ValueError, match="did you mean weight_decay"):
        widths.settings_of(parse("--set", "weigth_decay=1"), 32, "induction", True)


def test_a_validation_store_is_scored_as_its_documents_are(widths, stores, make_model):
    from retro.evaluation import prepare, score
    from retro.retrieval import Store, open_neighbors
    from retro.text.corpus import read_documents

    store, valid = map(Store.open, stores)
    data = widths.evaluation_data(store, valid, 1, None)
    documents = prepare(read_documents([f"{valid.path}.jsonl"]), valid.tokenizer, valid.chunk_len)
    for name in ("tokens", "lens", "num_bytes", "scored", "documents"):
        assert np.array_equal(getattr(data, name), getattr(documents, name)), name
    assert np.array_equal(data.rows, open_neighbors(store, valid).rows[:, :1]) and data.leak_rows.shape[1] == 2
    part, to_score = widths.part_of(data, 32, int(data.scored.sum()) // 3)
    model = make_model(vocab_size=len(valid.tokenizer), chunk_len=valid.chunk_len, max_position_embeddings=32)
    whole, some = (score(model, one, window_len=32).bits for one in (data, to_score))
    counted, found = part.scored.any(-1), {}
    for number, bits_of_chunk in enumerate(whole):
        found.setdefault((data.documents[number], data.tokens[number].tobytes()), []).append(bits_of_chunk)
    assert 0 < counted.sum() < len(data.tokens)
    for number in np.flatnonzero(counted):
        document = int(part.document_ids[part.documents[number]])
        expected = found[document, part.tokens[number].tobytes()]
        assert any(np.isclose(some[number], one, rtol=1e-4) for one in expected)


def test_time_is_shared_so_that_all_runs_of_a_width_see_as_many_tokens(widths, bench):
    costs = [(128, 10.0, 0.01), (128, 20.0, 0.02), (256, 10.0, 0.03), (256, 20.0, 0.04)]
    assert widths.affordable(costs, 160, together=False) == {128: 1000, 256: 1000}
    assert widths.affordable(costs, 220, together=True) == {128: 10_000, 256: 5000}
    made = bench("--widths", "32", "64", "--minutes", "1", "--tokens", "10000")
    for trial in made.trials[:3]:
        trial.about["speed"] = {"setup": 1.0, "token": 0.1, "scored": 0.0}
    made.share_out(1003)
    assert {trial.settings.max_tokens for trial in made.trials[:3]} == {1000 / 0.3 // 128 * 128}
    assert made.trials[3].is_lost  # nobody knows how fast it is
    with pytest.raises(ValueError, match="leaves no time to train at width 32"):
        made.share_out(4)


def test_what_is_known_stays_when_a_run_fails(widths, bench, tmp_path, capsys):
    made = bench("--starts", "induction", "random")
    size = len(made.data["end"].tokens)
    for trial, cost in zip(made.trials, (2.0, None, 1.0, 1.5), strict=True):
        if cost is None:
            made.take(trial, "failed", {"failed": "out of memory"})
            continue
        made.take(trial, "started", {"parameters": 1, "steps": 2, "tokens": 256})
        columns = ("retro_off", "retro_on") if trial.settings.retrieval else ("lm",)
        scores = {column: widths.ChunkScores(np.full(size, cost), 0.0) for column in columns}
        made.take(trial, "point", {"data": "end", "tokens": 256, "scores": scores, "loss": 1.0, "seconds": 3.0})
        trial.about["seconds"] = 3.0
    first, second = made.table()
    assert set(first["chunks"]["all"]["bpb"]) == {"lm", "best_lm"} and first["best_lm"] == "random"
    assert second["chunks"]["all"]["gain"]["ON below its LM"][0] == pytest.approx(-0.5)
    widths.show(made.table())
    assert "[d 32 induction RETRO] failed: out of memory" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    widths.plot(list(made.rows.values()), tmp_path / "gain.svg")
    assert "d 32, random" in (tmp_path / "gain.svg").read_text()
    written = json.loads((tmp_path / "widths.json").read_text())
    assert written["runs"][1]["failed"] == "out of memory" and len(written["points"]) == 2
