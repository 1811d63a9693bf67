"""What training a RETRO takes on GPUs that the user describes: operations, memory, reads from the datastore.

Parameters and operations are counted on the model itself, made without memory for its weights. Nothing here is
measured: rates are what the user gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PAGE_BYTES = 4096  # what a memory map reads at least
OPTIMIZER_BYTES = 16  # of a parameter: float32 weight, gradient and two moments of AdamW
CHUNK_TABLE_BYTES = 10


@dataclass(frozen=True)
class Cluster:
    """GPUs and what they reach.

    Arguments:
        tflops: of one GPU in bfloat16; mfu: the share of it that training reaches.
        memory: bytes of one GPU.
        gpus_per_node: they share a node's copy of, or way to, the datastore.
    """

    gpus: int
    tflops: float
    memory: int
    mfu: float = 0.4
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name, least in (("gpus", 1), ("memory", 1), ("gpus_per_node", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.tflops > 0:
            raise ValueError(f"tflops must be above 0, not {self.tflops}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is the share of a GPU's rate that is reached, above 0 and at most 1, not {self.mfu}")


def training_plan(
    config: Any, cluster: Cluster, tokens: int, batch_size: int, token_bytes: int = 4, checkpointing: bool = True
) -> dict[str, Any]:
    """Hours, bytes a GPU and reads a node for training a `RetroConfig` on so many tokens.

    Arguments:
        batch_size: windows of max_position_embeddings tokens that a GPU runs at once.
        token_bytes: of a stored token, 2 or 4.
        checkpointing: whether activations inside blocks are computed again in the backward pass.

    FSDP2 shards parameters, gradients and moments over all GPUs; two blocks are whole at a time. Causal attention
    counts in full, as `retro.evaluation.baselines.costs` counts it.
    """
    from retro.evaluation.baselines.costs import retro_flops

    model, n = _meta_model(config), config.max_position_embeddings
    forward = retro_flops(model, n, n, config.num_neighbors) / n
    step = forward * (4 if checkpointing else 3)
    per_gpu = cluster.tflops * 1e12 * cluster.mfu / step
    memory = gpu_bytes(config, model, cluster.gpus, batch_size, checkpointing)
    reads = neighbor_reads(config, token_bytes)
    node = min(cluster.gpus_per_node, cluster.gpus) * per_gpu
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops_per_token": forward,
        "training_flops": step * tokens,
        "tokens_per_second": per_gpu * cluster.gpus,
        "hours": tokens / (per_gpu * cluster.gpus) / 3600,
        "gpu_bytes": memory,
        "fits": sum(memory.values()) <= cluster.memory,
        "reads_per_token": reads,
        "node_reads_per_second": node * reads["reads"],
        "node_bytes_per_second": node * reads["bytes"],
    }


def _meta_model(config: Any) -> Any:
    import torch

    from retro.model import RetroForCausalLM

    with torch.device("meta"):
        return RetroForCausalLM(config)


def gpu_bytes(config: Any, model: Any, gpus: int, batch_size: int, checkpointing: bool) -> dict[str, int]:
    """Bytes of one GPU by what they hold, activations in bfloat16."""
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [*model.model.layers, *getattr(getattr(model.model, "encoder", None), "layers", [])]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    embeddings = model.get_input_embeddings().weight.numel()
    return {
        "sharded state": math.ceil(OPTIMIZER_BYTES * parameters / gpus),
        "whole blocks": 2 * (2 * largest + embeddings) if gpus > 1 else 2 * parameters,
        "gradient of the output layer": 4 * embeddings,
        "activations": activation_bytes(config, batch_size, checkpointing),
    }


def activation_bytes(config: Any, batch_size: int, checkpointing: bool, item_bytes: int = 2) -> int:
    """Bytes that the backward pass reads, without logits (the loss is computed in slices of positions).

    With checkpointing: what goes into each step of a block (attend, read, feed) and into the encoder, and the inside of
    the largest of them, which is computed again.
    """
    n, d, layers = config.max_position_embeddings, config.hidden_size, config.num_hidden_layers
    attend, feed, read, encode = _inside(config)
    reads, encoded = len(config.cca_layers), _retrieved(config) * config.encoder_hidden_size
    whole = layers * (attend + feed) + reads * read + encode
    inputs = (2 * layers + reads) * n * d + encoded
    kept = inputs + max(attend, feed, read, encode) if checkpointing else whole
    return item_bytes * batch_size * (kept + encoded + n * d)  # what the encoder gives, what the loss reads


def _retrieved(config: Any) -> int:
    """Tokens of the neighbors of a window."""
    num_chunks = config.max_position_embeddings // config.chunk_len if config.cca_layers else 0
    return num_chunks * config.num_neighbors * config.retrieved_len


def _inside(config: Any) -> tuple[int, int, int, int]:
    """Numbers that autograd keeps of a window inside attend, feed and read of one layer and inside the encoder.

    Each: input and its norm; queries, keys, values and result of an attention, and its biases where positions are
    relative; the inner width of a feed-forward network before and after its activation. Scores are not kept.
    """
    n, m, retrieved = config.max_position_embeddings, config.chunk_len, _retrieved(config)
    d, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    relative = config.position == "relative"
    bias = lambda heads, per_token: relative * heads * (per_token + config.head_dim)  # noqa: E731
    feeding = 4 if config.gated_feed_forward else 2
    attend = n * (2 * d + 2 * inner + 2 * keys + bias(config.num_attention_heads, n))
    feed = n * (2 * d + feeding * config.intermediate_size)
    kr = config.num_neighbors * config.retrieved_len
    read = n * (2 * d + 2 * inner + bias(config.num_attention_heads, kr)) + retrieved * 2 * keys
    read += retrieved * config.encoder_hidden_size * config.smeared_keys
    width, heads = config.encoder_hidden_size, config.encoder_num_attention_heads
    across = heads * config.encoder_head_dim
    block = 4 * width + 4 * across + feeding * config.encoder_intermediate_size + bias(heads, config.retrieved_len)
    reading = len(config.encoder_cross_attention_layers) * (2 * width + 2 * across + bias(heads, m))
    return attend, feed, read, retrieved * (config.encoder_num_layers * block + reading)


def neighbor_reads(config: Any, token_bytes: int) -> dict[str, float]:
    """What training reads of the store for each token: random reads, and bytes in whole pages.

    Every chunk has k neighbors; a neighbor is one run of r tokens, and the entries of its chunks.
    """
    per_token = config.num_neighbors / config.chunk_len
    run = config.retrieved_len * token_bytes
    pages = 1 + run / PAGE_BYTES  # a run begins anywhere
    return {"reads": 2 * per_token, "bytes": per_token * (pages + 1) * PAGE_BYTES}
