"""What a method costs: floating-point operations, and bytes of the store.

Operations are counted while a model reads (`counted_flops`), so that every model, form and prompt is counted alike: two
for each multiplication of a matrix product, attention in full. Left out: norms, activations, biases, softmax, lookups
of embeddings, and products that a kernel of its own makes of packed weights. For plans, where nothing is run, there is
a formula for a RETRO:

    2 x weights of matrices x tokens that pass through them  +  4 x queries x keys x inner width, for each attention

The output embeddings count for the positions whose logits are computed, tied or not; inner width = heads x head size.
The tokens of the encoder and of CCA's keys are the l k r retrieved ones.

Source: Kaplan et al. 2020, section 2.1, with the attention in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retro.retrieval.search.index import ExactIndex
from retro.retrieval.search.searchers import DenseSearcher, FusedSearcher, RerankedSearcher
from retro.retrieval.store.store import Store


def counted_flops(run: Callable[[], Any]) -> int:
    """Of whatever is run: of the matrix products, those of attention among them, whose fused kernels are not used."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def lm_flops(model: Any, length: int, num_logits: int) -> int:
    """Of a plain causal LM (or RETRO[OFF]) over `length` tokens, with logits at some of them."""
    head = model.get_output_embeddings()
    body = _weights(model, without=[head, *_retro_parts(model)])
    return 2 * body * length + 2 * head.weight.numel() * num_logits + _self_attention(model, length)


def retro_flops(model: Any, length: int, num_logits: int, num_neighbors: int) -> int:
    """Of RETRO[ON] with k neighbors for each whole chunk of `length` tokens."""
    config, total = model.config, lm_flops(model, length, num_logits)
    num_chunks, k, r = length // config.chunk_len, num_neighbors, config.retrieved_len
    if not num_chunks or not k:
        return total
    read = [cca.attention for cca in _cross_attentions(model.model)]
    total += sum(_cross(attention, config.chunk_len, k * r, num_chunks) for attention in read)
    return total + _encoder(model.model, config.chunk_len, num_chunks, k, r)


def _encoder(form: nn.Module, chunk_len: int, num_chunks: int, k: int, r: int) -> int:
    total, tokens = 2 * _weights(form.encoder_embedding) * num_chunks * k * r, num_chunks * k * r
    for block in form.encoder.layers:
        inner = block.attention.num_heads * block.attention.head_dim
        total += 2 * (_weights(block.attention) + _weights(block.feed_forward)) * tokens + 4 * r * tokens * inner
        if block.cross_attention is not None:
            total += _cross(block.cross_attention, k * r, chunk_len, num_chunks)
    return total


def _cross(attention: nn.Module, num_queries: int, num_keys: int, times: int) -> int:
    """Attention of some tokens to others."""
    of_queries = _weights(attention.q_proj) + _weights(attention.o_proj)
    of_keys = _weights(attention.k_proj) + _weights(attention.v_proj)
    inner = attention.num_heads * attention.head_dim
    each = 2 * of_queries * num_queries + 2 * of_keys * num_keys + 4 * num_queries * num_keys * inner
    return each * times


def search_flops(searcher: Any, query_len: int) -> int:
    """Of one search: the embedder over a query of about so many tokens, and its comparison with every key.

    What approximate and lexical indexes and second stages do is not counted.
    """
    if isinstance(searcher, RerankedSearcher):
        return search_flops(searcher.first, query_len)
    if isinstance(searcher, FusedSearcher):
        return sum(search_flops(part, query_len) for part in searcher.parts)
    if not isinstance(searcher, DenseSearcher):
        return 0
    compared = 2 * searcher.num_rows * searcher.store.key_dim if isinstance(searcher.index, ExactIndex) else 0
    embedder = getattr(searcher.embedder, "model", None)
    return compared + (0 if embedder is None else 2 * _weights(embedder) * query_len)


def text_bytes(store: Store) -> int:
    """Of the files that hold tokens and documents."""
    records = [record["files"] for record in store.manifest["shards"]]
    return sum(file["bytes"] for files in records for name, file in files.items() if name != "keys.npy")


def index_bytes(searcher: Any, store: Store) -> int:
    """Of what is searched: the keys and the index's own files."""
    files = [path for folder in getattr(searcher, "folders", []) for path in folder.rglob("*") if path.is_file()]
    keys = [record["files"]["keys.npy"]["bytes"] for record in store.shards] if _reads_keys(searcher) else []
    return sum(path.stat().st_size for path in files) + sum(keys)


def _reads_keys(searcher: Any) -> bool:
    stages = [searcher.first, searcher.second] if isinstance(searcher, RerankedSearcher) else [searcher]
    parts = [part for stage in stages for part in getattr(stage, "parts", [stage])]
    return any(isinstance(part, DenseSearcher) for part in parts)


def _self_attention(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4 * length**2 * heads * head_dim * config.num_hidden_layers


def _retro_parts(model: Any) -> list[nn.Module | None]:
    """What RETRO[OFF] does not run."""
    inner = getattr(model, "model", None)
    if model.config.model_type != "retro" or not model.config.cca_layers:
        return []
    return [inner.encoder, inner.encoder_embedding, *_cross_attentions(inner)]


def _cross_attentions(inner: nn.Module) -> list[nn.Module]:
    return [layer.cross_attention for layer in inner.layers if layer.cross_attention is not None]


def _weights(module: nn.Module | None, without: list[nn.Module | None] = ()) -> int:
    """Numbers in the matrices of a module, those of embeddings and of some of its parts left out."""
    if module is None:
        return 0
    left_out = {id(p) for part in without if part is not None for p in part.parameters()}
    left_out |= {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in module.parameters() if p.ndim > 1 and id(p) not in left_out)
