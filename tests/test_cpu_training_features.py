"""CPU training on every instruction set that can be forced, of oneDNN and of our own kernels: a process each."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from bitdistill.kernels.cpu.instructions import CPU_FEATURES, FEATURE_SETS

X86 = platform.machine() in ("x86_64", "AMD64")
ONEDNN = ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_AMX"]
OWN = [name for name, needed in FEATURE_SETS.items() if needed <= CPU_FEATURES]


def process(*arguments, **environment):
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="instruction sets of x86")
@pytest.mark.parametrize("isa", ONEDNN)
def test_exact_with_each_instruction_set_of_onednn(isa):
    """Products with a ternary operand are exact everywhere; +-127 on both sides with VNNI, and where not it is noticed."""
    dense = process(ONEDNN_MAX_CPU_ISA=isa)[0]
    if "VNNI" in isa or "AMX" in isa:
        assert dense == "True" or "avx512vnni" not in CPU_FEATURES
    elif "avx512vnni" in CPU_FEATURES:  # so that the restriction shows
        assert dense == "False"


@pytest.mark.slow
@pytest.mark.parametrize("features", OWN)
def test_exact_with_each_instruction_set_of_ours(features):
    assert process(BITDISTILL_CPU_FEATURES=features)[1] == features


@pytest.mark.slow
@pytest.mark.parametrize("features", ["amx", "avx2", "neon_dot"])
def test_tile_products_exact_in_numpy(features):
    """Without the instructions: what they do, written in numpy."""
    assert process("tiles", NUMBA_DISABLE_JIT="1", BITDISTILL_CPU_FEATURES=features) == ["exact"]


def tiles():
    """Products of tiles in every form, with remainders of tokens, of pairs of columns and of tiles of tokens."""
    from bitdistill.kernels.cpu import training_gradients as gradients
    from bitdistill.kernels.cpu import training_products as products

    products.tiles_are_fastest = lambda: False  # not asked by measurement, which takes minutes in numpy
    generator = torch.Generator().manual_seed(0)
    for N, I, O in [(1, 64, 64), (33, 64, 192), (70, 192, 64), (7, 33, 5)]:
        codes, gradient = (
            torch.randint(-127, 128, (N, width), generator=generator, dtype=torch.int8) for width in (I, O)
        )
        weight = torch.randint(-1, 2, (O, I), generator=generator, dtype=torch.int8)
        ternary = products.Ternary(weight, torch.ones(1), (O,))
        for kind, value, other in (("forward", codes, weight.long().t()), ("backward", gradient, weight.long())):
            expected = value.long() @ other
            assert torch.equal(products.ternary_product(kind, value, ternary, "tiles").long(), expected)
            row, column, bias = (torch.randn(n, generator=generator) for n in (N, *[expected.shape[1]] * 2))
            for rest in ((column, bias), (None, None)):
                for dtype in (torch.float32, torch.bfloat16):
                    ours = products.scaled_product(kind, value, ternary, row, *rest, dtype, "tiles")
                    assert torch.equal(ours, products.scaled(expected.int(), row, *rest, dtype))
        work = (torch.randn((N, O), generator=generator), codes, torch.rand((N, 1), generator=generator), ternary)
        for planes in (1, 3):
            by_tiles, by_rows = (gradients._in_parts(*work, True, True, planes, tiled) for tiled in (True, False))
            assert all(torch.equal(a, b) for a, b in zip(by_tiles, by_rows, strict=True))
    head, x, weight, dz = tile_head(9, 40, 70, generator)
    z, dx, dw = head.logits(slice(0, 9)), torch.empty(9, 40), torch.empty(70, 40)
    assert torch.equal(z, (x @ weight.T).bfloat16())
    z.copy_(dz)
    head.hidden_gradient(z, dx)
    head.add_weight_gradient_(dw, z, True, 1.0)
    assert torch.equal(dx, dz @ weight)
    assert torch.equal(dw, dz.T @ x)
    print("exact")


def tile_head(N, H, V, generator):
    """The products of an LM head with small integers, and these: x, weight, gradient of the logits."""
    from bitdistill.kernels.cpu.vocabulary_tiles import TileProducts

    x, weight, dz = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((N, H), (V, H), (N, V)))
    return TileProducts(x, weight, N), x, weight, dz


def run():
    """All kernels on small shapes, both products, both backward passes."""
    from bitdistill.kernels import reference
    from bitdistill.kernels.cpu import bit_linear, training_products
    from bitdistill.kernels.cpu.instructions import FEATURES
    from bitdistill.student import self_check

    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    for check in self_check.checks_of(cpu).values():
        check(bit_linear, cpu)
    for N, I, O in [
        (1, 16, 16),
        (9, 64, 32),
        (37, 576, 192),
        (130, 1028, 48),
        (4, 575, 33),
        (64, 3072, 16),
        (0, 32, 16),
    ]:
        for bias in (0, 9):  # all codes 1: the largest sums
            ternary = bit_linear.ternarize([torch.randn(O, I, generator=generator) + bias])
            for kind, K in (("forward", I), ("backward", O)):
                codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
                weight = ternary.weight_codes.long()
                for value in (codes, codes.clone().fill_(127), codes.clone().fill_(-127)):
                    expected = value.long() @ (weight.t() if kind == "forward" else weight)
                    for method in training_products.METHODS:
                        got = training_products.ternary_product(kind, value, ternary, method)
                        assert torch.equal(got.long(), expected), (N, I, O, kind, method)
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in ((200, 96), (64, 96), (200, 64)))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    activation, ternary = bit_linear.quantize_input(x), bit_linear.ternarize([weight])
    y = bit_linear.ternary_linear(x, activation, [weight], [], ternary, torch.float32, "fast")
    expected = reference.bit_linear(x, weight)
    assert torch.equal(y, expected)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9995
    print(training_products.dense_products_are_exact(), FEATURES)


if __name__ == "__main__":
    tiles() if "tiles" in sys.argv else run()
