"""The plain forward pass of a packed file: numpy, one line of code for each line of mathematics, not made for speed. It is
the specification that the compiled decoder (kernels/cpu/decoder.py) is tested against, and one of the two implementations
that export/parity.py compares with the student.

    ids -> embedding -> per layer: norm, q k v, RoPE, attention, o; norm, gate up, act, down -> norm -> head

Each projection is ``acc * (act_scale * weight_scale) + bias`` with exact integers ``acc``, or, with a scale for each group
of columns, ``sum_g(acc_g * weight_scale_g) * act_scale + bias``, as in kernels/reference.py. Everything else is fp32, as
transformers computes it. It takes whole texts only: it has no KV cache and computes attention scores for every pair of
positions. With `unrounded` activations nothing is quantized on the way: this is the same function without the jumps that
rounding makes.

Several texts are processed together, because unpacking a linear costs more than multiplying by it.
Shape suffixes: N tokens of all texts, T and S positions of one, H heads, K key/value heads, G heads per key/value head, D
head width, I in_features, O out_features, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from bitdistill.kernels.numerics import ACT_BLOCK, ACT_MAX, EPSILON, MAX_EXACT_IN_FEATURES
from bitdistill.runtime.packed_file import PackedModel

TABLE_ROWS = 8192  # of an embedding or LM head are dequantized at once


def plain_logits(packed: PackedModel, prompts: Sequence[Sequence[int]], unrounded: bool = False) -> list[np.ndarray]:
    """Next-token logits of whole texts.

    Args:
        packed: an open file.
        prompts: token ids of each text; every id below the vocabulary's size, no text empty.
        unrounded: multiply activations as they are, not as int8 codes.

    Returns: float32 (T, V) for each text.

    Numerics: integer sums exact; the rest fp32 in numpy's order of summation.
    """
    config, tensors = packed.config, packed.tensors
    bounds = np.cumsum([0, *(len(ids) for ids in prompts)])
    texts = [slice(start, stop) for start, stop in pairwise(bounds)]
    position_N = np.concatenate([np.arange(len(ids), dtype=np.float32) for ids in prompts])
    gemma = config.model_type == "gemma3_text"  # it has two more norms, after attention and after the MLP

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, tensors[f"{name}.gain"], config.rms_norm_eps)

    def linear(name: str, x_NI: np.ndarray) -> np.ndarray:
        eps = config.linears[name].subln_eps
        x_NI = x_NI if eps is None else rms_norm(x_NI, tensors[f"{name}.subln"], eps)
        return plain_product(packed, name, x_NI, unrounded)

    x = packed.table("model.embed_tokens", np.concatenate([np.asarray(ids, np.int64) for ids in prompts]))
    x = x * np.float32(config.embedding_scale)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        y = norm(f"{layer}.input_layernorm", x)
        q_NHD, k_NKD, v_NKD = (
            linear(f"{layer}.self_attn.{name}_proj", y).reshape(len(x), -1, config.head_dim) for name in "qkv"
        )
        if f"{layer}.self_attn.q_norm" in config.norms:
            q_NHD = norm(f"{layer}.self_attn.q_norm", q_NHD)
            k_NKD = norm(f"{layer}.self_attn.k_norm", k_NKD)
        angle = position_N[:, None] * tensors[f"rope.{config.rope[index]}.inv_freq"]
        scaling = tensors[f"rope.{config.rope[index]}.attention_scaling"]
        q_NHD, k_NKD = (rotate(a, np.cos(angle) * scaling, np.sin(angle) * scaling) for a in (q_NHD, k_NKD))
        scale, window = np.float32(config.attention_scale), config.window[index]
        y = np.concatenate([attention(q_NHD[t], k_NKD[t], v_NKD[t], scale, window) for t in texts])
        y = linear(f"{layer}.self_attn.o_proj", y.reshape(len(x), -1))
        x = x + (norm(f"{layer}.post_attention_layernorm", y) if gemma else y)

        y = norm(f"{layer}.{'pre_feedforward_layernorm' if gemma else 'post_attention_layernorm'}", x)
        gate, up = linear(f"{layer}.mlp.gate_proj", y), linear(f"{layer}.mlp.up_proj", y)
        y = linear(f"{layer}.mlp.down_proj", (silu if config.activation == "silu" else gelu_tanh)(gate) * up)
        x = x + (norm(f"{layer}.post_feedforward_layernorm", y) if gemma else y)
    x = norm("model.norm", x)
    logits_NV = np.concatenate([x @ rows.T for _, rows in table_parts(packed, config.tables()[-1])], axis=1)
    return [logits_NV[t] for t in texts]


def plain_product(packed: PackedModel, name: str, x_NI: np.ndarray, unrounded: bool = False) -> np.ndarray:
    """One BitLinear, after its SubLN: float32 (N, I) -> (N, O). Bit for bit `reference.bit_linear` on a CPU."""
    codes_OI, weight_scale = packed.weight_codes(name), packed.weight_scales(name)
    in_features, columns = codes_OI.shape[1], packed.config.scale_columns(packed.config.linears[name])
    if packed.config.linears[name].input_scale:
        x_NI = x_NI / packed.tensors[f"{name}.input_scale"]
    if unrounded:
        if columns is not None:
            weight_scale = np.repeat(weight_scale, columns, axis=1)[:, :in_features]
        y = x_NI @ (codes_OI.astype(np.float32) * weight_scale).T
    elif packed.config.act_scale == "block":
        y = _blocked_product(x_NI, codes_OI, weight_scale, columns)
    else:
        act_codes, act_scale = quantize_activation(x_NI)
        exact = np.float32 if in_features <= MAX_EXACT_IN_FEATURES else np.float64
        if columns is None or columns >= in_features:  # one scale, or one for each row
            acc = act_codes.astype(exact) @ codes_OI.astype(exact).T
            y = acc.astype(np.float32) * (act_scale * weight_scale.reshape(-1))
        else:
            y = np.zeros((len(x_NI), len(codes_OI)), np.float32)
            for group, start in enumerate(range(0, in_features, columns)):
                part = slice(start, start + columns)
                acc = act_codes[:, part].astype(np.float32) @ codes_OI[:, part].astype(np.float32).T
                y += acc * weight_scale[:, group]
            y = y * act_scale
    bias = packed.tensors.get(f"{name}.bias")
    return y if bias is None else y + bias


def _blocked_product(
    x_NI: np.ndarray, codes_OI: np.ndarray, weight_scale: np.ndarray, columns: int | None
) -> np.ndarray:
    """`plain_product` before its bias, of activations with a scale for each ACT_BLOCK columns of a token."""
    y = np.zeros((len(x_NI), len(codes_OI)), np.float32)
    grouped = columns is not None and weight_scale.shape[1] > 1
    for start in range(0, x_NI.shape[1], ACT_BLOCK):
        part = slice(start, start + ACT_BLOCK)
        act_codes, act_scale = quantize_activation(x_NI[:, part])
        acc = act_codes.astype(np.float32) @ codes_OI[:, part].astype(np.float32).T
        y += acc * (act_scale * weight_scale[:, start // columns] if grouped else act_scale)
    return y if grouped else y * weight_scale.reshape(-1)


def table_parts(packed: PackedModel, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    """An embedding or LM head, dequantized, a part at a time: (rows, float32 (rows, hidden))."""
    for start in range(0, packed.config.vocab_size, TABLE_ROWS):
        rows = slice(start, start + TABLE_ROWS)
        yield rows, packed.table(name, rows)


def quantize_activation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-token absmax int8, ``kernels/reference.py:quantize_activation`` in numpy.

    Args:
        x: float32 (N, I).

    Returns: (act_codes int8 (N, I), act_scale float32 (N, 1)). Numerics: bit for bit the reference.
    """
    assert x.dtype == np.float32, x.dtype
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(EPSILON))
    codes = np.clip(np.rint(x * (np.float32(ACT_MAX) / peak)), -128, 127).astype(np.int8)
    return codes, peak / np.float32(ACT_MAX)


def attention(q_THD: np.ndarray, k_TKD: np.ndarray, v_TKD: np.ndarray, scale: np.float32, window: int | None):
    """Causal softmax attention of one text: float32 (T, H, D). Heads of one key/value head are neighbors.

    Args:
        q_THD: float32, the queries. k_TKD, v_TKD: float32, keys and values, K heads.
        scale: multiplies q.k.
        window: each position sees so many last ones, itself included; None is all.
    """
    tokens, heads, width = q_THD.shape
    q_TKGD = q_THD.reshape(tokens, k_TKD.shape[1], -1, width)
    scores_KGTS = np.einsum("tkgd,skd->kgts", q_TKGD, k_TKD, optimize=True) * scale
    age_TS = np.arange(tokens)[:, None] - np.arange(tokens)  # the future is negative
    hidden_TS = age_TS < 0 if window is None else (age_TS < 0) | (age_TS >= window)
    scores_KGTS = np.where(hidden_TS, np.float32(-np.inf), scores_KGTS)
    weights_KGTS = np.exp(scores_KGTS - scores_KGTS.max(axis=-1, keepdims=True))
    weights_KGTS /= weights_KGTS.sum(axis=-1, keepdims=True)
    return np.einsum("kgts,skd->tkgd", weights_KGTS, v_TKD, optimize=True).reshape(tokens, heads, width)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension."""
    return x * (np.float32(1) / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps))) * gain


def rotate(x_NHD: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE as in transformers: dimension d turns with d + D/2. cos, sin: (N, D/2)."""
    cos, sin = cos[:, None], sin[:, None]
    half = x_NHD.shape[-1] // 2
    low, high = x_NHD[..., :half], x_NHD[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def silu(x: np.ndarray) -> np.ndarray:
    """``x / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (np.float32(1) + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """``x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))``."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
