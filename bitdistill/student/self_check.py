"""Whether the kernels of a device compute what the reference computes: checked once per machine, before they are used.

Nobody has tested every processor, GPU, driver and version on which the kernels will run. The first process that uses them
on a machine therefore compares each kernel with `kernels/reference.py` on a few shapes. It does so in processes of their own;
if one dies, the kernel counts as wrong. The answers are kept in ``self_check.json`` beside the compiled kernels,
under all that they depend on: the processor or GPU, its driver, the versions of the libraries, the environment variables
that choose instructions, and the sources.

    python -m bitdistill.student.self_check cpu|cuda:N NAME ...      one JSON line when a check begins, one when it ends
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import filelock
import torch
from torch.nn import functional as F

from bitdistill.cpus import available_cpus
from bitdistill.files import write_whole
from bitdistill.kernels import reference
from bitdistill.kernels.numerics import IGNORED

LIBRARIES = ("torch", "numba", "llvmlite", "triton")
VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "BITDISTILL_CPU_FEATURES",
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_DISABLE_JIT",
)
SHAPES = ((5, 48, 32), (70, 576, 192), (3, 575, 33))  # N, I, O
VOCABULARY, ATTENTION = "losses over the vocabulary", "attention"  # checks whose kernels are left out alone
# Checks on a CPU that share little compiled code with the others.
APART = (VOCABULARY, ATTENTION, "norm_quantize_input", "gated_quantize_input")
PATIENCE = 600  # seconds for compilation and all checks


def kernels_of(device: torch.device) -> ModuleType:
    """The module of the kernels for a type of device, checked or not."""
    if device.type == "cpu":
        from bitdistill.kernels.cpu import bit_linear
    else:
        from bitdistill.kernels.gpu import bit_linear
    return bit_linear


# --- the checks ----------------------------------------------------------------------------------------------------------


def _same(name: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(ours, expected):
        wrong = (ours != expected).sum().item()
        raise AssertionError(f"{name}: {wrong:,} of {expected.numel():,} values differ from the reference")


def _near(name: str, ours: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.1e}, at most {bound:.0e} expected")


def _tensors(device: torch.device):
    """x, weight, bias, gain and the gradient of an output, for each of SHAPES."""
    generator = torch.Generator().manual_seed(0)
    for N, I, O in SHAPES:
        shapes = ((N, I), (O, I), (O,), (I,), (N, O))
        tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        tensors[0][0] = 0
        yield [tensor.requires_grad_() for tensor in tensors[:4]] + [tensors[4]]


def _quantize_input(kernels, device):
    for x, *_ in _tensors(device):
        for ours, expected in zip(kernels.quantize_input(x), reference.quantize_activation(x), strict=True):
            _same("codes and scales", ours, expected)


def _ternarize(kernels, device):
    for _, weight, *_ in _tensors(device):
        codes, scale = reference.quantize_weight(weight)
        ternary = kernels.ternarize([weight])
        _same("codes", ternary.weight_codes, codes)
        _same("scale", ternary.weight_scale, scale.view(1))


def _against(activation, anchor, y, inputs):
    codes, scale = reference.quantize_activation(y)
    _near("values", activation.act_codes * activation.act_scale, codes * scale, 1e-2)  # a code may flip
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    ours, theirs = torch.autograd.grad(anchor, inputs, dy), torch.autograd.grad(y, inputs, dy)
    for a, b in zip(ours, theirs, strict=True):
        _near("gradient", a, b, 1e-4)


def _norm_quantize_input(kernels, device):
    for x, _, _, gain, _ in _tensors(device):
        y = reference.rms_norm(x, gain, 1e-6)
        _against(*kernels.norm_quantize_input(x, gain, 1e-6), y, [x, gain])


def _gated_quantize_input(kernels, device):
    for gate, _, _, gain, _ in _tensors(device):
        up = gate.detach().flip(0).requires_grad_()
        for name, act in (("silu", F.silu), ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"))):
            _against(*kernels.gated_quantize_input(gate, up, None, 0.0, name), act(gate) * up, [gate, up])
            y = reference.rms_norm(act(gate) * up, gain, 1e-6)
            _against(*kernels.gated_quantize_input(gate, up, gain, 1e-6, name), y, [gate, up, gain])


def _linear(kernels, x, weight, bias, backward):
    biases = [] if bias is None else [bias]
    activation, ternary = kernels.quantize_input(x), kernels.ternarize([weight])
    return kernels.ternary_linear(x, activation, [weight], biases, ternary, torch.float32, backward)


def _ternary_linear(kernels, device):
    for x, weight, *_ in _tensors(device):
        _same("output", _linear(kernels, x, weight, None, "exact"), reference.bit_linear(x, weight))


def _gradients(backward: str, bound: float) -> Callable:
    def check(kernels, device):
        for x, weight, bias, _, dy in _tensors(device):
            inputs = [x, weight, bias]
            ours = torch.autograd.grad(_linear(kernels, x, weight, bias, backward), inputs, dy)
            theirs = torch.autograd.grad(reference.bit_linear(x, weight, bias), inputs, dy)
            for name, a, b in zip(("dX", "dW", "db"), ours, theirs, strict=True):
                _near(name, a, b, bound)

    return check


def _gradients_by_digits(kernels, device):
    from bitdistill.kernels.cpu.training_products import dense_products_are_exact, is_left_out

    for x, weight, _, _, dy in _tensors(device):
        if dense_products_are_exact() or not is_left_out("tiles"):
            activation = kernels.quantize_input(x)
            ours = kernels.digit_gradients(dy, *activation, kernels.ternarize([weight]))
            theirs = torch.autograd.grad(reference.bit_linear(x, weight), [x, weight], dy)
            for name, a, b in zip(("dX", "dW"), ours, theirs, strict=True):
                _near(name, a, b, 1e-5)


def _product(method: str) -> Callable:
    def check(kernels, device):
        from bitdistill.kernels.cpu import training_products as products

        for x, weight, bias, _, dy in _tensors(device):
            ternary = kernels.ternarize([weight])
            for kind, value in (("forward", x), ("backward", dy)):
                (codes, scale), weight_codes = reference.quantize_activation(value), ternary.weight_codes.long()
                expected = codes.long() @ (weight_codes.t() if kind == "forward" else weight_codes)
                _same(kind, products.ternary_product(kind, codes, ternary, method).long(), expected)
                rest = (ternary.of_columns(), bias.detach()) if kind == "forward" else (None, None)
                ours = products.scaled_product(kind, codes, ternary, scale, *rest, torch.float32, method)
                _same(f"{kind}, scaled", ours, products.scaled(expected.int(), scale, *rest, torch.float32))
            exact = products.dense_products_are_exact()
            if method == "tiles" and exact:
                work = (dy, *kernels.quantize_input(x), ternary, True, True)
                ours, theirs = (kernels.digit_gradients(*work, tiled) for tiled in (True, False))
                for name, a, b in zip(("dX", "dW"), ours, theirs, strict=True):
                    _same(f"{name} of digits", a, b)
            codes, columns = (reference.quantize_activation(value)[0] for value in (x, dy))
            if method == "onednn" and exact:
                _same("dense", products.dense_product(columns, codes).long(), columns.long().t() @ codes.long())

    return check


def _groups(way: str) -> Callable:
    """The product with scales of groups of columns and of blocks, by a way of training_groups.py."""

    def check(kernels, device):
        from bitdistill.kernels.cpu import training_groups as groups

        for x, weight, *_ in _tensors(device):
            for act_scale in ("token", "block"):
                (codes, scale), ternary = kernels.quantize_input(x, act_scale), kernels.ternarize([weight], 64)
                blocks, grouped = scale.shape[1] > 1, ternary.grouped()
                for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4)):
                    if (blocks or grouped) and way in groups.possible_ways(codes, scale, ternary, dtype):
                        ours = groups.grouped_product(codes, scale, ternary, dtype, way)
                        rest = None if blocks else scale, None if grouped else ternary.of_columns()
                        ours = kernels.scaled(ours, *rest, None, torch.float32)
                        parts = reference.quantize_weight_groups(weight, 64)
                        _near("product", ours, reference.bit_linear(x, weight, None, parts, 64, act_scale), bound)

    return check


def _columns(kernels, device):
    """Scales of rows, of groups of columns and of blocks on a GPU: the output, and the gradients both ways."""
    for x, weight, bias, _, dy in _tensors(device):
        for act_scale, columns in (("token", 64), ("token", weight.shape[1]), ("block", 64), ("block", None)):
            parts = None if columns is None else reference.quantize_weight_groups(weight, columns)
            expected = reference.bit_linear(x, weight, bias, parts, columns, act_scale)
            theirs = torch.autograd.grad(expected, [x, weight, bias], dy)
            activation, ternary = kernels.quantize_input(x, act_scale), kernels.ternarize([weight], columns)
            for backward, bound in (("exact", 1e-4), ("fast", 5e-2)):
                y = kernels.ternary_linear(x, activation, [weight], [bias], ternary, torch.float32, backward)
                _near("output", y, expected, 1e-6)
                for a, b in zip(torch.autograd.grad(y, [x, weight, bias], dy), theirs, strict=True):
                    _near("gradient", a, b, bound)


def _vocabulary(kernels, device):
    from bitdistill.kernels import vocabulary_rows as specification
    from bitdistill.kernels.cpu import vocabulary_rows as compiled

    generator = torch.Generator().manual_seed(0)
    for N, V, dtype in ((5, 48, torch.float32), (3, 2087, torch.float32), (4, 1033, torch.bfloat16)):
        z, t = (3 * torch.randn((N, V), generator=generator) for _ in range(2))
        z, t = z.to(dtype), (z + t / 10).to(dtype)
        targets = torch.randint(0, V, (N,), generator=generator)
        targets[1] = IGNORED
        words, weights = t.float().topk(4), (0.5, 0.2, 0.2, True)
        cached = (words.indices, words.values, torch.zeros(N), targets)
        results = []
        for of in (compiled, specification):
            dense, alone, rest = z.clone(), z.clone(), z.clone()
            losses = of.dense_rows_(dense, t, targets, *weights), of.dense_rows_(alone, None, targets, *weights)
            of_cached = specification.top_k_rows_(of.rest_rows_, rest, *cached, *weights)
            results.append([*losses[0], losses[1][0], *of_cached, dense.float(), alone.float(), rest.float()])
        for name, a, b in zip(("CE", "KL", "CE", "CE", "KL", *["gradient"] * 3), *results, strict=True):
            _near(name, a, b, 1e-5 if dtype == torch.float32 else 1e-3)  # half precision may round to a neighbor


def _attention(kernels, device):
    from bitdistill.kernels.cpu.training_attention import attention

    generator = torch.Generator().manual_seed(0)
    for B, H, G, T, D in ((2, 4, 2, 37, 32), (1, 3, 1, 70, 20)):
        q, dy = (torch.randn((B, H, T, D), generator=generator) for _ in range(2))
        k, v = (torch.randn((B, G, T, D), generator=generator) for _ in range(2))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        near = torch.ones((1, 1, T, T), dtype=torch.bool).tril().triu(-20)
        for mask in (None, near):
            ours = attention(*inputs, mask, D**-0.5)
            of_heads = inputs[0], *(x.repeat_interleave(H // G, 1) for x in inputs[1:])
            theirs = F.scaled_dot_product_attention(*of_heads, attn_mask=mask, is_causal=mask is None)
            _near("output", ours, theirs, 1e-5)
            for name, a, b in zip(
                ("dQ", "dK", "dV"), *(torch.autograd.grad(y, inputs, dy) for y in (ours, theirs)), strict=True
            ):
                _near(name, a, b, 1e-5)


def _head_products(kernels, device):
    """Products of small integers, whose sums are exact."""
    from bitdistill.kernels.cpu import vocabulary_tiles

    generator = torch.Generator().manual_seed(0)
    for N, H, V in ((5, 48, 70), (70, 580, 1033)):
        x, weight, dz = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((N, H), (V, H), (N, V)))
        if vocabulary_tiles.serves(torch.bfloat16):
            products = vocabulary_tiles.TileProducts(x, weight, N)
            z, dx, dw = products.logits(slice(0, N)), torch.empty(N, H), torch.empty(V, H)
            _same("logits", z, (x @ weight.T).bfloat16())
            z.copy_(dz)
            products.hidden_gradient(z, dx)
            products.add_weight_gradient_(dw, z, True, 0.5)
            _same("dX", dx, dz @ weight)
            _same("dW", dw, dz.T @ x / 2)


def _vocabulary_and_head(kernels, device):
    _vocabulary(kernels, device)
    _head_products(kernels, device)


def checks_of(device: torch.device) -> dict[str, Callable]:
    """What is checked on a device, by name: functions of (kernels, device) that raise AssertionError."""
    checks = {}
    if device.type == "cpu":
        from bitdistill.kernels.cpu.training_groups import WAYS
        from bitdistill.kernels.cpu.training_products import METHODS

        checks = {f"product {method}": _product(method) for method in METHODS}
        checks |= {f"product {way}": _groups(way) for way in WAYS}
        checks["gradients by digits"] = _gradients_by_digits
        checks |= {VOCABULARY: _vocabulary_and_head, ATTENTION: _attention}
    else:
        checks["scales of columns"] = _columns
    return checks | {
        "quantize_input": _quantize_input,
        "ternarize": _ternarize,
        "norm_quantize_input": _norm_quantize_input,
        "gated_quantize_input": _gated_quantize_input,
        "ternary_linear": _ternary_linear,
        "gradients exact": _gradients("exact", 1e-4),
        "gradients fast": _gradients("fast", 5e-2),
    }


# --- in a process of its own ---------------------------------------------------------------------------------------------


def _run(device: torch.device, names: list[str]) -> None:
    """The checks `names`, as lines of JSON; whatever a check raises is its answer."""
    if device.type == "cpu":
        from bitdistill.kernels.cpu.compilation import compile_quickly

        compile_quickly()
    checks = checks_of(device)
    for name in names:
        print(json.dumps({"begins": name}), flush=True)
        start = time.perf_counter()
        try:
            checks[name](kernels_of(device), device)
            problem = None
        except BaseException as error:  # whatever a compiler, a driver or a kernel raises: it is the answer
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        print(json.dumps({"ends": name, "problem": problem, "seconds": time.perf_counter() - start}), flush=True)


def _ask(device: torch.device) -> dict[str, str | None]:
    """name -> what is wrong with it, or None. On a CPU two processes share the checks, which are mostly compilation."""
    names = list(checks_of(device))
    shares = [names]
    if device.type == "cpu" and available_cpus() > 1:
        shares = [[name for name in names if name not in APART], list(APART)]
    with ThreadPoolExecutor(len(shares)) as threads:
        found = ChainMap(*threads.map(functools.partial(_ask_about, device), shares))
    return {name: found[name] for name in names}


def _ask_about(device: torch.device, names: list[str]) -> dict[str, str | None]:
    """`_ask` of some. A check that ends the process is wrong; those after it get another one."""
    answers: dict[str, str | None] = {}
    while left := [name for name in names if name not in answers]:
        command = [sys.executable, "-m", "bitdistill.student.self_check", str(device), *left]
        end, stdout, stderr = _end_of(command)
        lines = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"')]
        begun = [line["begins"] for line in lines if "begins" in line]
        answers |= {line["ends"]: line["problem"] for line in lines if "ends" in line}
        crashed = [name for name in begun if name not in answers]
        if not begun:
            raise RuntimeError(f"The self-check of {device} did not begin: {stderr.strip()[-500:]}")
        answers |= dict.fromkeys(crashed, end)
    return answers


def _end_of(command: list[str]) -> tuple[str, str, str]:
    """How a process ended, its stdout and its stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as late:
        return f"was not done after {PATIENCE} seconds", *(
            (text or b"").decode() for text in (late.stdout, late.stderr)
        )
    return f"ended its process (exit status {done.returncode})", done.stdout, done.stderr


# --- kept ----------------------------------------------------------------------------------------------------------------


def _file() -> Path:
    from bitdistill.kernels.cpu.instructions import cache_folder

    return cache_folder().parent / "self_check.json"


def machine(device: torch.device) -> str:
    """Hash of all that the answers depend on."""
    from bitdistill.kernels.cpu.instructions import CPU_FEATURES, CPU_NAME

    known = [sys.version, platform.platform(), CPU_NAME, sorted(CPU_FEATURES)]
    for library in LIBRARIES:
        try:
            known.append(importlib.metadata.version(library))
        except importlib.metadata.PackageNotFoundError:
            known.append(None)
    known += [os.environ.get(variable) for variable in VARIABLES]
    if device.type == "cuda":
        known += [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.version.cuda]
        known += [torch._C._cuda_getDriverVersion()]
    key = hashlib.sha256(repr(known).encode())
    kernels = Path(reference.__file__).resolve().parent
    for path in [Path(__file__), *sorted(kernels.rglob("*.py"))]:
        key.update(path.read_bytes())
    return f"{device.type} {key.hexdigest()[:20]}"


def _read() -> dict[str, dict[str, str | None]]:
    try:
        return json.loads(_file().read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def self_check(device: torch.device, say: Callable[[str], None]) -> dict[str, str | None]:
    """name -> None where a kernel does what the reference does on this machine, else what is wrong with it.

    Args:
        device: "cpu" or a GPU that has kernels.
        say: told when the checks have to be run; the first time they also compile, which takes up to a minute.

    Raises:
        RuntimeError: the process of the checks cannot begin.
    """
    key = machine(device)
    if key in (kept := _read()):
        return kept[key]
    with filelock.FileLock(_file().with_suffix(".lock")):  # one of several ranks checks, the others wait
        if key in (kept := _read()):
            return kept[key]
        say(f"Comparing the {device.type} kernels with PyTorch: once per machine and version, they are compiled now.")
        answers = _ask(device)
        write_whole(_file(), json.dumps({**kept, key: answers}, indent=1))
    return answers


if __name__ == "__main__":
    _run(torch.device(sys.argv[1]), sys.argv[2:])
