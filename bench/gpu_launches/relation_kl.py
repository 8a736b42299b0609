"""What kernels/gpu/relation_kl.py launches in production."""

import torch
from torch import Tensor

from bitdistill.kernels.gpu.relation_kernels import inverse_norms, relation_backward, relation_forward, token_spans
from bitdistill.kernels.gpu.relation_kl import _call, _norm_call
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """What distilling Qwen3-0.6B launches in each convention, and heads of 256 and fp32: the arguments
    that relation_kl.py makes, of tensors without memory.
    """
    q, v = (32, 512, 16, 0, 128), (4, 4096, 8, 0, 128)
    launches = [
        *_production("eq12 Q, B 32, T 512", q),
        *_production("alg1 V, B 4, T 4096", v, cosine=True, causal=True),
        *_production("pr382 Q, B 32, T 512", q, cosine=True, heads=32),
        *_production("attention maps, B 4, T 4096", (4, 4096, 16, 8, 128), causal=True),
        *_production("alg1 Q with a floor that bites", q, cosine=True, floor=1e-8),
        *_production("eq12 Q, heads of 256", (32, 512, 4, 0, 256)),
        *_production("alg1 Q, fp32", q, cosine=True, dtype=torch.float32),
    ]
    x, valid = _on_meta(32, 16, 512, 128, dtype=torch.bfloat16), _on_meta(32, 512, dtype=torch.uint8)
    norms, spans = _on_meta(32, 16, 512), _on_meta(32, 2, dtype=torch.int32)
    return [
        *launches,
        _launch(inverse_norms, "B 32, T 512", _norm_call(x, valid, norms, 16)[1]),
        _launch(token_spans, "B 32, T 512", {"valid": valid, "spans": spans, "T": 512, "BLOCK": 1024}),
    ]


def _on_meta(*shape, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _production(shape, sizes, causal=False, cosine=False, heads=0, floor=0.0, dtype=torch.bfloat16):
    B, T, q_heads, kv_heads, D = sizes
    heads = heads or q_heads
    a, b = (_on_meta(B, T, h, D, dtype=dtype).transpose(1, 2) for h in (q_heads, kv_heads or q_heads))
    valid, spans = _on_meta(B, T, dtype=torch.uint8), _on_meta(B, 2, dtype=torch.int32)
    norms, numbers, kl = _on_meta(2, B, heads, T), _on_meta(4 if floor else 3, B, heads, T), _on_meta(B, heads, T)
    settings = causal, 1.0, 1.0, cosine, heads, floor
    calls = [("forward", (a, b if kv_heads else a), {"kl_out": kl})]
    if kv_heads:
        calls += [("row", (a, b), {"grad_kl": kl, "grad_x": a}), ("key", (b, a), {"grad_kl": kl, "grad_x": b})]
    else:
        calls += [("both", (a, a), {"grad_kl": kl, "grad_x": a})]
    for part, only in (("sm_90", ("sm_90", "sm_100")), ("sm_80", ("sm_80",)), ("gfx942", ("gfx942",))):
        for role, (x, y), outputs in calls:
            _, arguments = _call(role, part, (x, y, x, y), valid, spans, norms, numbers, settings, **outputs)
            yield _launch(
                relation_forward if role == "forward" else relation_backward, f"{shape}, {role}", arguments, only
            )


def _launch(kernel, shape: str, arguments: dict, only: tuple[str, ...] = ()) -> Launch:
    types = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32"}
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    given = {name: value for name, value in arguments.items() if name not in (*options, "enable_fp_fusion")}
    constexprs = {
        name: value for name, value in given.items() if value is None or (name.isupper() and name not in "TH")
    }
    signature = {
        name: f"*{types[value.dtype]}" if isinstance(value, Tensor) else "i32" if isinstance(value, int) else "fp32"
        for name, value in given.items()
        if name not in constexprs
    }
    aligned = tuple(name for name in signature if not isinstance(given[name], float | int) or given[name] % 16 == 0)
    return Launch(kernel, shape, signature, constexprs, **options, aligned=aligned, only=only)
