"""One sentence for a device or a type that is not there, the same wherever it is asked for."""

import os

import pytest
import torch

from retro.cli import main
from retro.common.devices import DeviceSettings, find_device, find_dtype
from retro.retrieval.executors import local


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): as if this machine had so many."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    for name in ("RETRO_DEVICE", "RETRO_DTYPE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    pretend(0)
    return pretend


def test_a_device_is_the_call_s_else_the_environment_s_else_the_accelerator(gpus, monkeypatch):
    assert find_device() == find_device("cpu") == torch.device("cpu")
    gpus(2)
    assert find_device() == torch.device("cuda") and find_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("RETRO_DEVICE", "cpu")
    assert find_device() == torch.device("cpu") and find_device("cuda").type == "cuda"
    assert find_dtype() is None and find_dtype("auto") == "auto" and find_dtype(torch.half) is torch.half
    monkeypatch.setenv("RETRO_DTYPE", "bfloat16")
    assert find_dtype() is torch.bfloat16 and find_dtype("float32") is torch.float32


@pytest.mark.parametrize(
    ("count", "asked", "said"),
    [
        (0, "cuda", "device: cuda is not there; this machine has cpu"),
        (2, "cuda:2", "device: cuda:2 is not there; this machine has cpu, cuda:0, cuda:1"),
        (1, "xpu", "device: xpu is not there; this machine has cpu, cuda:0"),
        (2, "cpu:1", "device: cpu:1 is not there; this machine has cpu, cuda:0, cuda:1"),
        (0, "meta", "device: meta is not there; this machine has cpu"),
        (0, "gpu", "device: 'gpu' is no device that torch knows; give for example cpu or cuda:0"),
    ],
)
def test_a_device_that_is_not_there(gpus, capsys, count, asked, said):
    gpus(count)
    assert main(["search", "s", "x", "--device", asked]) == 2
    assert capsys.readouterr().err == f"retro: error: {said}\n"
    with pytest.raises(ValueError) as error:
        find_device(asked)
    assert str(error.value) == said and "RETRO_DEVICE" not in os.environ


VERBS = [
    *(
        "plan nowhere --tokenizer t",
        "build s nowhere --tokenizer t",
        "neighbors s",
        "search s x",
        "add s nowhere",
        "verify s",
    ),
    *("generate m x --store s", "demo --output d", "serve m --store s", "serve-store s"),
    *(f"{verb} m --store s --data nowhere" for verb in ("evaluate", "leakage", "baselines", "sweep neighbors")),
    *(f"sweep {verb} m --store s --data nowhere" for verb in ("datastore", "models", "tokens")),
    *(f"task {verb} m --data nowhere" for verb in ("lambada", "summaries", "qa")),
    "task recall --data nowhere",
]
RECIPES = ["train train_small", "retrofit retrofit_smollm2 base=m", "task finetune finetune_qa start=m questions=q"]


def test_no_verb_reads_anything_before_its_device_is_found(gpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in [f"{verb} --device cuda" for verb in VERBS] + [
        f"{one} store=s output=o device=cuda" for one in RECIPES
    ]:
        assert main(words.split()) == 2
        assert capsys.readouterr().err == "retro: error: device: cuda is not there; this machine has cpu\n", words
    assert not list(tmp_path.iterdir())


def test_an_unknown_type(gpus, monkeypatch):
    monkeypatch.setenv("RETRO_DTYPE", "int8")
    with pytest.raises(ValueError, match="dtype: int8 is unknown; give one of float32, bfloat16, float16"):
        find_dtype()


def test_worker_processes_take_the_device_that_was_asked_for(gpus, monkeypatch):
    gpus(3)
    assert local._gpus() == ["0", "1", "2"] and local.default_workers() == 6
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    for asked, found in (("cuda", ["4", "5", "6"]), ("cuda:1", ["5"]), ("cpu", [])):
        with monkeypatch.context() as patch:
            patch.setenv("RETRO_DEVICE", "")
            DeviceSettings(device=asked).use()
            assert local._gpus() == found, asked
