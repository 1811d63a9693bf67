"""What a method costs: floating-point operations, counted from weights and lengths, and bytes of the store.

    2 x weights of matrices x tokens that pass through them  +  4 x queries x keys x inner width, for each attention

The input embeddings are looked up, not multiplied: they are left out; the output embeddings count for the positions
whose logits are computed, tied or not. Causal attention counts in full, as it is computed; inner width = heads x head
size. For RETRO the tokens of the encoder and of CCA's keys are the l k r retrieved ones. Padding is not counted.
Left out: norms, activations, biases, softmax, relative positions. Of a mixture of experts every expert is counted.

Source: Kaplan et al. 2020, section 2.1, with the attention in full.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from retro.retrieval.search.index import ExactIndex
from retro.retrieval.search.searchers import DenseSearcher, FusedSearcher, RerankedSearcher
from retro.retrieval.store.store import Store


def lm_flops(model: Any, length: int, num_logits: int) -> int:
    """Of a plain causal LM (or RETRO[OFF]) over `length` tokens, with logits at some of them."""
    head = model.get_output_embeddings()
    body = _weights(model, without=[head, *_retro_parts(model)])
    return 2 * body * length + 2 * head.weight.numel() * num_logits + _self_attention(model, length)


def retro_flops(model: Any, length: int, num_logits: int, num_neighbors: int) -> int:
    """Of RETRO[ON] with k neighbors for each whole chunk of `length` tokens."""
    config = model.config
    if config.model_type == "retrofit":
        total = lm_flops(model.base, length, num_logits)
        form = model.form
    else:
        total, form = lm_flops(model, length, num_logits), model.model
    num_chunks, k, r = length // config.chunk_len, num_neighbors, config.retrieved_len
    if not num_chunks or not k:
        return total
    if getattr(config, "form", None) == "pointer":
        return total + _pointer(model, length, num_chunks, k, r)
    ccas = form.cca.values() if config.model_type == "retrofit" else _cross_attentions(form)
    read = [getattr(cca, "cross_attention", cca).attention for cca in ccas]
    total += sum(_cross(attention, config.chunk_len, k * r, num_chunks) for attention in read)
    return total + _encoder(form, config.chunk_len, num_chunks, k, r)


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


def _pointer(model: Any, length: int, num_chunks: int, k: int, r: int) -> int:
    """The base over each neighbor up to the key layer, the two maps, and every query by every key."""
    config, layer = model.config, model.config.key_layer
    layers, tokens = model.anatomy.layers(model.base), num_chunks * k * r
    read = 2 * sum(_weights(one) for one in list(layers)[:layer]) * tokens
    read += _self_attention(model.base, r) * layer // len(layers) * num_chunks * k
    maps = 2 * _weights(model.form.query) * length + 2 * _weights(model.form.key) * tokens
    return read + maps + 2 * (config.chunk_len + config.key_lags) * tokens * config.hidden_size


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
