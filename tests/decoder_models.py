"""Decoders for the tests: tiny students as the compiled decoder's dataclasses, and the same forward in float64 numpy."""

import numpy as np

from bitdistill.kernels import packing
from bitdistill.kernels.cpu.decoder import Layer, Model, Projection, Table
from bitdistill.kernels.reference import quantize_weight
from bitdistill.student.layers import BitLinear

GEMMA = "gemma3_text"


def decoder_model(student, ternary: str = "base3", table: str = "fp16") -> Model:
    """A refined torch student as `decoder.Model`."""
    config, decoder = student.config, student.model
    gemma = config.model_type == GEMMA

    def gain(norm):
        return None if norm is None else norm.weight.detach().numpy() + np.float32(1 if gemma else 0)

    def projection(linear: BitLinear) -> Projection:
        codes, scale = quantize_weight(linear.weight)
        return Projection(
            packing.pack(codes.numpy(), ternary), ternary, linear.out_features, linear.in_features, scale.numpy()[()],
            None if linear.bias is None else linear.bias.detach().numpy(),
            None if linear.subln is None else linear.subln.weight.detach().numpy(),
            None if linear.subln is None else linear.subln.eps,
        )  # fmt: skip

    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    one_rope = not isinstance(decoder.rotary_emb.rope_type, dict)
    names = [""] if one_rope else [f"{kind}_" for kind in sorted(set(kinds))]
    ropes = [
        (
            getattr(decoder.rotary_emb, f"{name}inv_freq").numpy(),
            getattr(decoder.rotary_emb, f"{name}attention_scaling"),
        )
        for name in names
    ]
    layers = []
    for kind, block in zip(kinds, decoder.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                input_norm=gain(block.input_layernorm),
                q=projection(attention.q_proj),
                k=projection(attention.k_proj),
                v=projection(attention.v_proj),
                o=projection(attention.o_proj),
                gate=projection(mlp.gate_proj),
                up=projection(mlp.up_proj),
                down=projection(mlp.down_proj),
                pre_mlp_norm=gain(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm),
                q_norm=gain(getattr(attention, "q_norm", None)),
                k_norm=gain(getattr(attention, "k_norm", None)),
                post_attention_norm=gain(block.post_attention_layernorm) if gemma else None,
                post_mlp_norm=gain(block.post_feedforward_layernorm) if gemma else None,
                rope=0 if one_rope else names.index(f"{kind}_"),
                window=config.sliding_window if kind == "sliding_attention" else None,
            )
        )
    embedding = pack_table(decoder.embed_tokens.weight.detach().numpy(), table)
    tied = student.lm_head.weight is decoder.embed_tokens.weight
    return Model(
        layers=layers,
        embedding=embedding,
        head=embedding if tied else pack_table(student.lm_head.weight.detach().numpy(), table),
        final_norm=gain(decoder.norm),
        eps=config.rms_norm_eps,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        attention_scale=decoder.layers[0].self_attn.scaling,
        embedding_scale=float(getattr(decoder.embed_tokens, "embed_scale", 1.0)),
        ropes=ropes,
    )


def pack_table(values: np.ndarray, format: str) -> Table:
    """A float32 (V, hidden) table in one of the formats."""
    rows, columns = values.shape
    if format == "fp16":
        return Table(format, rows, columns, values.astype(np.float16))
    if format == "int4":
        groups = values.reshape(rows, -1, packing.INT4_GROUP)
        scale = (np.abs(groups).max(axis=2) / 7).astype(np.float16)
        codes = np.clip(np.rint(groups / scale[:, :, None].astype(np.float32)), -8, 7).astype(np.int8)
        return Table(format, rows, columns, packing.pack_int4(codes.reshape(rows, columns)), packing.pack_scales(scale))
    if format == "int8":
        scale = np.abs(values).max(axis=1) / np.float32(127)
        return Table(format, rows, columns, packing.pack_int8(np.rint(values / scale[:, None]).astype(np.int8)), scale)
    scale = np.abs(values).mean(axis=1)
    codes = np.clip(np.rint(values / scale[:, None]), -1, 1).astype(np.int8)
    return Table(format, rows, columns, packing.pack(codes, format), scale)


def table_values(table: Table) -> np.ndarray:
    """float64 (V, hidden)."""
    if table.format == "fp16":
        return table.weight.astype(np.float64)
    codes = packing.unpack_rows(table.weight, np.arange(table.rows), table.columns, table.format).astype(np.float64)
    if table.format == "int4":
        scale = packing.unpack_scales(table.scale, slice(table.rows)).astype(np.float64)
        return codes * np.repeat(scale, packing.INT4_GROUP, axis=1)
    return codes * table.scale.astype(np.float64)[:, None]


def _spread_scales(p: Projection) -> np.ndarray:
    """float64 () or (O, I): the scale of every weight."""
    if p.group_size is None:
        return np.float64(p.weight_scale)
    scale = packing.unpack_scales(p.weight_scale, slice(p.out_features)).astype(np.float64)
    return np.repeat(scale, p.group_size, axis=1)[:, : p.in_features]


class Float64Decoder:
    """One sequence from its beginning, (T,) ids -> float64 (T, V) logits: everything in float64 but the activation codes,
    which are made as the kernels make them, of values rounded to fp32."""

    def __init__(self, model: Model):
        self.model = model
        self.embedding, self.head = table_values(model.embedding), table_values(model.head)
        self.weights = {}
        for layer in model.layers:
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                p = getattr(layer, name)
                codes = packing.unpack(p.weight, p.out_features, p.in_features, p.packing)
                self.weights[id(p)] = codes.astype(np.float64) * _spread_scales(p)

    def norm(self, x, gain, eps=None):
        eps = self.model.eps if eps is None else eps
        return x if gain is None else x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * gain

    def project(self, p: Projection, x):
        if p.subln is not None:
            x = self.norm(x, p.subln, p.subln_eps)
        y = self.codes(x, 127) @ self.weights[id(p)].T
        return y if p.bias is None else y + p.bias

    @staticmethod
    def codes(x, largest):
        x = x.astype(np.float32)
        peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5))
        codes = np.rint(x * (np.float32(largest) / peak)).astype(np.float64)
        return codes * (peak / np.float32(largest)).astype(np.float64)

    def rotate(self, x_THD, rope):
        inv_freq, scaling = self.model.ropes[rope]
        angle = (np.arange(len(x_THD), dtype=np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
        cos, sin = np.cos(angle) * scaling, np.sin(angle) * scaling
        low, high = np.split(x_THD, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def __call__(self, ids):
        model, time = self.model, len(ids)
        age = np.arange(time)[:, None] - np.arange(time)
        x = self.embedding[np.asarray(ids)] * model.embedding_scale
        for layer in model.layers:
            y = self.norm(x, layer.input_norm)
            q, k, v = (self.project(p, y).reshape(time, -1, model.head_dim) for p in (layer.q, layer.k, layer.v))
            q, k = (
                self.rotate(self.norm(q, layer.q_norm), layer.rope),
                self.rotate(self.norm(k, layer.k_norm), layer.rope),
            )
            k, v = (np.repeat(z, q.shape[1] // z.shape[1], axis=1) for z in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) * model.attention_scale
            scores[:, (age < 0) | (age >= (layer.window or time))] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y = self.project(layer.o, np.einsum("hts,shd->thd", weights, v).reshape(time, -1))
            x = x + self.norm(y, layer.post_attention_norm)
            y = self.norm(x, layer.pre_mlp_norm)
            gate, up = self.project(layer.gate, y), self.project(layer.up, y)
            if model.activation == "silu":
                gate = gate / (1 + np.exp(-gate))
            else:
                gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            y = self.project(layer.down, gate * up)
            x = x + self.norm(y, layer.post_mlp_norm)
        x = self.norm(x, model.final_norm)
        if model.head.format != "fp16":  # integer tables see 16-bit activations
            x = self.codes(x, 32512)
        return x @ self.head.T


def random_model(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    vocabulary: int = 97,
    ternary: str = "base3",
    table: str = "int8",
    window: int | None = None,
    seed: int = 0,
) -> Model:
    """A model of the Qwen3 kind with random packed bytes: any shape, no torch, quick also where it is large."""
    rng = np.random.default_rng(seed)

    def gain(width):
        return (1 + 0.3 * rng.normal(size=width)).astype(np.float32)

    def projection(out_features, in_features, subln=False):
        codes = rng.integers(-1, 2, (out_features, in_features), np.int8)
        scale = np.float32(1 / np.sqrt(in_features))
        norm = (gain(in_features), 1e-6) if subln else (None, None)
        return Projection(packing.pack(codes, ternary), ternary, out_features, in_features, scale, None, *norm)

    mixed, kept = heads * head_dim, kv_heads * head_dim
    values = (rng.standard_normal((vocabulary, hidden), np.float32) * np.float32(1 / np.sqrt(hidden))).astype(
        np.float32
    )
    embedding = pack_table(values, table)
    return Model(
        layers=[
            Layer(
                input_norm=gain(hidden), q_norm=gain(head_dim), k_norm=gain(head_dim), pre_mlp_norm=gain(hidden),
                q=projection(mixed, hidden), k=projection(kept, hidden), v=projection(kept, hidden),
                o=projection(hidden, mixed, True), gate=projection(intermediate, hidden),
                up=projection(intermediate, hidden), down=projection(hidden, intermediate, True), window=window,
            )
            for _ in range(layers)
        ],
        embedding=embedding, head=embedding, final_norm=gain(hidden), eps=1e-6, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, activation="silu", attention_scale=head_dim**-0.5,
        embedding_scale=1.0, ropes=[((1e4 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32), 1.0)],
    )  # fmt: skip
