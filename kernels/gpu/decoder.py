"""The decoder on a GPU: packed weights go in, logits and the next token come out. Its parts are plain dataclasses of device
tensors.

    x = embed(ids) -> per layer: norm, q k v | RoPE, cache | attention | o | norm, gate up | act | down -> norm -> head

A layer takes ten launches, of decode.py (products; decode_groups.py where scales change along a row), decode_rows.py (the
operations between them) and decode_attention.py.
The same launches serve a piece of a prompt (many rows of one slot) and a step (one row of each slot). A step reads its
tokens and positions from device tensors and leaves the likeliest next ones there. So one CUDA graph, captured once, serves
every step: a replay costs one launch, where ten launches per layer would take more time than their work.

Projections that read the same input are one matrix (q, k, v; gate, up): one launch, which reads the activations once. Where
each has a SubLN or input scales of its own they stay separate matrices that write into common accumulators.

Shape suffixes: N tokens, V vocabulary, I in_features, O out_features of all projections of a group.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill.kernels.gpu.decode import PackedMatrix, accumulate, interpreted, splits_of
from bitdistill.kernels.gpu.decode_attention import KVCache, attend, merge_quantize, rope_and_cache
from bitdistill.kernels.gpu.decode_groups import GroupedMatrix, accumulate_groups
from bitdistill.kernels.gpu.decode_rows import (
    Product,
    embed,
    final_norm,
    gated_quantize,
    logits_argmax,
    next_token,
    residual_norm_quantize,
)


@dataclass(frozen=True)
class Group:
    """Ternary projections that read one input.

    Args:
        matrices: one of all their rows; or one each, in their order, where each has a SubLN or input scales.
        weight_scale: float32 (O,), the scale of a row's projection; None for matrices that hold their scales.
        bias: float32 (O,) or None.
        subln: float32 (len(matrices), I) or None. subln_eps: theirs.
        input_scale: float32 (len(matrices), I), by which inputs are divided, or None.
        blocks: whether each ACT_BLOCK columns of a token have a scale; only with matrices that hold their scales.
    """

    matrices: tuple[PackedMatrix, ...] | tuple[GroupedMatrix, ...]
    weight_scale: Tensor | None
    bias: Tensor | None
    subln: Tensor | None
    subln_eps: float
    input_scale: Tensor | None = None
    blocks: bool = False

    @property
    def act_columns(self) -> int:
        """Columns of the codes that it reads."""
        return self.matrices[0].act_columns

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.weight_scale, self.bias, self.subln, self.input_scale)
        return sum(part.nbytes for part in (*self.matrices, *tensors) if part is not None)

    @property
    def rounding(self) -> dict:
        """How its input becomes codes: arguments of the functions that quantize."""
        return {
            "subln": self.subln,
            "subln_eps": self.subln_eps,
            "input_scale": self.input_scale,
            "blocks": self.blocks,
        }

    def product(self, act_codes: Tensor, act_scale: Tensor) -> Product:
        """The group's products of int8 (planes, N, act_columns) and float32 (planes, N), or (planes, N, B) with blocks."""
        scaled = isinstance(self.matrices[0], GroupedMatrix)
        if len(self.matrices) == 1 and not scaled:
            return Product(accumulate(act_codes[0], self.matrices[0]), act_scale, self.weight_scale, self.bias)
        rows, columns = act_codes.shape[1], sum(matrix.rows for matrix in self.matrices)
        splits = 1 if scaled else splits_of(rows, columns, self.matrices[0].data.shape[1])
        kind = torch.float32 if scaled else torch.int32
        acc = torch.empty(splits, rows, columns, dtype=kind, device=act_codes.device)
        column = 0
        for codes, scale, matrix in zip(act_codes, act_scale, self.matrices, strict=True):
            if scaled:
                accumulate_groups(codes, scale, matrix, acc, column)
            else:
                accumulate(codes, matrix, acc, column)
            column += matrix.rows
        return Product(acc, None, None, self.bias) if scaled else Product(acc, act_scale, self.weight_scale, self.bias)


@dataclass(frozen=True)
class Table:
    """An embedding or LM head (V, hidden): `weight_scale` is float32 (V,) for 2 and 8 bits, else None."""

    matrix: PackedMatrix
    weight_scale: Tensor | None

    @property
    def form(self) -> str:
        """What activations its products take: two planes of "int8" or of "fp16"."""
        return "fp16" if self.matrix.bits == 16 else "int8"

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.matrix.nbytes + (0 if self.weight_scale is None else self.weight_scale.nbytes)


@dataclass(frozen=True)
class Layer:
    """One decoder layer; gains are float32. The two norms after attention and after the MLP are Gemma's."""

    input_norm: Tensor
    qkv: Group
    qk_norms: tuple[Tensor, Tensor] | None
    o: Group
    post_attention_norm: Tensor | None
    pre_mlp_norm: Tensor
    gate_up: Group
    down: Group
    post_mlp_norm: Tensor | None
    rope: str  # which of the model's RoPE tables
    window: int | None  # last positions that it sees, itself included; None is all


@dataclass(frozen=True)
class Model:
    """All that the forward pass reads."""

    layers: tuple[Layer, ...]
    embedding: Table
    head: Table  # the same object when tied
    final_norm: Tensor
    eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    activation: str  # "silu" | "gelu_pytorch_tanh"
    attention_scale: float
    embedding_scale: float
    rope: dict[str, tuple[Tensor, float]]  # inv_freq float32 (head_dim / 2,), attention_scaling


class Sequences:
    """Slots of sequences that decode together: cache, tokens, positions, and the graph of a step.

    Args:
        model: the model.
        slots: how many sequences.
        capacity: positions of each.
        dtype: of the cache: torch.bfloat16 or torch.float32.

    Attributes:
        ids, positions: int32 (slots,) on the device: the tokens of the next step and where they stand.
        logits: float32 (slots, V) of the last step.
    """

    def __init__(self, model: Model, slots: int, capacity: int, dtype: torch.dtype):
        self.model, self.count, self.capacity = model, slots, capacity
        device = model.final_norm.device
        shape = (len(model.layers), 2, slots, model.num_key_value_heads, capacity, model.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=device)
        self.caches = [KVCache(keys, values) for keys, values in self._cache]
        self.slots = torch.arange(slots, dtype=torch.int32, device=device)
        self.ids, self.positions = torch.zeros_like(self.slots), torch.zeros_like(self.slots)
        self.logits: Tensor | None = None
        places = torch.arange(capacity, dtype=torch.float32, device=device)
        self._rope = {}
        for kind, (inv_freq, scaling) in model.rope.items():
            angles = places[:, None] * inv_freq
            self._rope[kind] = (angles.cos() * scaling, angles.sin() * scaling)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = interpreted()  # the interpreter has no graphs

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.nbytes

    def prompt(self, ids: Sequence[int], slot: int, first: int, wanted: str) -> Tensor | None:
        """Tokens of one slot at the positions first, first + 1, ...; the last one's successor is put into `ids`.

        Args:
            ids: token ids, at most capacity - first.
            wanted: "all" logits, those of the "last" token, or "none" (then no successor either).
            slot: of the KV cache. first: position of the first id.

        Returns: float32 (len(ids) or 1, V), or None.
        """
        with self._on_device():
            device = self.ids.device
            tokens = torch.tensor(ids, dtype=torch.int32, device=device)
            positions = torch.arange(first, first + len(ids), dtype=torch.int32, device=device)
            x, product, post_gain = self._forward(tokens, positions, torch.full_like(tokens, slot), one_slot=True)
            if wanted == "none":
                return None
            if wanted == "last":
                x, product = x[-1:].contiguous(), product.last()
            logits, blocks = self._logits(x, product, post_gain)
            last = tuple(part[-1:] for part in blocks)
            self.positions[slot] = first + len(ids) - 1
            next_token(last, self.ids[slot : slot + 1], self.positions[slot : slot + 1], self.capacity - 1)
            return logits

    def step(self) -> None:
        """Takes `ids` at `positions` in, and puts the likeliest next ones there; `logits` are those that decided.

        Launched, not waited for. The first step captures the CUDA graph that all later ones replay.
        """
        self.prepare()
        with self._on_device():
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def prepare(self) -> None:
        """Captures the graph of a step, if that has not been done: for callers who measure time."""
        if self._graph is None and not self._eager:
            with self._on_device():
                self._capture()

    def _step(self) -> None:
        self.logits, blocks = self._logits(*self._forward(self.ids, self.positions, self.slots, one_slot=False))
        next_token(blocks, self.ids, self.positions, self.capacity - 1)

    def _capture(self) -> None:
        """Records a step. One is run first, for compilation; tokens and positions are then restored, and the
        keys and values that it wrote are written again by the replay."""
        ids, positions = self.ids.clone(), self.positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
            self.ids.copy_(ids)
            self.positions.copy_(positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            print(
                f"bitdistill: no CUDA graph could be captured ({reason}): steps are launched kernel by kernel, slower.",
                file=sys.stderr,
            )
            self._eager = True
        else:
            self._graph = graph

    def _forward(
        self, ids: Tensor, positions: Tensor, slots: Tensor, one_slot: bool
    ) -> tuple[Tensor, Product, Tensor | None]:
        """The layers over N tokens: the residual stream, and the last layer's product with the gain of the norm after
        it, which are still to be added."""
        model = self.model
        x = embed(ids, model.embedding.matrix, model.embedding.weight_scale, model.embedding_scale)
        product = post_gain = None
        for layer, cache in zip(model.layers, self.caches, strict=True):
            group = layer.qkv
            codes = residual_norm_quantize(
                x,
                group.act_columns,
                layer.input_norm,
                model.eps,
                product=product,
                post_gain=post_gain,
                **group.rounding,
            )
            q = rope_and_cache(
                group.product(*codes), cache, positions, slots, self._rope[layer.rope], model.num_attention_heads,
                layer.qk_norms, model.eps,
            )  # fmt: skip
            parts = attend(q, cache, positions, slots, model.attention_scale, layer.window, one_slot)
            group = layer.o
            product = group.product(*merge_quantize(parts, group.act_columns, **group.rounding))
            post_gain, group = layer.post_attention_norm, layer.gate_up
            codes = residual_norm_quantize(
                x, group.act_columns, layer.pre_mlp_norm, model.eps, product=product, post_gain=post_gain,
                **group.rounding,
            )  # fmt: skip
            product = group.product(*codes)
            group = layer.down
            product = group.product(*gated_quantize(product, group.act_columns, model.activation, **group.rounding))
            post_gain = layer.post_mlp_norm
        return x, product, post_gain

    def _logits(self, x: Tensor, product: Product, post_gain: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        head = self.model.head
        planes, scale = final_norm(
            x, head.matrix.act_columns, head.form, self.model.final_norm, self.model.eps, product, post_gain
        )
        return logits_argmax(accumulate(planes, head.matrix), scale, head.weight_scale, head.form)

    def _on_device(self):
        return torch.cuda.device(self.ids.device) if self.ids.is_cuda else nullcontext()
