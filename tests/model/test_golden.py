"""The fast path against the NumPy port of Listing 1 and Algorithm 1."""

import numpy as np
import pytest
import torch

from tests import golden

VARIANTS = {
    "plain": {},
    "grouped queries, gated": {"num_key_value_heads": 2, "gated_feed_forward": True},
    "smeared keys, shared embeddings": {"smeared_keys": True, "encoder_shares_embeddings": True},
    "wide inner width, one encoder layer": {"head_dim": 12, "encoder_num_layers": 1},
    "content keys": {"cca_partial_rotary_factor": 0.5},
    "unconditioned encoder": {"encoder_cross_attention_layers": []},
    "scaled embeddings": {"embedding_multiplier": 5.5},
    "scaled embeddings, shared": {"embedding_multiplier": 0.3, "encoder_shares_embeddings": True},
}


@pytest.mark.parametrize("position", ["rotary", "relative"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_numpy(variant, position, make_model, make_batch):
    if variant == "content keys" and position == "relative":
        pytest.skip("a share of rotated channels needs rotary positions")
    rng = np.random.default_rng(len(variant))
    model = make_model(seed=1, position=position, **VARIANTS[variant])
    weights = golden.state(model)
    for seed, n in enumerate(
        [int(rng.integers(1, 4)), 4, *rng.integers(5, 30, size=3).tolist()]
    ):  # n < m, n = m, n % m
        batch = make_batch(model, n, b=1, k=int(rng.integers(1, 4)), seed=seed)
        with torch.no_grad():
            fast = model(**batch).logits[0].numpy()
        inputs = [batch[name][0].numpy() for name in ("input_ids", "neighbor_ids", "neighbor_mask")]
        slow = golden.logits(weights, model.config, *inputs)
        scale = np.abs(slow).max()
        np.testing.assert_allclose(fast / scale, slow / scale, atol=1e-5, err_msg=f"n = {n}")


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_off_matches_numpy(position, make_model):
    model = make_model(position=position)
    ids = torch.arange(11)[None]
    slow = golden.logits(golden.state(model), model.config, ids[0].numpy())
    with torch.no_grad():
        fast = model(ids).logits[0].numpy()
    np.testing.assert_allclose(fast / np.abs(slow).max(), slow / np.abs(slow).max(), atol=1e-5)
