"""Which neighbors a token reads and what it matches there, written out token by token."""

import torch.nn.functional as F


def stream(base, ids, layer):
    """A Llama's residual stream after a layer, by its own account; after the last one it is seen before the norm."""
    if layer == len(base.model.layers):
        seen = []
        handle = base.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        base(ids)
        handle.remove()
        return seen[0]
    return base(ids, output_hidden_states=True).hidden_states[layer]


def normed(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def chunk_read(t, documents, chunk_len):
    """From 0, the last whole chunk up to token t; None without one, or where it is not all of t's document."""
    u = (t + 1) // chunk_len - 1
    return None if u < 0 or any(documents[i] != documents[t] for i in range(u * chunk_len, t + 1)) else u


def matches(matching, h, t, features):
    """tau c(t, j) for each token j of one neighbor that has a token after it; h and features not normed."""
    query = lambda i: F.normalize(matching.query(normed(h[i])), dim=-1)  # noqa: E731
    key = lambda j: F.normalize(matching.key(normed(features[j])), dim=-1)  # noqa: E731
    return [
        matching.log_sharpness.exp()
        * sum(matching.lags[i] * (query(t - i) @ key(j - i)) for i in range(min(matching.num_lags, j) + 1))
        for j in range(len(features) - 1)
    ]


def real_parts(neighbor_ids, neighbor_mask):
    """The real tokens of each neighbor of a chunk that has a token with another after it."""
    return [ids[mask] for ids, mask in zip(neighbor_ids, neighbor_mask, strict=True) if mask.sum() > 1]
