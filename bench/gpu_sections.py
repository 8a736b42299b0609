"""The measurements of single kernels for bench/gpu_proof.py, one function per section (those of whole models are in
gpu_models.py). Each function builds its inputs, times our kernel beside those that it is compared with, and hands rows to a
Bench.

Sizes: M is 16,384 tokens (32 x 512) unless a row says otherwise; shapes are those of Qwen3 0.6B, 1.7B and 4B; inputs are
normal and really quantized, because zeros would make every matrix product look a tenth faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels.numerics import ACT_BLOCK
from gpu_baselines import (
    FakeQuantLinear,
    Skipped,
    eager_relation_kl,
    eager_vocabulary_loss,
    onebitllms_linear,
    torchao_linear,
)
from gpu_timing import Call, CudaTimer, Deadline, DryTimer, Row, Target, Timing, copies_needed, judge
from random_models import Shape

EXPONENTIALS_A_CLOCK = 16  # of a multiprocessor, sm_80 to sm_100
CLOCK = 1.755e9  # Hz, of an H200 under load
EPS = 1e-6
ONE_COPY = 2**62  # bytes of inputs that outgrow every cache by themselves: no rotation is needed


@dataclass
class Bench:
    """What a section gets: where to run, how to time, and where rows go.

    Args:
        device: "cuda", or "cpu" for a dry run. tokens: M. shapes: by name. quick: fewer shapes and no slow contenders.
        copy_bandwidth: bytes per second, reads and writes counted. matrix_rate: bf16 operations per second. Both are measured
            first; in a dry run they are 1.
    """

    timer: CudaTimer | DryTimer
    deadline: Deadline
    device: str
    tokens: int
    shapes: dict[str, Shape]
    quick: bool = False
    copy_bandwidth: float = 1.0
    matrix_rate: float = 1.0
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        """Whether nothing is timed."""
        return isinstance(self.timer, DryTimer)

    def compare(self, works: dict[str, Callable[[int], Call]], bytes_of_a_copy: int, most: int = 64, **options):
        """Contenders in turn. works: by name, what makes the call for the i-th copy of the inputs."""
        self.deadline.check()
        copies = 1 if self.dry else copies_needed(bytes_of_a_copy, most)
        return self.timer.compare({name: [make(i) for i in range(copies)] for name, make in works.items()}, **options)

    def row(self, section: str, what: str, timing: Timing | None, **judged) -> None:
        """Judges a measurement and keeps its row."""
        self.rows.append(judge(section, what, timing, **judged))

    def moved(self, count: float) -> float:
        """Seconds that so many bytes take at the copy bandwidth."""
        return count / self.copy_bandwidth

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype) * scale


def median(timing: Timing | None) -> float | None:
    """Of a timing that there may be."""
    return None if timing is None else timing.median


def ceilings(bench: Bench) -> None:
    """The copy bandwidth and the rate of bf16 products of this device, which all floors are worked out from."""
    size, width = (2**20, 256) if bench.dry else (2**30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    (copy,) = bench.timer.compare({"copy": [lambda: target.copy_(source)]}).values()
    a, b = bench.normal(width, width), bench.normal(width, width)
    (product,) = bench.timer.compare({"bf16 product": [lambda: a @ b]}).values()
    if not bench.dry:
        bench.copy_bandwidth, bench.matrix_rate = 2 * size / copy.median, 2 * width**3 / product.median
    gigabytes, tera = bench.copy_bandwidth / 1e9, bench.matrix_rate / 1e12
    bench.row("ceilings", "copy of 1 GiB", copy, note=f"{gigabytes:,.0f} GB/s read and written")
    bench.row("ceilings", f"bf16 product of {width}^3", product, note=f"{tera:,.0f} TFLOP/s")


def quantizers(bench: Bench) -> None:
    """absmax, RMSNorm + absmax and SwiGLU + SubLN + absmax, and the backward passes of the norms."""
    from bitdistill.kernels.gpu.norm_quantize import rms_norm_quantize, rms_norm_quantize_backward
    from bitdistill.kernels.gpu.quantize import quantize_activation
    from bitdistill.kernels.gpu.swiglu_quantize import swiglu_norm_quantize, swiglu_norm_quantize_backward

    section, M, share = "quantize (M x width, bf16)", bench.tokens, Target("floor", 0.9)
    for width in sorted({shape.hidden for shape in bench.shapes.values()}):
        elements, gain = M * width, torch.ones(width, device=bench.device)

        def plain(_, width=width):
            x = bench.normal(M, width)
            return lambda: quantize_activation(x)

        def normed(_, width=width, gain=gain):
            x = bench.normal(M, width)
            return lambda: rms_norm_quantize(x, gain, EPS)

        def backward(_, width=width, gain=gain):
            x, dy = bench.normal(M, width), bench.normal(M, width)
            rstd = rms_norm_quantize(x, gain, EPS)[1]
            return lambda: rms_norm_quantize_backward(dy, x, gain, rstd)

        timings = bench.compare({f"absmax {width}": plain, f"RMSNorm + absmax {width}": normed}, 2 * elements)
        for name, timing in timings.items():
            bench.row(section, name, timing, floor=bench.moved(3 * elements), target=share)
        (timing,) = bench.compare({f"RMSNorm backward {width}": backward}, 4 * elements).values()
        bench.row(section, f"RMSNorm backward {width}", timing, floor=bench.moved(6 * elements))
    for width in sorted({shape.intermediate for shape in bench.shapes.values()}):
        elements, gain = M * width, torch.ones(width, device=bench.device)

        def forward(_, width=width, gain=gain):
            gate, up = bench.normal(M, width), bench.normal(M, width)
            return lambda: swiglu_norm_quantize(gate, up, gain, EPS)

        def backward(_, width=width, gain=gain):
            gate, up, dy = (bench.normal(M, width) for _ in range(3))
            rstd = swiglu_norm_quantize(gate, up, gain, EPS)[1]
            return lambda: swiglu_norm_quantize_backward(dy, gate, up, gain, rstd)

        (timing,) = bench.compare({f"SwiGLU + SubLN {width}": forward}, 4 * elements).values()
        bench.row(section, f"SwiGLU + SubLN {width}", timing, floor=bench.moved(5 * elements), target=share)
        (timing,) = bench.compare({f"SwiGLU + SubLN backward {width}": backward}, 6 * elements).values()
        bench.row(section, f"SwiGLU + SubLN backward {width}", timing, floor=bench.moved(10 * elements))


def weights(bench: Bench) -> None:
    """absmean and ternary codes of all linears of a model, as once an optimizer step."""
    from bitdistill.kernels.gpu.quantize import quantize_weights

    for name, shape in bench.shapes.items():
        linears = [
            bench.normal(*size, dtype=torch.float32, scale=0.02)
            for _ in range(shape.layers)
            for size in shape.linears().values()
        ]
        call = lambda linears=linears: quantize_weights(linears)  # noqa: E731
        (timing,) = bench.compare({f"weights of {name}": lambda _, call=call: call}, ONE_COPY).values()
        floor = bench.moved(5 * shape.linear_weights())
        what = f"{len(linears)} linears of {name}, fp32"
        bench.row("absmean + ternary codes", what, timing, floor=floor, target=Target("floor", 0.85))
        del linears, call


def products(bench: Bench) -> None:
    """The int8 product alone beside bf16: what the tensor cores give at the inner widths of these models."""
    from bitdistill.kernels.gpu import bit_linear, matmul

    M = bench.tokens
    for shape in bench.shapes.values():
        for I, O in ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)):
            ternary = bit_linear.ternarize([bench.normal(O, I, dtype=torch.float32, scale=0.02)])
            weight = bench.normal(O, I, scale=0.02)

            def ours(_, ternary=ternary, I=I, O=O):
                codes, scale = bit_linear.quantize_input(bench.normal(M, I))
                return lambda: matmul.int8_linear(codes, scale, *ternary[:2], [O], dtype=torch.bfloat16)

            def theirs(_, weight=weight, I=I):
                x = bench.normal(M, I)
                return lambda: F.linear(x, weight)

            timings = bench.compare({f"int8 {I} -> {O}": ours, f"bf16 {I} -> {O}": theirs}, M * I, most=8)
            timing, plain = timings.values()
            operations = 2 * M * I * O
            rate = "" if timing is None else f"{operations / timing.median / 1e12:,.0f} TOP/s, "
            beside = "" if plain is None else f"bf16 {operations / plain.median / 1e12:,.0f} TFLOP/s"
            floor = operations / (2 * bench.matrix_rate)
            bench.row("int8 product (M x I -> O)", f"{I} -> {O}", timing, floor=floor, note=rate + beside)


def linears(bench: Bench) -> None:
    """Forward and every gradient of linear layers, weights quantized beforehand (once per step), beside `nn.Linear` in bf16."""
    from bitdistill.kernels.gpu import bit_linear

    cases: list[tuple[str, list[tuple[int, list[int]]], float, float]] = []  # name, [(I, [O, ...])], exact, fast
    for width in (256,) if bench.dry else (1024, 2048, 4096):
        cases.append((f"square {width}", [(width, [width])], 1.10 if width >= 2048 else 0.0, 0.0))
    for name, shape in bench.shapes.items():
        mlp = [(shape.hidden, [shape.intermediate] * 2), (shape.intermediate, [shape.hidden])]
        cases.append((f"MLP of {name}", mlp, 1.10 if shape.hidden >= 2048 else 0.0, 1.3 if name == "0.6B" else 1.5))
    for name, layers, exact_target, fast_target in cases:
        _linear_case(bench, bit_linear, name, layers, exact_target, fast_target)


def _linear_case(bench: Bench, bit_linear, name: str, layers, exact_target: float, fast_target: float) -> None:
    M = bench.tokens
    masters = [[bench.normal(O, I, dtype=torch.float32, scale=0.02) for O in outs] for I, outs in layers]
    for weight in (weight for group in masters for weight in group):
        weight.requires_grad_()
    held = [bit_linear.ternarize(group) for group in masters]
    inputs: dict[int, list[tuple[Tensor, list[Tensor]]]] = {}

    def data(copy: int):
        if copy not in inputs:
            inputs[copy] = [
                (bench.normal(M, I).requires_grad_(), [bench.normal(M, O) for O in outs]) for I, outs in layers
            ]
        return inputs[copy]

    def ours(mode: str):
        def make(copy: int) -> Call:
            joined = [(x, torch.cat(dys, 1)) for x, dys in data(copy)]

            def call():
                grads = []
                for (x, dy), group, ternary in zip(joined, masters, held, strict=True):
                    activation = bit_linear.quantize_input(x)
                    y = bit_linear.ternary_linear(x, activation, group, [], ternary, torch.bfloat16, mode)
                    grads.append(torch.autograd.grad(y, [x, *group], dy))
                return grads

            return call

        return make

    def theirs(wrap, dtype: torch.dtype):
        modules = []
        for (I, outs), group in zip(layers, masters, strict=True):
            for O, weight in zip(outs, group, strict=True):
                linear = torch.nn.Linear(I, O, bias=False, device=bench.device, dtype=dtype)
                linear.weight.data.copy_(weight)
                modules.append(wrap(linear))

        def make(copy: int) -> Call:
            pairs = [(x, dy) for x, dys in data(copy) for dy in dys]

            def call():
                return [
                    torch.autograd.grad(module(x), [x, *module.parameters()], dy)
                    for module, (x, dy) in zip(modules, pairs, strict=True)
                ]

            return call

        return make

    works = {"exact": ours("exact"), "fast": ours("fast"), "nn.Linear": theirs(lambda linear: linear, torch.bfloat16)}
    works["fake quant"] = theirs(FakeQuantLinear, torch.float32)
    _add_peers(bench, works, theirs)
    timings = bench.compare(works, sum(2 * M * (I + sum(outs)) for I, outs in layers), most=4)
    operations = sum(2 * M * I * sum(outs) for I, outs in layers)
    _linear_rows(bench, name, timings, operations, exact_target, fast_target)


def _add_peers(bench: Bench, works: dict, theirs) -> None:
    """Layers of other projects, where they are installed and work."""
    if bench.quick:
        return
    for peer, wrap in (("torchao", torchao_linear), ("onebitllms", onebitllms_linear)):
        try:
            works[peer] = theirs(wrap, torch.bfloat16)
            works[peer](0)()  # compiles; what does not work here is no fault of ours
        except (Skipped, RuntimeError, TypeError, AttributeError, ImportError, AssertionError) as reason:
            works.pop(peer, None)
            line = str(reason).partition("\n")[0]
            if line not in bench.skipped:
                bench.skipped.append(line)


def _linear_rows(
    bench: Bench, name: str, timings: dict, operations: int, exact_target: float, fast_target: float
) -> None:
    section, base = "linear, forward + backward", median(timings["nn.Linear"])
    for mode, target, units in (("exact", exact_target, 2.5), ("fast", fast_target, 1.5)):
        asked = Target("speedup", target, "nn.Linear")
        floor = units * operations / bench.matrix_rate
        bench.row(section, f"{name}, {mode}", timings[mode], floor=floor, target=asked, contender=base)
    for peer, target in (("fake quant", 0.0), ("torchao", 1.25), ("onebitllms", 1.6)):
        if peer in timings:
            asked = Target("speedup", target, peer)
            note = f"{peer} itself: {milliseconds(timings[peer])}"
            mode = "exact" if timings["exact"] is None or timings["exact"].median < timings["fast"].median else "fast"
            what = f"{name}, {mode}, beside {peer}"
            bench.row(section, what, timings[mode], target=asked, contender=median(timings[peer]), note=note)
    bench.row(section, f"{name}, nn.Linear", timings["nn.Linear"], floor=3 * operations / bench.matrix_rate)


def milliseconds(timing: Timing | None) -> str:
    """Of a timing that there may be."""
    return "-" if timing is None else f"{1e3 * timing.median:.3g} ms"


def vectors(bench: Bench) -> None:
    """The products of a decoding step: one row of activations, packed weights that are not in the L2 cache."""
    from bitdistill.kernels.gpu.decode import accumulate, pack_2bit

    cases = []
    for name, shape in bench.shapes.items():
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        cases += [(f"{name} q, k, v", q + 2 * kv, shape.hidden), (f"{name} o", shape.hidden, q)]
        cases += [(f"{name} gate, up", 2 * shape.intermediate, shape.hidden)]
        cases += [(f"{name} down", shape.hidden, shape.intermediate)]
    cases += [("square", *(2 * (256 if bench.dry else 8192,)))]
    for name, O, I in cases:
        bench.deadline.check()
        timing, nbytes, copies = one_row_product(
            bench, "product", O, I, pack_2bit, lambda act: partial(accumulate, act)
        )
        megabytes = nbytes / 1e6
        if name == "square":
            target = Target("seconds", 6.5e-6)
        elif megabytes >= 12:
            target = Target("floor", 0.70)
        elif megabytes >= 3:
            target = Target("floor", 0.45)
        else:
            target = Target("seconds", 2.5e-6) if megabytes < 1.5 else Target()
        what, note = f"{name}: {O} x {I}", f"{megabytes:.3g} MB, {copies} copies in one CUDA graph"
        floor = bench.moved(nbytes)
        bench.row("decoding product, 2 bits, one row", what, timing, floor=floor, target=target, note=note)


def grouped_vectors(bench: Bench) -> None:
    """The same where scales change along a row: groups of 128 columns, and blocks of 32 columns of the activations."""
    from bitdistill.kernels.gpu.decode_groups import accumulate_groups, pack_groups

    for name, shape in bench.shapes.items():
        for O, I in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            for group, blocks in ((128, False), (128, True), (0, True)):
                bench.deadline.check()
                kind = " and ".join(["groups of 128"] * (group > 0) + ["blocks"] * blocks)
                scale = torch.rand((O, -(-I // group)) if group else (O,), device=bench.device).half().float()

                def multiply(act, blocks=blocks):
                    of_act = torch.rand((1, act.shape[1] // ACT_BLOCK) if blocks else (1,), device=bench.device)
                    return partial(accumulate_groups, act, of_act)

                pack = partial(pack_groups, scale=scale, group=group)
                timing, nbytes, copies = one_row_product(bench, kind, O, I, pack, multiply)
                note, floor = f"{nbytes / 1e6:.3g} MB, {copies} copies in one CUDA graph", bench.moved(nbytes)
                what = f"{name}: {O} x {I}, {kind}"
                bench.row("decoding product, 2 bits, one row", what, timing, floor=floor, note=note)


def one_row_product(
    bench: Bench, kind: str, O: int, I: int, pack: Callable, multiply: Callable
) -> tuple[Timing | None, int, int]:
    """One row of random codes times packed (O, I) matrices, so many of them in one CUDA graph that no cache holds them.

    Args:
        kind: for the timer. pack: of int8 codes (O, I). multiply: of int8 (1, P), gives what multiplies it with a matrix.

    Returns: the time of one product, the bytes of a matrix, and how many there were.
    """
    draw = lambda: torch.randint(-1, 2, (O, I), dtype=torch.int8, device=bench.device)  # noqa: E731
    first = pack(draw())
    copies = 1 if bench.dry else copies_needed(first.nbytes, 256)
    matrices = [first, *(pack(draw()) for _ in range(copies - 1))]
    act = torch.randint(-127, 128, (1, first.act_columns), dtype=torch.int8, device=bench.device)
    act[:, I:] = 0
    product = multiply(act)
    replay = bench.timer.graph([partial(product, matrix) for matrix in matrices])
    (whole,) = bench.timer.compare({f"{kind} {O} x {I}": [replay]}).values()
    timing = whole and Timing(*(x / copies for x in (whole.median, whole.smallest, whole.largest)), whole.waits)
    return timing, first.nbytes, copies


def relations(bench: Bench) -> None:
    """Relations of Q, K and V in 32 heads, forward and backward, beside log_softmax and kl_div on whole (L, L) logits."""
    from bitdistill.kernels.gpu.relation_kl import relation_kl_rows

    section = "relation KL (32 heads, Q, K, V, forward + backward)"
    processors = torch.cuda.get_device_properties(0).multi_processor_count if bench.device == "cuda" else 1
    cases = [(1, 32, 4)] if bench.dry else [(32, 512, 32), (4, 4096, 32)]
    for B, L, heads in cases:
        bench.deadline.check()
        widths = (64, 32, 32)  # of Q, K and V of Qwen3 0.6B in 32 heads
        pairs = []
        for width in widths:
            dtype = torch.float32 if bench.dry else torch.bfloat16
            teacher = bench.normal(B, heads, L, width, dtype=dtype)
            pairs.append((teacher, (teacher + bench.normal(*teacher.shape, dtype=dtype, scale=0.1)).requires_grad_()))
        valid = torch.ones(B, L, dtype=torch.bool, device=bench.device)

        def rows(teacher, student, valid=valid):
            scale = 1 / math.sqrt(teacher.shape[-1])
            return relation_kl_rows(
                teacher, None, student, None, valid, causal=False, scale_teacher=scale, scale_student=scale
            )

        def ours(pairs=pairs, rows=rows):
            loss = sum(rows(teacher, student).mean() for teacher, student in pairs)
            return torch.autograd.grad(loss, [student for _, student in pairs])

        def eager(pairs=pairs):
            loss = sum(eager_relation_kl(teacher, student) for teacher, student in pairs)
            return torch.autograd.grad(loss, [student for _, student in pairs])

        small = L == 512 or bench.dry
        works = {"ours": lambda _, ours=ours: ours} | ({"eager": lambda _, eager=eager: eager} if small else {})
        timings = bench.compare(works, ONE_COPY)
        exponentials = 4 * len(widths) * B * heads * L * L  # of teacher and student, forward and again backward
        operations = sum(5 * 2 * B * heads * L * L * width for width in widths)
        floor = max(exponentials / (EXPONENTIALS_A_CLOCK * processors * CLOCK), operations / bench.matrix_rate)
        what, limit = f"B {B}, L {L}", 2.0e-3 if L == 512 else 12e-3
        bench.row(section, what, timings["ours"], floor=floor, target=Target("seconds", limit))
        if small:
            asked, base = Target("speedup", 10, "eager"), median(timings["eager"])
            note = f"eager: {milliseconds(timings['eager'])}"
            bench.row(section, what, timings["ours"], target=asked, contender=base, note=note)
            memory = bench.timer.peak_bytes(ours), bench.timer.peak_bytes(eager)
            results = sum(student.nbytes for _, student in pairs)  # the gradients, which both return
            extra = [None if used is None else max(0, used - results) for used in memory]
            asked = Target("fewer", 500, "eager")
            note = "" if None in extra else f"{extra[0] / 1e6:,.0f} MB beside {extra[1] / 1e6:,.0f} MB, gradients apart"
            bench.row(section, f"{what}, memory", None, target=asked, measured=extra[0], contender=extra[1], note=note)
            worst = max(_relation_error(rows, teacher, student, valid) for teacher, student in pairs)
            asked = Target("error", 1e-4)
            bench.row(
                section, f"{what}, worst row", None, target=asked, measured=worst, note="relative, against float64"
            )


def _relation_error(rows, teacher: Tensor, student: Tensor, valid: Tensor) -> float:
    """The worst relative error of a row's KL in the first sequence."""
    with torch.no_grad():
        ours = rows(teacher[:1], student[:1], valid[:1]).double()
        scale = 1 / math.sqrt(teacher.shape[-1])
        target, log_q = ((x[:1].double() @ x[:1].double().mT * scale).log_softmax(-1) for x in (teacher, student))
        exact = (target.exp() * (target - log_q)).sum(-1)
    return float(((ours - exact).abs() / exact).max())


def vocabulary(bench: Bench) -> None:
    """LM head, cross-entropy and KL over the vocabulary with every gradient, beside whole logits."""
    from bitdistill.kernels.vocabulary import linear_distillation

    N, H, V = (8, 32, 64) if bench.dry else (8192, 1024, 151_936)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    x, weight = bench.normal(N, H, dtype=dtype).requires_grad_(), bench.normal(V, H, dtype=dtype, scale=0.02)
    weight.requires_grad_()
    teacher_x, teacher_weight = bench.normal(N, H, dtype=dtype), bench.normal(V, H, dtype=dtype, scale=0.02)
    targets = torch.randint(0, V, (N,), device=bench.device)

    def ours(chunk_bytes: int) -> Call:
        def call():
            ce, kl = linear_distillation(
                x, weight, targets, teacher_x, teacher_weight,
                temperature=5.0, ce_weight=1 / N, kl_weight=1 / N, chunk_bytes=chunk_bytes,
            )  # fmt: skip
            return torch.autograd.grad(ce / N + kl / N, [x, weight] if weight.requires_grad else [x])

        return call

    def eager():
        loss = eager_vocabulary_loss(x, weight, targets, teacher_x, teacher_weight, 5.0)
        return torch.autograd.grad(loss, [x, weight])

    section, floor = "head + CE + KL over 151,936 words (8,192 rows, H 1024)", 4 * 2 * N * H * V / bench.matrix_rate
    cases = {"whole chunks": ours(5 * 2**28), "chunks of 64 MB": ours(64 * 10**6), "eager": eager}
    timings = bench.compare({name: lambda _, call=call: call for name, call in cases.items()}, ONE_COPY)
    for name, seconds, limit in (("whole chunks", 20e-3, 2.6e9), ("chunks of 64 MB", 26e-3, 64e6)):
        used = bench.timer.peak_bytes(cases[name])
        note = "" if used is None else f"peak {used / 1e9:.2f} GB, gradients included"
        bench.row(section, name, timings[name], floor=floor, target=Target("seconds", seconds), note=note)
        weight.requires_grad_(False)  # without dW, which is a result: what is left is room for logits, and dx
        used = bench.timer.peak_bytes(cases[name])
        weight.requires_grad_()
        extra = None if used is None else max(0, used - 2 * x.nbytes)
        asked = Target("bytes", limit)
        bench.row(section, f"{name}, memory", None, target=asked, measured=extra, note="head frozen, dx apart")
    base = median(timings["eager"])
    note = f"eager: {milliseconds(timings['eager'])}"
    asked = Target("speedup", 0.0, "eager")
    bench.row(section, "whole chunks", timings["whole chunks"], target=asked, contender=base, note=note)
