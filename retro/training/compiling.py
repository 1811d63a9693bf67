"""Training through torch.compile: one graph of a whole RETRO, one for the like layers of a fitted base.

A model is compiled beside itself or inside its modules' `forward`: names of weights, hooks and what is saved stay as
they are, and a RETRO that is not trained at the moment (validation) runs as it is.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from retro.model import RetroForCausalLM
from retro.retrofit import RetrofitForCausalLM
from retro.training.settings import TrainSettings

BACKEND = "inductor"


def wants_compile(settings: TrainSettings, model: PreTrainedModel, device: torch.device) -> bool:
    """Whether to compile: as the settings say, else a RETRO on a GPU whose Triton is installed."""
    if settings.compile is not None:
        return settings.compile
    return device.type == "cuda" and isinstance(model, RetroForCausalLM) and find_spec("triton") is not None


def compiled(model: RetroForCausalLM, checkpoints: bool) -> nn.Module:
    """A RETRO as one graph of fixed shapes.

    Inside of DistributedDataParallel torch may cut it where gradients are sent (optimize_ddp), but not with
    `checkpoints`: parts that are computed again cannot be cut.
    """
    if checkpoints:
        torch._dynamo.config.optimize_ddp = False
    return torch.compile(model, backend=BACKEND, dynamic=False)


def compile_forward(module: nn.Module) -> None:
    """Compile a module in place, but not what hangs on it: hooks of FSDP, of a fit, of gradient checkpointing."""
    module.forward = torch.compile(module.forward, backend=BACKEND)


def compile_base(model: RetrofitForCausalLM) -> None:
    """Compile the layers of a fitted base, but for those inside of which the form reads or writes.

    What is added runs as it is: how many chunks have neighbors is another number each time.
    """
    inside = {point.layer for point in model.form.hook_points if point.at == "attention"}
    for number in range(1, model.anatomy.num_layers + 1):
        if number not in inside:
            compile_forward(model.anatomy.layer(model.base, number))
