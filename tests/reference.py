"""Grok-1 in plain NumPy, float64: the model once more, slow and without any trick.

One sequence at a time, all positions at once, every expert computed for every token. Weights are
float64 matrices [I, O]; weight formats are no business of it. Shape letters as in `model.py`.
"""

import numpy as np


def forward(config, params: dict, tokens):
    """tokens [T] to logits [T, V], hidden [L + 1, T, D] and, with experts, each layer's router
    probabilities [L, T, E] and chosen experts [L, T, A]."""
    params = {
        module: {name: np.asarray(w, np.float64) for name, w in entries.items()}
        for module, entries in params.items()
    }
    table = params["language_model/in_out_embed"]["embeddings"]  # [V, D]
    h = table[np.asarray(tokens)] * config.embedding_multiplier_scale  # [T, D]
    hidden, probs, chosen = [h], [], []
    for i in range(config.num_layers):
        prefix = f"transformer/decoder_layer_{i}/"
        layer = {m.removeprefix(prefix): p for m, p in params.items() if m.startswith(prefix)}

        def norm(name, x, layer=layer):
            return rms_norm(x, layer[name]["scale"], config.rms_norm_eps)

        h = h + norm("rms_norm_1", attention(config, layer, norm("rms_norm", h)))
        x = norm("rms_norm_2", h)
        if config.num_experts > 1:
            y, layer_probs, layer_chosen = mixture(config, layer, x)
            probs.append(layer_probs)
            chosen.append(layer_chosen)
        else:
            names = ("linear", "linear_v", "linear_1")
            y = feed_forward(config, x, *(layer[name]["w"] for name in names))
        h = h + norm("rms_norm_3", y)
        hidden.append(h)
    final = rms_norm(h, params["language_model/rms_norm"]["scale"], config.rms_norm_eps)
    logits = final @ table.T * config.output_multiplier_scale
    return logits, np.stack(hidden), np.array(probs), np.array(chosen)


def rms_norm(x, scale, eps):  # [T, D] -> [T, D]
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def linear(config, x, w):  # [T, I], [I, O] -> [T, O]
    if config.activations == "int8":
        step = np.abs(x).max(axis=-1, keepdims=True) / 127
        x = np.round(x / step) * step
    return x @ w


def attention(config, layer, x):  # [T, D] -> [T, D]
    def project(name):  # -> [T, heads, H]
        y = linear(config, x, layer[f"multi_head_attention/{name}"]["w"])
        return y.reshape(len(x), -1, config.key_size)

    positions = np.arange(len(x))
    q, k = (rotate(project(name), positions, config.rope_base) for name in ("query", "key"))
    v = project("value")
    queries_per_key = config.num_q_heads // config.num_kv_heads
    heads = []
    for n in range(config.num_q_heads):
        g = n // queries_per_key
        logits = q[:, n] @ k[:, g].T * config.attn_output_multiplier  # [T, T]
        logits = config.attn_logit_cap * np.tanh(logits / config.attn_logit_cap)
        logits[positions[None, :] > positions[:, None]] = -np.inf
        heads.append(softmax(logits) @ v[:, g])
    return linear(config, np.concatenate(heads, axis=-1), layer["multi_head_attention/linear"]["w"])


def rotate(x, positions, base):  # [T, heads, H]
    """Turns the pair (x_i, x_{i + H/2}) by the angle position / base^(2 i / H)."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = positions * float(base) ** (-i / half)
        sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
        y[..., i] = x[..., i] * cos - x[..., i + half] * sin
        y[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return y


def mixture(config, layer, x):  # [T, D] -> [T, D], [T, E], [T, A]
    probs = softmax(x @ layer["router"]["w"])
    chosen = np.argsort(-probs, axis=-1, kind="stable")[:, : config.num_selected_experts]
    y = np.zeros_like(x)
    for expert in range(config.num_experts):
        names = ("moe/linear", "moe/linear_v", "moe/linear_1")
        out = feed_forward(config, x, *(layer[name]["w"][expert] for name in names))
        gate = np.where((chosen == expert).any(axis=-1), probs[:, expert], 0)
        y += gate[:, None] * out
    return y, probs, chosen


def feed_forward(config, x, w, w_v, w_1):  # [T, D] -> [T, D]
    return linear(config, gelu(linear(config, x, w)) * linear(config, x, w_v), w_1)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
