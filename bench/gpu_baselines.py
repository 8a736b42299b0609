"""What our kernels are compared with: plain PyTorch as one would write it, and layers of other projects.

Everything here is eager PyTorch in bf16 with fp32 masters. No kernel of this project is called.
"""

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FakeQuantLinear(nn.Module):
    """BitLinear by fake quantization: dequantized codes in a bf16 product, straight through for the gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp_min(1e-5)
        ternary = (self.weight / scale).round().clamp(-1, 1) * scale
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-5).float() / 127
        int8 = ((x / step).round().clamp(-128, 127) * step).to(x.dtype)
        return F.linear(x + (int8 - x).detach(), (self.weight + (ternary - self.weight).detach()).to(x.dtype))


class FakeQuantSubLN(nn.Module):
    """RMSNorm in fp32, and the layer after it."""

    def __init__(self, layer: FakeQuantLinear, eps: float):
        super().__init__()
        self.layer, self.eps = layer, eps
        self.gain = nn.Parameter(torch.ones_like(layer.weight[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.rms_norm(x.float(), x.shape[-1:], self.gain, self.eps).to(x.dtype))


def fake_quant(model: nn.Module, projections: tuple[str, ...], subln_before: tuple[str, ...], eps: float) -> None:
    """Puts FakeQuantLinear in the place of a model's projections, with a norm before some of them."""
    for name, module in list(model.named_modules()):
        projection = name.rpartition(".")[2]
        if projection not in projections or not isinstance(module, nn.Linear):
            continue
        layer = FakeQuantLinear(module)
        model.set_submodule(name, FakeQuantSubLN(layer, eps) if projection in subln_before else layer)


class Skipped(Exception):
    """A contender that is not here, with the reason."""


def torchao_linear(linear: nn.Linear) -> nn.Module:
    """torchao's BitNet training layer, compiled, as its documentation says.

    Raises:
        Skipped: torchao is not installed, or without it.
    """
    try:
        from torchao import quantize_
        from torchao.prototype.quantized_training import bitnet_training
    except ImportError as error:
        raise Skipped(f"torchao: {error}") from None
    holder = nn.Sequential(linear)
    quantize_(holder, bitnet_training())
    return torch.compile(holder)


def onebitllms_linear(linear: nn.Linear) -> nn.Module:
    """onebitllms' BitNetLinear.

    Raises:
        Skipped: onebitllms is not installed.
    """
    if importlib.util.find_spec("onebitllms") is None:
        raise Skipped("onebitllms: not installed")
    from onebitllms import BitNetLinear

    layer = BitNetLinear(linear.in_features, linear.out_features)
    layer.weight = linear.weight
    return layer


# ---------------------------------------------------------------------------------------------------- losses


def eager_relation_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL of softmax(A A^T / sqrt(d)) rows, A (B, H, T, D), by log_softmax and kl_div in fp32."""
    scale = 1 / math.sqrt(teacher.shape[-1])
    with torch.no_grad():
        target = (teacher @ teacher.mT * scale).float().log_softmax(-1)
    ours = (student @ student.mT * scale).float().log_softmax(-1)
    return F.kl_div(ours, target, reduction="sum", log_target=True) / target[..., 0].numel()


def eager_vocabulary_loss(
    x: Tensor, weight: Tensor, targets: Tensor, teacher_x: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """Mean cross-entropy plus mean KL of whole logits, as in any training script."""
    logits = F.linear(x, weight).float()
    with torch.no_grad():
        target = (F.linear(teacher_x, teacher_weight).float() / temperature).log_softmax(-1)
    kl = F.kl_div((logits / temperature).log_softmax(-1), target, reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, targets) + kl


# ---------------------------------------------------------------------------------------------------- decoding


def _plain_layer(x, q_norm, k_norm, norms, qkv, o, gate_up, down, keys, values, position, cos, sin, mask, eps):
    """One layer over one token; keys and values (kv_heads, capacity, head_dim) are written at `position`."""
    kv_heads, _, head_dim = keys.shape
    heads = o.shape[1] // head_dim

    def rope(heads: Tensor, gain: Tensor) -> Tensor:
        heads = F.rms_norm(heads, (head_dim,), gain, eps)
        left, right = heads.chunk(2, -1)
        return heads * cos + torch.cat((-right, left), -1) * sin

    normed = F.rms_norm(x, x.shape[-1:], norms[0], eps)
    q, k, v = F.linear(normed, qkv).view(-1, head_dim).split((heads, kv_heads, kv_heads))
    keys.index_copy_(1, position, rope(k, k_norm)[:, None])
    values.index_copy_(1, position, v[:, None])
    q = rope(q, q_norm).view(kv_heads, heads // kv_heads, head_dim)  # the queries of a key head are rows of one product
    scores = (q @ keys.mT).float() * head_dim**-0.5
    shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype)
    x = x + F.linear((shares @ values).view(1, -1), o)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norms[1], eps), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


class PlainDecoder:
    """A Qwen3 decoder in bf16 for one sequence, in the harness of ours: static cache, one CUDA graph a step, the next token
    chosen inside it, q/k/v and gate/up as one matrix each, a layer's small operations fused by torch.compile.

    Args:
        shape: random_models.Shape. capacity: positions. weights: of `plain_weights`.
        compiled: whether layers go through torch.compile; all layers share what it makes.
    """

    def __init__(self, shape, capacity: int, weights: dict, compiled: bool, rope_theta: float = 1e6, eps: float = 1e-6):
        self.shape, self.weights, self.eps = shape, weights, eps
        device, dtype = weights["embedding"].device, weights["embedding"].dtype
        self.keys = torch.zeros(shape.layers, shape.kv_heads, capacity, shape.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(1, dtype=torch.int64, device=device)
        half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
        angles = torch.outer(torch.arange(capacity, device=device, dtype=torch.float32), rope_theta**-half)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
        self.places = torch.arange(capacity, device=device)
        self.logits: Tensor | None = None
        self._layer = torch.compile(_plain_layer, dynamic=False) if compiled else _plain_layer

    @torch.no_grad()
    def step(self) -> None:
        """Takes `ids` at `positions` in and puts the likeliest next ones there."""
        w, at = self.weights, self.positions
        x = F.embedding(self.ids, w["embedding"])
        cos, sin, mask = self.cos[at], self.sin[at], self.places <= at
        for layer in range(self.shape.layers):
            names = ("q_norm", "k_norm", "norms", "qkv", "o", "gate_up", "down")
            x = self._layer(
                x,
                *(w[name][layer] for name in names),
                self.keys[layer],
                self.values[layer],
                at,
                cos,
                sin,
                mask,
                self.eps,
            )
        self.logits = F.linear(F.rms_norm(x, x.shape[-1:], w["final"], self.eps), w["embedding"])
        self.ids.copy_(self.logits.argmax(-1))
        self.positions.add_(1).clamp_(max=len(self.places) - 1)


def plain_weights(shape, device: str, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Random weights for PlainDecoder: normal with standard deviation 0.02, gains of 1."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrices(rows: int, columns: int) -> list[Tensor]:
        return [torch.randn(rows, columns, device=device, dtype=dtype) * 0.02 for _ in range(shape.layers)]

    return {
        "embedding": torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) * 0.02,
        "qkv": matrices(q_width + 2 * kv_width, shape.hidden),
        "o": matrices(shape.hidden, q_width),
        "gate_up": matrices(2 * shape.intermediate, shape.hidden),
        "down": matrices(shape.hidden, shape.intermediate),
        "norms": [torch.ones(2, shape.hidden, device=device, dtype=dtype) for _ in range(shape.layers)],
        "q_norm": [torch.ones(shape.head_dim, device=device, dtype=dtype) for _ in range(shape.layers)],
        "k_norm": [torch.ones(shape.head_dim, device=device, dtype=dtype) for _ in range(shape.layers)],
        "final": torch.ones(shape.hidden, device=device, dtype=dtype),
    }
