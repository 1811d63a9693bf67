"""The benchmark of a GPU: all of it runs on a CPU where little is installed, and no section stops the others."""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
MISSING = "faiss scann jsonargparse docstring_parser cyclopts matplotlib bitsandbytes"
MISSING += " retro_pytorch labml_nn liger_kernel"
BARE = f"""
import sys
for name in "{MISSING}".split():
    sys.modules[name] = None  # imports fail, and nothing is found
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


@pytest.fixture(scope="module")
def gpu():
    before = list(sys.path)
    spec = spec_from_file_location("benchmark_gpu", SCRIPT)
    module = sys.modules["benchmark_gpu"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_gpu"]
    sys.path[:] = before


def test_every_section_measures_where_little_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    command = [sys.executable, SCRIPT, "--smoke", "--minutes", 60, "--json", tmp_path / "gpu.json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RETRO-pytorch is not installed" in done.stdout and "faiss is not installed" in done.stdout
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert " ".join(sections) == "product agreement training run profile generation embedding search"
    cases = {name: section["cases"] for name, section in sections.items()}
    assert all(section["error"] is None and section["cases"] for section in sections.values())
    assert {"bandwidth"} < {key for figures in cases["product"].values() for key in figures}
    assert len(cases["agreement"]) == 21
    steps = cases["training"] | cases["run"]
    assert {"RETRO[ON], packed documents, compiled", "RETRO[ON], the paper's form at 425M", "retro train"} < set(steps)
    for figures in steps.values():
        assert figures["seconds"] > 0 and figures["tokens_per_second"] > 0 and figures["share_of_product"] > 0
    assert all(figures["share_of_bound"] > 0 for figures in cases["generation"].values())
    assert {"retro", "keys of both"} < set(cases["embedding"])
    assert cases["embedding"]["keys of both"]["difference"] < 1e-5
    assert cases["search"]["exact search, 8 queries"]["recall"] > 0.98 and "join by build_neighbors" in cases["search"]


def test_sections_that_fail_hang_or_die_leave_what_they_found_and_the_others(gpu, tmp_path, capsys):
    def telling(*figures, then=lambda: None):
        def run(bench):
            for number, each in enumerate(figures):
                bench.tell(f"case {number}", each)
            bench.case("last", then)

        return run

    def broken():
        raise ValueError("no room\nand a second line")

    seconds = {"seconds": 0.5}
    made = {
        "product": (telling({"rate": 2e12, "bandwidth": 1e9}, then=lambda: {"float32_rate": 1e12}), 1),
        "fails": (telling(seconds, then=broken), 1),
        "raises": (lambda bench: broken(), 1),
        "hangs": (lambda bench: time.sleep(3600), 0),  # no part of the time: stopped at once
        "dies": (telling(seconds, then=lambda: os._exit(3)), 1),
        "goes on": (telling(then=lambda: {"seconds": 1.5}), 1),
    }
    sections = {name: gpu.Section(run, part, ("rate", "seconds")) for name, (run, part) in made.items()}
    given = argparse.Namespace(minutes=60.0, smoke=True, seed=0, json=tmp_path / "gpu.json")
    results = gpu.run_all(list(sections), given, sections)
    found = {name: (result["cases"], result["error"]) for name, result in results["sections"].items()}
    assert found["fails"] == ({"case 0": seconds, "last": {"error": "ValueError: no room"}}, None)
    assert found["raises"] == ({}, "ValueError: no room")
    assert found["hangs"][0] == {} and found["hangs"][1].startswith("stopped, its time is over")
    assert found["dies"] == ({"case 0": seconds}, "its process ended with code 3")
    assert found["goes on"] == ({"last": {"seconds": 1.5}}, None)
    assert gpu.has_failed(results) and json.loads((tmp_path / "gpu.json").read_text()) == results
    printed = capsys.readouterr().out
    assert "and a second line" not in printed and "1,500.00" in printed


def test_nothing_is_measured_without_a_card(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = argparse.Namespace(minutes=60.0, smoke=False, seed=0, json=None)
    results = gpu.run_all(list(gpu.SECTIONS), given)
    assert list(results["sections"]) == ["product"] and "--smoke" in results["sections"]["product"]["error"]


def test_peers_are_of_equal_size_and_bounds_count_what_is_read(gpu):
    from contestants import CONTESTANTS, ours
    from gpu_sections.generating import bytes_read
    from gpu_sections.training import D896, work

    with torch.device("meta"):
        plain, llama = (CONTESTANTS[name].build(D896)[0] for name in ("plain", "llama"))
        whole, _ = ours(D896)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, llama)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert (
        bytes_read(whole, 0, 100, reads=False)
        == bytes_read(plain, 0, 100, reads=False)
        == 4 * (sizes[0] - D896.vocab_size * D896.d)
    )
    held = 2 * 1024 * (12 * 100 + 3 * 2 * 128) * 4  # keys and values of the text, and of neighbors in three layers
    assert bytes_read(whole, 1, 100, reads=True) - bytes_read(whole, 0, 100, reads=True) == held
    assert 1.6 < work(D896, True) / work(D896, False) < 1.8


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_difference_between_card_and_cpu_is_an_error(gpu, wrong):
    from gpu_sections.card import _compared

    here = torch.tensor([1.0, 0.5])
    assert _compared(here, here + 1e-6)["difference"] < 1e-5
    with pytest.raises(ValueError, match="of the largest value, above 0.0001"):
        _compared(here, torch.tensor([wrong, 0.5]))
