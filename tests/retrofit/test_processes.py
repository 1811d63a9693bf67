"""A fitted model on two processes: DDP and FSDP2 train as one process with all rows does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.retrofit.conftest import FORMS, forms

ROOT = Path(__file__).parents[2]
WAYS = ("ddp", "fsdp2")
SCRIPT = """
import sys, torch, torch.distributed as dist
from retro.training.script import leave
from tests.retrofit.conftest import FORMS
from tests.retrofit.test_processes import WAYS, make_model, make_rows, train, wrapped

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, weights = dist.get_rank(), {}
for form in FORMS:
    for way in WAYS:
        model = make_model(form)
        train(wrapped(model, way), {name: rows[rank : rank + 1] for name, rows in make_rows().items()})
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.form.parameters()]
        weights[form, way] = [p.detach() for p in whole]
if rank == 0:
    torch.save(weights, sys.argv[1])
dist.barrier()  # none is gone while another still talks
leave(0)
"""


def wrapped(model, way: str):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_model(form: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    from retro.retrofit import retrofit

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model = retrofit(base, **FORMS[form], chunk_len=4, retrieved_len=8)
    with torch.no_grad():
        for name, parameter in model.form.named_parameters():
            if name.endswith(("gate", "opening")):
                parameter.fill_(0.5)
    return model.train()


def make_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "neighbor_ids": ids[:, :8].reshape(2, 1, 1, 8).repeat(1, 3, 2, 1)}


def train(model, rows) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**rows).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The weights that two processes end with, by form and way."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(folder / "two.py"), str(folder / "weights.pt")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt")


@forms
def test_two_processes_are_one(form, two_processes):
    model, at_start = make_model(form), make_model(form)
    train(model, make_rows())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), at_start.parameters(), strict=True))
    for way in WAYS:
        for (name, one), two in zip(model.form.named_parameters(), two_processes[form, way], strict=True):
            torch.testing.assert_close(two, one.detach(), rtol=1e-4, atol=1e-6, msg=f"{way} {name}")
