"""RETRO in plain NumPy, float64 and loops: Algorithm 1 and Listing 1 of the paper, written from its text.

An oracle: one token, one head, one neighbor at a time, nothing batched, nothing shared with the library but the
weights' names. `p` is a state dict of arrays; `c` a RetroConfig.
"""

import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rotate(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def cosine_vector(distance, dim):
    half = (dim + 1) // 2
    rates = [10_000.0 ** (-i / half) for i in range(half)]
    return np.array([math.sin(distance * f) for f in rates] + [math.cos(distance * f) for f in rates])[:dim]


def attend(p, prefix, x, keys, values, distance, allowed, heads, kv_heads, head_dim, theta, rotary=1.0):
    """Rows of x [i, d] attend rows of `keys`, read `values` [j, c]; distance(i, j) and allowed(i, j) are functions."""
    q, k, v = (w @ p[f"{prefix}.{n}_proj.weight"].T for w, n in ((x, "q"), (keys, "k"), (values, "v")))
    relative = f"{prefix}.relative.proj.weight" in p
    out = np.zeros((len(x), heads * head_dim))
    for i in range(len(x)):
        js = [j for j in range(len(keys)) if allowed(i, j)]
        if not js:
            continue
        for h in range(heads):
            g = h // (heads // kv_heads)
            qi = q[i, h * head_dim : (h + 1) * head_dim]
            logits = []
            for j in js:
                kj = k[j, g * head_dim : (g + 1) * head_dim]
                if relative:
                    table = p[f"{prefix}.relative.proj.weight"] @ cosine_vector(distance(i, j), x.shape[1])
                    position = table[h * head_dim : (h + 1) * head_dim]
                    u, w = (p[f"{prefix}.relative.{n}_bias"][h] for n in ("content", "position"))
                    logits.append(((qi + u) @ kj + (qi + w) @ position) / math.sqrt(head_dim))
                else:  # turning the query by the distance and leaving the key is turning both by their positions
                    turned = 2 * int(head_dim * rotary / 2)
                    qi_at_distance = np.concatenate([rotate(qi[:turned], distance(i, j), theta), qi[turned:]])
                    logits.append(qi_at_distance @ kj / math.sqrt(head_dim))
            weights = softmax(np.array(logits))
            for weight, j in zip(weights, js, strict=True):
                out[i, h * head_dim : (h + 1) * head_dim] += weight * v[j, g * head_dim : (g + 1) * head_dim]
    return out @ p[f"{prefix}.o_proj.weight"].T


def feed_forward(p, prefix, x):
    up = x @ p[f"{prefix}.up_proj.weight"].T
    inner = gelu(up)
    if f"{prefix}.gate_proj.weight" in p:
        inner = gelu(x @ p[f"{prefix}.gate_proj.weight"].T) * up
    return inner @ p[f"{prefix}.down_proj.weight"].T


def encode_neighbor(p, c, ids, mask, h_u):
    """E_u^j: one neighbor's r tokens, given the m activations of its chunk."""
    multiplier = c.embedding_multiplier
    if c.encoder_shares_embeddings:
        e = multiplier * p["model.embed_tokens.weight"][ids]
        if "model.encoder_embedding.weight" in p:
            e = e @ p["model.encoder_embedding.weight"].T
    else:
        e = multiplier * p["model.encoder_embedding.weight"][ids]
    heads = (c.encoder_num_attention_heads, c.encoder_num_attention_heads, c.encoder_head_dim, c.rope_theta)
    for number in range(1, c.encoder_num_layers + 1):
        prefix = f"model.encoder.layers.{number - 1}"
        norm = lambda x, name, prefix=prefix: rms_norm(x, p[f"{prefix}.{name}.weight"], c.rms_norm_eps)  # noqa: E731
        x = norm(e, "attention_norm")
        e = e + attend(p, f"{prefix}.attention", x, x, x, lambda i, j: i - j, lambda i, j: mask[j], *heads)
        if number in c.encoder_cross_attention_layers:
            condition = rms_norm(h_u, p["model.encoder.condition_norm.weight"], c.rms_norm_eps)
            x = norm(e, "cross_attention_norm")
            e = e + attend(
                p, f"{prefix}.cross_attention", x, condition, condition, lambda i, j: i - j, lambda i, j: True, *heads
            )
        e = e + feed_forward(p, f"{prefix}.feed_forward", norm(e, "feed_forward_norm"))
    return rms_norm(e, p["model.encoder.norm.weight"], c.rms_norm_eps)


def smear(p, prefix, e):
    """The keys' input: (1 - s) E(j) + s E(j - 1) within a neighbor, or E itself."""
    if f"{prefix}.smear" not in p:
        return e
    s = p[f"{prefix}.smear"]
    before = np.concatenate([np.zeros_like(e[:1]), e[:-1]])
    return (1 - s) * e + s * before


def chunked_cross_attention(p, c, prefix, h, encoded, mask):
    """Listing 1 for one sequence: h [n, d], encoded [l][k] of [r, d_enc], mask [l, k, r] -> what is added to h."""
    n, m = len(h), c.chunk_len
    out = np.zeros_like(h)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope_theta)
    for u in range(1, len(encoded) + 1):  # C_u reads nothing of its own: its last token and the next m - 1 read E_u
        places = [t for t in range(u * m - 1, u * m - 1 + m) if t < n]
        if not mask[u - 1].any():
            continue
        keys = np.concatenate([smear(p, prefix, e) for e in encoded[u - 1]])
        values = np.concatenate(encoded[u - 1])
        r = len(encoded[u - 1][0])
        flat = mask[u - 1].reshape(-1)
        out[places] = attend(
            p,
            f"{prefix}.attention",
            h[places],
            keys,
            values,
            lambda i, j, r=r: (i + 1) - (j % r + 1) + m - 1,  # d(i, i') = i - i' + m - 1, counted from 1
            lambda i, j, flat=flat: flat[j],
            *heads,
            rotary=c.cca_partial_rotary_factor,
        )
    return out


def logits(p, c, ids, neighbor_ids=None, neighbor_mask=None):
    """Algorithm 1 for one sequence: ids [n], neighbor_ids and neighbor_mask [l, k, r] -> logits [n, vocabulary]."""
    h = c.embedding_multiplier * p["model.embed_tokens.weight"][ids]
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope_theta)
    encoded = None
    for number in range(1, c.num_hidden_layers + 1):
        prefix = f"model.layers.{number - 1}"
        norm = lambda x, name, prefix=prefix: rms_norm(x, p[f"{prefix}.{name}.weight"], c.rms_norm_eps)  # noqa: E731
        x = norm(h, "attention_norm")
        h = h + attend(p, f"{prefix}.attention", x, x, x, lambda i, j: i - j, lambda i, j: j <= i, *heads)
        if neighbor_ids is not None and number in c.cca_layers:
            if encoded is None:
                m = c.chunk_len
                encoded = [
                    [
                        encode_neighbor(p, c, neighbor_ids[u, j], neighbor_mask[u, j], h[u * m : (u + 1) * m])
                        for j in range(neighbor_ids.shape[1])
                    ]
                    for u in range(len(neighbor_ids))
                ]
            x = norm(h, "cross_attention_norm")
            h = h + chunked_cross_attention(p, c, f"{prefix}.cross_attention", x, encoded, neighbor_mask)
        h = h + feed_forward(p, f"{prefix}.feed_forward", norm(h, "feed_forward_norm"))
    return rms_norm(h, p["model.norm.weight"], c.rms_norm_eps) @ p["lm_head.weight"].T


def state(model):
    """A model's weights as float64 arrays, tied weights included."""
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict(keep_vars=True).items()}
