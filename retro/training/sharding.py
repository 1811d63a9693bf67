"""Weights, gradients and moments spread over processes (FSDP2), so that no process holds all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from retro.model import RetroForCausalLM
from retro.training.compiling import compile_forward


def shard(model: RetroForCausalLM, device_type: str, compiles: bool) -> None:
    """Spread a model's weights over all processes, in place; each unit is gathered while it runs, and compiled alone.

    A gradient is the mean over processes, as in data-parallel training, and the products run in the types that autocast
    gives them there, so that both train alike.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing here writes into
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for unit in _units(model):
        if compiles:
            compile_forward(unit)
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # whatever comes next, be it a checkpoint


def _units(model: RetroForCausalLM) -> Iterator[nn.Module]:
    """What is gathered at a time: the parts of a layer, since a layer is called part by part, and encoder layers.

    The rest (embeddings, norms) belongs to the whole model.
    """
    for layer in model.model.layers:
        yield from filter(None, (layer.attention, layer.cross_attention, layer.feed_forward))
    if model.config.cca_layers:
        yield from model.model.encoder.layers


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is without sharding; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, spread as another is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Tensors that may be sharded, whole and in main memory; nothing where `keep` is false, one at a time meanwhile.

    All processes call this together.
    """
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if keep:
            found[name] = one.contiguous().cpu()
    return found


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor] | None:
    """The weights of a sharded model by name, see `gathered`; None for a model that is whole."""
    parameters = dict(model.named_parameters())
    return gathered(parameters, keep) if any(isinstance(p, DTensor) for p in parameters.values()) else None
