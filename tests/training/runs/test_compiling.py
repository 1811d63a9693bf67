"""Runs through torch.compile: one graph from the first step to the last, and the run that it would be without."""

import pytest
import torch
from safetensors.torch import load_file

from retro.training import compiling
from retro.training.compiling import wants_compile
from retro.training.loop import fit
from tests.training.runs.test_loop import TRACED, assert_same_run, metrics, run_pair, stop_after

# drops make missing neighbors, documents are packed, the last window of an epoch is padded, and there are two epochs
CHANGES = dict(max_steps=14, drop_neighbors=0.3, lr=1e-3, log_every=1, gradient_accumulation_steps=2)
CHANGES |= dict(mixed_precision="bf16", model={"num_hidden_layers": 2, "cca_layers": [2]})


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many were made, none of which was cut; only traced, since no test waits for a compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def made() -> int:
        assert not counters["graph_break"], counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    yield made
    torch.compiler.reset()


def test_a_compiled_run_is_one_graph_and_goes_on_exactly(
    make_settings, prepare, monkeypatch, tmp_path, fresh_accelerate, graphs
):
    changes = dict(CHANGES, gradient_checkpointing=True)
    run = prepare(make_settings("whole", compile=True, **changes))
    assert fit(run) and run.loader.position["epoch"] == 1
    assert graphs() == 1
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert not fit(prepare(make_settings("parts", compile=True, **changes)))
    assert fit(prepare(make_settings("parts", compile=True, **changes)))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run = prepare(make_settings("plain", **changes))
    assert run.wrapped is run.state.model and fit(run)
    assert_like(tmp_path / "plain", tmp_path / "whole")


def test_a_sharded_run_in_bf16_is_compiled_part_by_part(make_settings, prepare, tmp_path, fresh_accelerate):
    changes = dict(CHANGES, max_steps=3, valid_store=None)
    run_pair(make_settings("sharded", compile=True, fsdp=True, **changes), tmp_path, TRACED)
    assert fit(prepare(make_settings("one", batch_size=4, **changes)))
    assert_like(tmp_path / "one", tmp_path / "sharded")


def assert_like(one, other) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine == pytest.approx(theirs, rel=3e-3), (mine, theirs)
    names = [load_file(folder / "model.safetensors").keys() for folder in (one, other)]
    assert names[0] == names[1]


def test_what_is_compiled_by_default(make_settings, prepare, monkeypatch):
    run, monkey = prepare(make_settings()), monkeypatch.setattr
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkey(compiling, "find_spec", lambda name: object())
    assert [wants_compile(run.settings, run.state.model, device) for device in (cpu, gpu)] == [False, True]
    assert not wants_compile(run.settings, torch.nn.Linear(1, 1), gpu)
    monkey(compiling, "find_spec", lambda name: None)
    assert not wants_compile(run.settings, run.state.model, gpu)
