"""Embedding and LM head that are quantized while they are trained, in the format in which the packed file stores them.

Both multiply with ``codes * scale`` of an fp32 master (kernels/tables.py), and the gradient reaches the master as if
nothing had been quantized. So the packed student reads exactly what was trained. The lookup quantizes only the rows that it
reads; the head quantizes its whole table, once per forward pass. Activations stay float (the runtime's 16 bits are as good:
kernels/cpu/tables.py).

Like BitLinear, they take over the Parameter objects of the modules that they replace, so that state-dict keys, a tie
between the two, and ZeRO-3 partitions stay as they were.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistill.errors import UserError
from bitdistill.kernels.packing import INT4_GROUP, TABLE_FORMATS
from bitdistill.kernels.tables import fake_quantize_table

FULL_PRECISION = "fp16"  # as the packed file stores such a table; training itself does not round it


class QuantizedEmbedding(nn.Module):
    """``embed_scale * q(W)[ids]``: an embedding whose rows are quantized as they are read.

    Args:
        embedding: the nn.Embedding to replace; its weight (V, I) becomes the master. Gemma's has an `embed_scale`, which
            multiplies after the quantizer.
        format: "int8", "int4" or "ternary".
    """

    def __init__(self, embedding: nn.Embedding, format: str):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.weight = embedding.weight
        self.format = format
        scale = getattr(embedding, "embed_scale", None)
        self.register_buffer("embed_scale", torch.tensor(1.0) if scale is None else scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = fake_quantize_table(F.embedding(ids, self.weight, self.padding_idx), self.format)
        return rows * self.embed_scale.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


class QuantizedHead(nn.Module):
    """``x @ q(W).T``: an LM head whose table is quantized, and whose input is not.

    Args:
        linear: the nn.Linear to replace, without a bias; its weight (V, I) becomes the master.
        format: "int8", "int4" or "ternary".
    """

    def __init__(self, linear: nn.Linear, format: str):
        super().__init__()
        assert linear.bias is None, "an LM head with a bias"
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        self.format = format

    def quantized_weight(self) -> Tensor:
        """(V, I) ``codes * scale``, with a gradient that reaches the master; where that is partitioned, gather it first."""
        return fake_quantize_table(self.weight, self.format)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def quantize_embeddings(model: nn.Module, format: str) -> None:
    """Replaces a causal LM's input embedding and LM head, tied or not, in place; "fp16" leaves them as they are.

    Args:
        model: a Hugging Face causal LM, also with ZeRO-3 partitioned parameters.
        format: "fp16", "int8", "int4" or "ternary".

    Raises:
        UserError: an unknown format, or one that the hidden size does not fit.
    """
    if format not in TABLE_FORMATS:
        raise UserError(
            "refine.embedding",
            expected=f"one of {', '.join(TABLE_FORMATS)}",
            got=repr(format),
            do="Choose one of these.",
        )
    if format == FULL_PRECISION:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if format == "int4" and embedding.embedding_dim % INT4_GROUP:
        raise UserError(
            "refine.embedding",
            expected=f"a hidden size that {INT4_GROUP} divides, for int4",
            got=str(embedding.embedding_dim),
            do="Use int8 or ternary.",
        )
    tied = head.weight is embedding.weight
    model.set_input_embeddings(QuantizedEmbedding(embedding, format))
    model.set_output_embeddings(QuantizedHead(head, format))
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def embedding_format(model: nn.Module) -> str:
    """What a model's embedding and LM head were trained in: "fp16" (full precision), "int8", "int4" or "ternary"."""
    return getattr(model.get_input_embeddings(), "format", FULL_PRECISION)


def multiplied_weight(head: nn.Module) -> Tensor:
    """(V, I) what an LM head multiplies with: its weight, or that quantized. Under ZeRO-3 gather it first."""
    return head.quantized_weight() if isinstance(head, QuantizedHead) else head.weight
