"""Plans of training: counted on real models, what autograd keeps measured with its own hooks."""

import pytest
import torch

from retro.model import RetroConfig, RetroForCausalLM
from retro.training.scaling import Cluster, activation_bytes, neighbor_reads, training_plan

SIZES = dict(
    vocab_size=40, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, chunk_len=16, retrieved_len=32,
    cca_layers=[2, 4], encoder_hidden_size=64, encoder_num_attention_heads=4, max_position_embeddings=128,
)  # fmt: skip


def kept_bytes(model, tokens, neighbors) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, neighbors, labels=tokens).loss
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("changes", [{}, {"gated_feed_forward": True, "smeared_keys": True}])
def test_activations_are_what_autograd_keeps(changes):
    torch.manual_seed(0)
    config = RetroConfig(**SIZES, **changes)
    model = RetroForCausalLM(config).train()
    tokens, neighbors = torch.randint(0, 40, (2, 128)), torch.randint(0, 40, (2, 8, 2, 32))
    assert kept_bytes(model, tokens, neighbors) == pytest.approx(activation_bytes(config, 2, False, 4), rel=0.25)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = kept_bytes(model, tokens, neighbors)
    planned = activation_bytes(config, 2, True, 4)
    assert inputs < planned < activation_bytes(config, 2, False, 4)


def test_a_plan_by_hand():
    config = RetroConfig(**SIZES)
    made = training_plan(config, Cluster(16, 100.0, 80 * 10**9, mfu=0.5), tokens=10**9, batch_size=1)
    parameters = sum(p.numel() for p in RetroForCausalLM(config).parameters())
    assert made["parameters"] == parameters
    step = 4 * made["forward_flops_per_token"]
    assert made["training_flops"] == pytest.approx(step * 10**9)
    assert made["tokens_per_second"] == pytest.approx(16 * 100e12 * 0.5 / step)
    assert made["hours"] == pytest.approx(1e9 / made["tokens_per_second"] / 3600)
    assert made["gpu_bytes"]["sharded state"] == pytest.approx(parameters, abs=1) and made["fits"]
    kept = training_plan(config, Cluster(16, 100.0, 1000, mfu=0.5), 10**9, 1, checkpointing=False)
    assert kept["tokens_per_second"] == pytest.approx(made["tokens_per_second"] * 4 / 3) and not kept["fits"]


def test_the_forward_pass_of_the_paper_s_model():
    """172M weights besides the embeddings, logits, and four times as many neighbor tokens through a small encoder."""
    config = RetroConfig.from_preset("172m", max_position_embeddings=2048)
    made = training_plan(config, Cluster(1, 1.0, 1), 10**9, 1)
    assert 2 * (172e6 + 128_000 * 896) < made["forward_flops_per_token"] < 6 * 172e6


def test_reads_of_neighbors():
    reads = neighbor_reads(RetroConfig(**SIZES), token_bytes=4)
    assert reads["reads"] == pytest.approx(2 * 2 / 16)  # 2 neighbors a chunk of 16: tokens and chunk table of each
    assert reads["bytes"] == pytest.approx(2 / 16 * 4096 * (2 + 32 * 4 / 4096))


@pytest.mark.parametrize("given", [{"gpus": 0}, {"tflops": -1.0}, {"mfu": 1.5}, {"memory": 0}])
def test_clusters_that_are_none(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Cluster(**{"gpus": 8, "tflops": 300.0, "memory": 80 * 10**9, **given})
