"""The proof that a packed file holds what was trained: it is read back and compared. Raises an error, or returns numbers.

Comparing logits alone cannot prove it tightly. A runtime repeats the student's integers exactly, but adds up its fp32 sums
(norms, attention, LM head) in another order. Now and then a difference in the last bit before a quantizer rounds an
activation to the neighboring int8 code, which is 1/127 of the token's peak, and later layers amplify that. The student
differs as much from *itself* when transformers computes attention eagerly instead of by sdpa, which is more than a
quantizer that wrongly clips at 126 would change. So the function is proved in parts, each within a tight bound, and the
whole is only measured. Two implementations are compared with the student: the plain forward (plain.py), which can leave
activations unrounded, and the compiled runtime that users run.

1. Weights: codes and scales, unpacked from the file, equal `quantize_weight` of the fp32 masters bit for bit.
2. Embedding and LM head: codes and scales equal `quantize_table` of the fp32 masters bit for bit; fp16 entries equal the
   rounded masters. Where the embedding was trained in the file's format, this is what training multiplied with.
3. Every quantized product: given the student's own activations after SubLN, each BitLinear of both implementations gives
   the student's output within MAX_PRODUCT of the token's peak (on a CPU bit for bit; one unit of an accumulator would be
   about 1e-4), or MAX_GROUPED_PRODUCT where groups or blocks are added up in floats. Only for the first prompt.
4. Everything else, with activations left unrounded on both sides, so that no code can flip: the logits of the plain forward
   equal the student's to float noise, MAX_UNROUNDED of their standard deviation. A wrong eps, gain, bias, RoPE or window
   fails here.
5. The whole: the mean KL of the compiled runtime's logits, with an fp32 KV cache, from the student's is below MAX_KL, or
   below MAX_KL_RATIO times the KL between the student with eager and with sdpa attention, where that is more. This bound is
   set by how codes flip, not by precision.

Parts 4 and 5 compare with the student holding the file's embedding. What that format costs (nothing if the embedding was
trained in it), and what a smaller KV cache costs, is reported as well.

Measured (two trained students, three small real models and random 28-layer Llama, Qwen3 and Gemma3, 160-250 tokens): part 3
exactly 0; part 4 up to 1.2e-5; part 5 a mean KL of 5e-7 to 9e-4, where the student against itself has 3e-8 to 9e-4. An int8
embedding costs 2e-5 to 1e-2, a bf16 KV cache about as much, an int8 one 1.1 to 1.3 times that: once anything is rounded,
flipped int8 codes make most of the difference.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bitdistill.errors import UserError
from bitdistill.runtime.compiled import compiled_product
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.plain import TABLE_ROWS, plain_logits, plain_product, table_parts

MAX_PRODUCT = 1e-6
MAX_GROUPED_PRODUCT = 1e-5  # where a sum of floats over groups or blocks may have another order in training
MAX_UNROUNDED = 2e-4
MAX_KL = 1e-2
MAX_KL_RATIO = 5


def prove_parity(path: str | Path, model, prompts: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """Compares a packed file, through the plain forward and the CPU runtime, with the student it was written from.

    Args:
        path: a file of `write_packed`.
        model: the same refined student (torch, fp32); left as it was.
        prompts: token ids of real texts, each no longer than the model's context.

    Returns:
        linears, tokens: how much was compared. product_max_diff: part 3, over the token's peak. unrounded_max_diff: part
        4, over the standard deviation of the logits. max_abs_diff, relative_rms, mean_kl (nats per token, KL(student ||
        runtime)), same_top1 (share): part 5.
        noise_mean_kl, noise_same_top1: the student with eager against sdpa attention.
        embedding_mean_kl, embedding_same_top1: the untouched student against the one with the file's embedding.
        kv_bf16_mean_kl, kv_int8_mean_kl: the runtime with an fp32 KV cache against that with a smaller one.

    Raises:
        UserError: no prompts, or one that does not fit, or a student that is not in fp32.
        RuntimeError: the file does not hold this student; a defect, told with its numbers.
    """
    _check_comparable(model, prompts)
    runtime = Runtime(path, kv_cache="fp32")
    _compare_weights(runtime.model, model)
    _compare_tables(runtime.model, model)

    training, attention = model.training, model.config._attn_implementation
    model.eval()
    try:
        untouched = _student_logits(model, prompts)
        with _tables_of(runtime.model, model):
            student = _student_logits(model, prompts)
            product_difference = _compare_products(runtime.model, model, prompts[0])
            model.set_attn_implementation("eager")
            eager = _student_logits(model, prompts)
            model.set_attn_implementation("sdpa")
            sdpa = student if attention == "sdpa" else _student_logits(model, prompts)
            unrounded_difference = _compare_unrounded(runtime.model, model, prompts)
    finally:
        model.set_attn_implementation(attention)
        model.train(training)

    got = np.concatenate([runtime.logits(ids) for ids in prompts])
    student, untouched, eager, sdpa = (np.concatenate(parts) for parts in (student, untouched, eager, sdpa))
    mean_kl, noise_mean_kl = _kl(student, got).mean(), _kl(sdpa, eager).mean()
    allowed = max(MAX_KL, MAX_KL_RATIO * noise_mean_kl)
    if not mean_kl <= allowed:
        raise RuntimeError(
            f"{path}: mean KL of the runtime from the student is {mean_kl:.2e} nats per token; allowed {allowed:.2e} "
            f"(the student's own noise is {noise_mean_kl:.2e})."
        )
    return {
        "linears": len(runtime.model.config.linears),
        "tokens": len(got),
        "product_max_diff": product_difference,
        "unrounded_max_diff": unrounded_difference,
        "max_abs_diff": float(np.abs(got - student).max()),
        "relative_rms": float(np.sqrt(np.mean((got - student) ** 2)) / student.std()),
        "mean_kl": float(mean_kl),
        "same_top1": _same_top1(student, got),
        "noise_mean_kl": float(noise_mean_kl),
        "noise_same_top1": _same_top1(sdpa, eager),
        "embedding_mean_kl": float(_kl(untouched, student).mean()),
        "embedding_same_top1": _same_top1(untouched, student),
        "kv_bf16_mean_kl": _kv_cache_kl(path, "bf16", prompts, got),
        "kv_int8_mean_kl": _kv_cache_kl(path, "int8", prompts, got),
    }


def _check_comparable(model, prompts: Sequence[Sequence[int]]) -> None:
    import torch

    context, lengths = model.config.max_position_embeddings, [len(ids) for ids in prompts]
    if not lengths or min(lengths) == 0 or max(lengths) > context:
        expected = f"at least one text to compare on, each of 1 to {context} tokens"
        raise UserError(
            "validation_file", expected=expected, got=f"lengths {lengths}", do="Give rows whose prompts fit."
        )
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UserError("student", expected="one in float32", got="other dtypes", do="Load it by refine.load_student.")


def _compare_unrounded(packed, model, prompts: Sequence[Sequence[int]]) -> float:
    """The largest difference of a logit with unrounded activations, in standard deviations of the student's logits."""
    with _unrounded(model):
        student = _student_logits(model, prompts)
    spread = float(np.concatenate(student).std(axis=1).mean())
    plain = plain_logits(packed, prompts, unrounded=True)
    difference = max(float(np.abs(got - want).max()) for got, want in zip(plain, student, strict=True)) / spread
    if not difference <= MAX_UNROUNDED:
        raise RuntimeError(
            f"{packed.path}: with unrounded activations logits differ by {difference:.2e} standard deviations; "
            f"allowed {MAX_UNROUNDED:.0e}. The file holds another function than the student."
        )
    return difference


def _compare_weights(packed, model) -> None:
    from bitdistill.student.layers import bit_linears

    layers = bit_linears(model)
    if list(layers) != list(packed.config.linears):
        raise RuntimeError(f"{packed.path}: holds other linears than the student")
    for name, layer in layers.items():
        codes, scale = layer.ternary()
        codes, got = codes.cpu().numpy(), packed.weight_codes(name)
        if codes.shape != got.shape or (codes != got).any():
            count = "all" if codes.shape != got.shape else int((codes != got).sum())
            raise RuntimeError(f"{packed.path}: {name}: {count} of {codes.size} weight codes differ from the student's")
        scale, got = scale.cpu().numpy(), packed.weight_scales(name)
        if scale.shape != got.shape or (scale != got).any():
            shown = scale.item() if scale.size == 1 else f"{scale.shape} scales"
            raise RuntimeError(f"{packed.path}: {name}: weight_scale differs from the student's {shown!r}")


def _compare_tables(packed, model) -> None:
    import torch

    from bitdistill.kernels.tables import quantize_table

    for name in packed.config.tables():
        weight = model.get_submodule(name).weight.detach()
        for start in range(0, packed.config.vocab_size, TABLE_ROWS):
            rows = slice(start, start + TABLE_ROWS)
            if packed.config.embedding == "fp16":
                want, got = (weight[rows].half(),), (packed.tensors[f"{name}.weight"][rows],)
            else:
                want = quantize_table(weight[rows], packed.config.embedding)
                got = packed.table_codes(name, rows)
            for what, ours, theirs in zip(("entries", "scales"), want, got, strict=False):
                different = int((ours.cpu() != torch.from_numpy(theirs.copy())).sum())
                if different:
                    raise RuntimeError(
                        f"{packed.path}: {name}: {different} of {ours.numel()} {what} from row {start} on differ from the "
                        "student's"
                    )


def _compare_products(packed, model, ids: Sequence[int]) -> float:
    """The largest difference of a BitLinear's output, over the peak of its token, on the student's own activations."""
    from bitdistill.student.layers import bit_linears

    behind_subln = {}  # layer name -> (T, I)
    worst = 0.0

    def compare(name):
        def hook(layer, args, output):
            nonlocal worst
            x = args[0] if layer.subln is None else behind_subln.pop(name)
            x, want = x[0].cpu().numpy(), output[0].cpu().numpy()
            peak = np.maximum(np.abs(want).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            for witness, got in (
                ("compiled", compiled_product(packed, name, x)),
                ("plain", plain_product(packed, name, x)),
            ):
                relative = float((np.abs(got - want) / peak).max())
                sums = layer.quantizer.weight_scale == "group" or layer.act_scale == "block"
                most = MAX_GROUPED_PRODUCT if sums else MAX_PRODUCT
                if not relative <= most:
                    raise RuntimeError(
                        f"{packed.path}: {name}: the quantized product ({witness}) differs from the student's by "
                        f"{relative:.2e} of the token's peak; allowed {most:.0e}"
                    )
                worst = max(worst, relative)

        return hook

    def keep(name):
        def hook(_subln, _args, output):
            behind_subln[name] = output

        return hook

    layers = bit_linears(model)
    handles = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    handles += [
        layer.subln.register_forward_hook(keep(name)) for name, layer in layers.items() if layer.subln is not None
    ]
    try:
        _student_logits(model, [ids])
    finally:
        for handle in handles:
            handle.remove()
    return worst


@contextmanager
def _tables_of(packed, model) -> Iterator[None]:
    """The student with the file's dequantized embedding (and LM head) inside the block."""
    import torch

    from bitdistill.student.embeddings import FULL_PRECISION, embedding_format

    if embedding_format(model) != FULL_PRECISION:  # it multiplies with the file's codes and scales itself
        yield
        return
    weights = {name: model.get_submodule(name).weight for name in packed.config.tables()}
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            for rows, part in table_parts(packed, name):
                weight[rows] = torch.from_numpy(part).to(weight.device)
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(saved[name])


@contextmanager
def _unrounded(model) -> Iterator[None]:
    """Inside the block every BitLinear multiplies its activations as they are with the dequantized ternary weight."""
    from torch.nn import functional as F

    from bitdistill.student.layers import bit_linears

    def forward_of(layer):
        def forward(x):
            x = x if layer.subln is None else layer.subln(x)
            return F.linear(x, layer.quantized_weight(), layer.ternary_bias())

        return forward

    layers = bit_linears(model).values()
    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _kv_cache_kl(path: str | Path, kv_cache: str, prompts: Sequence[Sequence[int]], full: np.ndarray) -> float:
    runtime = Runtime(path, kv_cache=kv_cache)
    return float(_kl(full, np.concatenate([runtime.logits(ids) for ids in prompts])).mean())


def _student_logits(model, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].cpu().numpy()
            for ids in prompts
        ]


def _kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(softmax p || softmax q) per row, in float64."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (p_logits, q_logits))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _same_top1(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
