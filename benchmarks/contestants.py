"""The contestants of the training benchmarks: RETROs, ours and others', with what a step of each takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

R = 128
DOCUMENT_LEN = 320  # of packed documents: five chunks
PEERS = {
    "retro-pytorch": ("retro_pytorch", "retro-pytorch==0.3.9"),
    "labml": ("labml_nn", "labml-nn"),
    "liger": ("liger_kernel", "liger-kernel"),
}


def installed(peer: str) -> bool:
    return find_spec(PEERS[peer][0]) is not None


@dataclass(frozen=True)
class Shape:
    """What all contestants share. cca_layers are counted from 1."""

    d: int
    n: int
    batch: int = 1
    k: int = 2
    layers: int = 6
    cca_layers: tuple[int, ...] = (3, 6)
    encoder_layers: int = 2
    m: int = 64
    heads: int = 8
    head_dim: int | None = None  # d / heads
    vocab_size: int = 8192

    def __str__(self) -> str:
        return f"d {self.d}, n {self.n}, batch {self.batch}"

    @property
    def num_chunks(self) -> int:
        return self.n // self.m

    @property
    def channels(self) -> int:
        """Of a head."""
        return self.head_dim or self.d // self.heads


# Contestants: functions of a shape that give a module and the loss of tokens [b, n + 1] and neighbors [b, l, k, r]


Loss = Callable[[Tensor, Tensor], Tensor]


def model_fields(shape: Shape) -> dict[str, Any]:
    """The fields of RetroConfig that a shape says."""
    return dict(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        head_dim=shape.channels,
        cca_layers=list(shape.cca_layers),
        encoder_num_layers=shape.encoder_layers,
    )


def ours(
    shape: Shape, cca: bool = True, retrieve: bool = True, documents: bool = False, paper: bool = False, **changes
) -> tuple[nn.Module, Loss]:
    """Ours, or the form of the paper's presets at a shape. changes: fields of RetroConfig."""
    from retro.model import RetroConfig, RetroForCausalLM

    lengths = dict(chunk_len=shape.m, retrieved_len=R, intermediate_size=4 * shape.d)
    sizes = model_fields(shape) | lengths | ({} if cca else {"cca_layers": []})
    if paper:
        config = RetroConfig.from_preset("172m", **{**sizes, **changes})
    else:
        config = RetroConfig(**sizes, encoder_shares_embeddings=True, tie_word_embeddings=False, **changes)
    model = RetroForCausalLM(config).train()

    def loss(ids, neighbors):
        ids = labels = ids[:, :-1]
        given = {"neighbor_ids": neighbors, "neighbor_mask": torch.ones_like(neighbors, dtype=torch.bool)}
        given = given if retrieve else {}
        if documents:
            positions = torch.arange(shape.n, device=ids.device).expand(ids.shape)
            given["document_ids"] = positions // DOCUMENT_LEN
            labels = ids.masked_fill(positions % DOCUMENT_LEN == 0, -100)
        return model(ids, labels=labels, **given).loss

    return model, loss


def retro_pytorch(shape: Shape) -> tuple[nn.Module, Loss]:
    from retro_pytorch import RETRO

    model = RETRO(
        num_tokens=shape.vocab_size,
        max_seq_len=shape.n,
        enc_dim=shape.d,
        dec_dim=shape.d,
        enc_depth=shape.encoder_layers,
        enc_cross_attn_layers=(1,),
        dec_depth=shape.layers,
        dec_cross_attn_layers=shape.cca_layers,
        heads=shape.heads,
        dim_head=shape.channels,
        chunk_size=shape.m,
    ).train()
    return model, lambda ids, neighbors: model(ids, retrieved=neighbors, return_loss=True)


def labml(shape: Shape) -> tuple[nn.Module, Loss]:
    from labml_nn.transformers.retro.model import NearestNeighborEncoder, RetroModel

    sizes = dict(d_model=shape.d, n_heads=shape.heads, d_k=shape.channels, d_ff=4 * shape.d)
    encoder = NearestNeighborEncoder(shape.m, shape.encoder_layers, {0}, **sizes)
    cca_layers = {layer - 1 for layer in shape.cca_layers}
    model = RetroModel(
        shape.vocab_size, shape.d, shape.layers, cca_layers, shape.m, encoder=encoder, **_without(sizes, "d_model")
    )

    def loss(ids, neighbors):
        return F.cross_entropy(model(ids[:, :-1], neighbors).flatten(0, 1), ids[:, 1:].flatten())

    return model.train(), loss


def llama_config(shape: Shape) -> PreTrainedConfig:
    """The peer of RETRO[OFF]: a decoder of the same widths whose gated feed-forward network has as many weights."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d,
        intermediate_size=round(shape.d / 3) * 8,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        head_dim=shape.channels,
        max_position_embeddings=shape.n,
    )


def llama(shape: Shape, fuse: bool = False) -> tuple[nn.Module, Loss]:
    """transformers' Llama, perhaps with the kernels of Liger."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(shape)).train()
    if fuse:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    return model, lambda ids, neighbors: model(ids[:, :-1], labels=ids[:, :-1]).loss


def _without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


def with_fused_attention(shape: Shape) -> tuple[nn.Module, Loss]:
    model, loss = ours(shape)

    def fused_loss(ids, neighbors):
        with fused_attention():
            return loss(ids, neighbors)

    return model, fused_loss


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention of ours by torch's kernel alone, also where blocks would suit."""
    from retro.modules import attention

    if not hasattr(attention, "suits_blocks"):  # a checkout that has no blocks
        yield
        return
    before = attention.suits_blocks
    attention.suits_blocks = lambda *_: False
    try:
        yield
    finally:
        attention.suits_blocks = before


@dataclass(frozen=True)
class Entry:
    """How a contestant is called in the table, made, and whether its process is tuned as `retro train` does.

    retrieves: whether it does the work of RETRO[ON]. cpu: whether it is in the table of CPUs unless it is asked for.
    """

    label: str
    build: Callable[[Shape], tuple[nn.Module, Loss]]
    tuned: bool
    peer: str | None = None
    retrieves: bool = True
    cpu: bool = True


CONTESTANTS = {
    "ON": Entry("RETRO[ON]", ours, True),
    "OFF": Entry("RETRO[OFF]", partial(ours, retrieve=False), True, retrieves=False),
    "plain": Entry("decoder alone", partial(ours, cca=False, retrieve=False), True, retrieves=False),
    "retro-pytorch": Entry("RETRO-pytorch", retro_pytorch, False, "retro-pytorch"),
    "labml": Entry("labml", labml, False, "labml"),
    "ON-packed": Entry("RETRO[ON], packed documents", partial(ours, documents=True), True),
    "ON-fused": Entry("RETRO[ON], fused attention", with_fused_attention, True),
    "ON-untuned": Entry("RETRO[ON], as torch comes", ours, False),
    "retro-pytorch-tuned": Entry("RETRO-pytorch, tuned as ours", retro_pytorch, True, "retro-pytorch"),
    "labml-tuned": Entry("labml, tuned as ours", labml, True, "labml"),
    "relative": Entry("RETRO[ON], relative positions", partial(ours, position="relative"), True, cpu=False),
    "paper": Entry("RETRO[ON], the paper's form", partial(ours, paper=True), True, cpu=False),
    "llama": Entry("transformers' Llama", llama, True, retrieves=False, cpu=False),
    "liger": Entry("Llama with Liger", partial(llama, fuse=True), True, "liger", retrieves=False, cpu=False),
}


class Contestant:
    """One model in training."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        seed: int,
        optimizer: str,
        precision: str = "float32",
        compile_mode: str = "",
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.name, self.shape = name, shape
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        with torch.device(device):
            self.model, self.loss = CONTESTANTS[name].build(shape)
        self.model.to(device)
        options = {"fused": True} if optimizer == "fused" else {"foreach": optimizer == "foreach"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **options)
        self.ids = torch.randint(3, shape.vocab_size, (shape.batch, shape.n + 1)).to(device)
        self.neighbors = torch.randint(3, shape.vocab_size, (shape.batch, shape.num_chunks, shape.k, R)).to(device)
        if compile_mode:
            self.model.compile(mode=compile_mode, dynamic=False)

    def step(self) -> Tensor:
        with self.autocast:
            loss = self.loss(self.ids, self.neighbors)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def counted(self) -> int:
        """By the fused kernel, which says what attention takes; attention by blocks computes some of it twice."""
        with operations() as counter, self.autocast, fused_attention():
            self.loss(self.ids, self.neighbors).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def by_formula(self) -> int | None:
        """The same from sizes alone, where there is a formula."""
        if self.name not in ("ON", "OFF", "plain"):
            return None
        return formula(self.model, self.shape, CONTESTANTS[self.name].retrieves)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


# Operations


def operations():
    """A counter of matrix products and attention; masked halves of causal attention are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _attention_operations(query, key, value, dropout_p=0.0, is_causal=False, *, out_shape=None, **options) -> int:
    b, h, i, dh = query
    every = 4 * b * h * i * key[2] * dh
    return every // 2 if is_causal else every


def _attention_backward_operations(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, **options) -> int:
    return 2 * _attention_operations(query, key, value, dropout_p, is_causal)


def formula(model: nn.Module, shape: Shape, retrieve: bool) -> int:
    """The same from weights and lengths: a backward pass takes twice the forward.

    No token that is predicted can read the last chunk's neighbors, which therefore are not encoded.
    """
    from retro.evaluation.baselines.costs import lm_flops, retro_flops

    inner, length = model.config.num_attention_heads * model.config.head_dim, (shape.num_chunks - 1) * shape.m
    total = lm_flops(model, shape.n, shape.n - 1) - 2 * shape.n**2 * inner * shape.layers
    if retrieve:
        total += retro_flops(model, length, 0, shape.k) - lm_flops(model, length, 0)
    return 3 * shape.batch * total
