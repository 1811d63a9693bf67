"""The contestants of the training benchmarks: RETROs, ours and others', with what a step of each takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, VOCAB_SIZE, R = 8, 8192, 128
DOCUMENT_LEN = 320  # of packed documents: five chunks
PEERS = {"retro-pytorch": ("retro_pytorch", "retro-pytorch==0.3.9"), "labml": ("labml_nn", "labml-nn")}


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

    def __str__(self) -> str:
        return f"d {self.d}, n {self.n}, batch {self.batch}"

    @property
    def num_chunks(self) -> int:
        return self.n // self.m


# Contestants: functions of a shape that give a module and the loss of tokens [b, n + 1] and neighbors [b, l, k, r]


Loss = Callable[[Tensor, Tensor], Tensor]


def ours(shape: Shape, cca: bool = True, retrieve: bool = True, documents: bool = False) -> tuple[nn.Module, Loss]:
    from retro.model import RetroConfig, RetroForCausalLM

    config = RetroConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        cca_layers=list(shape.cca_layers) if cca else [],
        encoder_num_layers=shape.encoder_layers,
        encoder_shares_embeddings=True,
        tie_word_embeddings=False,
        chunk_len=shape.m,
        retrieved_len=R,
    )
    model = RetroForCausalLM(config).train()

    def loss(ids, neighbors):
        ids = labels = ids[:, :-1]
        given = {"neighbor_ids": neighbors, "neighbor_mask": torch.ones_like(neighbors, dtype=torch.bool)}
        given = given if retrieve else {}
        if documents:
            positions = torch.arange(shape.n).expand(ids.shape)
            given["document_ids"] = positions // DOCUMENT_LEN
            labels = ids.masked_fill(positions % DOCUMENT_LEN == 0, -100)
        return model(ids, labels=labels, **given).loss

    return model, loss


def retro_pytorch(shape: Shape) -> tuple[nn.Module, Loss]:
    from retro_pytorch import RETRO

    model = RETRO(
        num_tokens=VOCAB_SIZE,
        max_seq_len=shape.n,
        enc_dim=shape.d,
        dec_dim=shape.d,
        enc_depth=shape.encoder_layers,
        enc_cross_attn_layers=(1,),
        dec_depth=shape.layers,
        dec_cross_attn_layers=shape.cca_layers,
        heads=HEADS,
        dim_head=shape.d // HEADS,
        chunk_size=shape.m,
    ).train()
    return model, lambda ids, neighbors: model(ids, retrieved=neighbors, return_loss=True)


def labml(shape: Shape) -> tuple[nn.Module, Loss]:
    from labml_nn.transformers.retro.model import NearestNeighborEncoder, RetroModel

    sizes = dict(d_model=shape.d, n_heads=HEADS, d_k=shape.d // HEADS, d_ff=4 * shape.d)
    encoder = NearestNeighborEncoder(shape.m, shape.encoder_layers, {0}, **sizes)
    cca_layers = {layer - 1 for layer in shape.cca_layers}
    model = RetroModel(
        VOCAB_SIZE, shape.d, shape.layers, cca_layers, shape.m, encoder=encoder, **_without(sizes, "d_model")
    )

    def loss(ids, neighbors):
        return F.cross_entropy(model(ids[:, :-1], neighbors).flatten(0, 1), ids[:, 1:].flatten())

    return model.train(), loss


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
    """How a contestant is called in the table, made, and whether its process is tuned as `retro train` does."""

    label: str
    build: Callable[[Shape], tuple[nn.Module, Loss]]
    tuned: bool
    peer: str | None = None


CONTESTANTS = {
    "ON": Entry("RETRO[ON]", ours, True),
    "OFF": Entry("RETRO[OFF]", lambda shape: ours(shape, retrieve=False), True),
    "plain": Entry("decoder alone", lambda shape: ours(shape, cca=False, retrieve=False), True),
    "retro-pytorch": Entry("RETRO-pytorch", retro_pytorch, False, "retro-pytorch"),
    "labml": Entry("labml", labml, False, "labml"),
    "ON-packed": Entry("RETRO[ON], packed documents", lambda shape: ours(shape, documents=True), True),
    "ON-fused": Entry("RETRO[ON], fused attention", with_fused_attention, True),
    "ON-untuned": Entry("RETRO[ON], as torch comes", ours, False),
    "retro-pytorch-tuned": Entry("RETRO-pytorch, tuned as ours", retro_pytorch, True, "retro-pytorch"),
    "labml-tuned": Entry("labml, tuned as ours", labml, True, "labml"),
}


class Contestant:
    """One model in training."""

    def __init__(self, name: str, shape: Shape, seed: int, optimizer: str, precision: str = "float32", compile_mode=""):
        torch.manual_seed(seed)
        self.name, self.shape = name, shape
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        self.model, self.loss = CONTESTANTS[name].build(shape)
        options = {"fused": True} if optimizer == "fused" else {"foreach": optimizer == "foreach"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **options)
        self.ids = torch.randint(3, VOCAB_SIZE, (shape.batch, shape.n + 1))
        self.neighbors = torch.randint(3, VOCAB_SIZE, (shape.batch, shape.num_chunks, shape.k, R))
        if compile_mode:
            self.model.compile(mode=compile_mode, dynamic=False)

    def step(self) -> float:
        with self.autocast:
            loss = self.loss(self.ids, self.neighbors)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

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
        return formula(self.model, self.shape, retrieve=self.name == "ON")

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
