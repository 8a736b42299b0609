"""A packed file as the compiled decoder's model: the arrays are used from the memory map; nothing is copied or unpacked."""

import numpy as np

from bitdistill.kernels.cpu.decoder import Layer, Model, Projection, Table
from bitdistill.runtime.decoder_parts import layer_norms, model_numbers
from bitdistill.runtime.packed_file import PackedModel


def decoder_model(packed: PackedModel) -> Model:
    """The decoder's view of a packed file: its arrays, used from the memory map."""
    config, tensors = packed.config, packed.tensors
    kinds = sorted(set(config.rope))

    def projection(name: str) -> Projection:
        linear = config.linears[name]
        return Projection(
            weight=tensors[f"{name}.weight_packed"],
            packing=config.packing,
            out_features=linear.out_features,
            in_features=linear.in_features,
            weight_scale=tensors[f"{name}.weight_scale"],
            group_size=config.scale_columns(linear),
            act_blocks=config.act_scale == "block",
            bias=tensors.get(f"{name}.bias"),
            subln=tensors.get(f"{name}.subln"),
            subln_eps=linear.subln_eps,
            input_scale=tensors.get(f"{name}.input_scale"),
        )

    def table(name: str) -> Table:
        shape = (config.vocab_size, config.hidden_size)
        if config.embedding == "fp16":
            return Table("fp16", *shape, tensors[f"{name}.weight"])
        kind = config.packing if config.embedding == "ternary" else config.embedding
        return Table(kind, *shape, tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"])

    def layer(index: int) -> Layer:
        name = f"model.layers.{index}"
        return Layer(
            **layer_norms(packed, index),
            **{part: projection(f"{name}.self_attn.{part}_proj") for part in "qkvo"},
            **{part: projection(f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down")},
            rope=kinds.index(config.rope[index]),
            window=config.window[index],
        )

    tables = [table(name) for name in config.tables()]
    return Model(
        layers=[layer(index) for index in range(config.num_hidden_layers)],
        embedding=tables[0],
        head=tables[-1],
        final_norm=tensors["model.norm.gain"],
        **model_numbers(config),
        ropes=[(tensors[f"rope.{kind}.inv_freq"], float(tensors[f"rope.{kind}.attention_scaling"])) for kind in kinds],
    )


def compiled_product(packed: PackedModel, name: str, x: np.ndarray) -> np.ndarray:
    """One BitLinear, after its SubLN, by the compiled quantizer and product: float32 (N, I) -> (N, O).

    Numerics: bit for bit `reference.bit_linear` on a CPU.
    """
    from bitdistill.kernels.cpu.activations import quantize_activations
    from bitdistill.kernels.cpu.grouped import blocked_product, grouped_product
    from bitdistill.kernels.cpu.matmul import ternary_accumulate

    linear, columns = packed.config.linears[name], packed.config.scale_columns(packed.config.linears[name])
    if linear.input_scale:
        x = x / packed.tensors[f"{name}.input_scale"]
    weight = (packed.tensors[f"{name}.weight_packed"], packed.config.packing, linear.out_features)
    grouped = columns is not None and columns < linear.in_features
    scales = packed.tensors[f"{name}.weight_scale"]
    if packed.config.act_scale == "block":
        y = blocked_product(x, *weight, scales if grouped else None, columns if grouped else 0)
        y = y if grouped else y * packed.weight_scales(name).reshape(-1)
    elif grouped:
        act_codes, act_scale = quantize_activations(x)
        y = grouped_product(act_codes, *weight, scales, columns) * act_scale
    else:
        act_codes, act_scale = quantize_activations(x)
        acc = ternary_accumulate(act_codes, *weight)
        y = acc.astype(np.float32) * (act_scale * packed.weight_scales(name).reshape(-1))
    bias = packed.tensors.get(f"{name}.bias")
    return y if bias is None else y + bias
