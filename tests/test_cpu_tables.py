"""LM heads and embeddings in every format against their definition, operation by operation."""

import cpu_checks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.kernels import packing
from bitdistill.kernels.cpu import activations, matmul, tables


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(50, 64, 2), (150, 128, 3), (130, 192, 9), (64, 64, 20), (70, 96, 4)]
)
def test_int8_tables_in_tiles_and_what_is_left_of_them(rows, columns, tokens):
    """Whole and broken groups of 64 rows, columns that are no whole tiles, up to three passes of eight tokens."""
    cpu_checks.check_table("int8", rows, columns, tokens)
    for extreme in (0, 1):
        cpu_checks.check_table("int8", rows, columns, tokens, extreme)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(50, 32, 4), (33, 96, 5), (16, 128, 8), (20, 160, 9), (35, 256, 33), (48, 288, 67)]
)
def test_int4_tables_of_several_tokens(rows, columns, tokens):
    """Column groups that are no multiple of four, broken passes of two and of eight tokens, more than one pass of 32."""
    cpu_checks.check_table("int4", rows, columns, tokens)
    for extreme in (0, 1):
        cpu_checks.check_table("int4", rows, columns, tokens, extreme)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(tables.MATRIX_FORMATS), st.integers(1, 70), st.integers(1, 200), st.integers(1, 20))
def test_any_shape(format, rows, columns, tokens):
    columns = 32 * (columns % 5 + 1) if format == "int4" else columns
    cpu_checks.check_table(format, rows, columns, tokens)


@pytest.mark.parametrize("format", ["2bit", "base3"])
def test_more_tokens_than_are_taken_at_a_time(format):
    cpu_checks.check_table(format, 35, 40, 67)


@pytest.mark.parametrize("format", ["2bit", "base3", "int8", "int4"])
@pytest.mark.parametrize("extreme", [0, 1])
def test_largest_sums(format, extreme):
    cpu_checks.check_table(format, 20, 1056, 2, extreme)


def test_a_logit_depends_on_its_row_and_its_token_alone():
    """The same numbers for any number of tokens and for any range of row groups; nothing else is written."""
    rng = np.random.default_rng(0)
    rows, columns, tokens = 16 * 5 + 3, 96, 3
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    size = activations.record_bytes(columns)
    records = np.empty((2 * tokens, size), np.uint8)
    for n in range(tokens):
        activations.quantize_planes(x[n].ctypes.data, columns, records[2 * n].ctypes.data, size)
    scratch = np.full(matmul.SCRATCH_BYTES + 64, 99, np.uint8)
    for number, format in enumerate(tables.MATRIX_FORMATS):
        _, weight, scale, _ = cpu_checks.make_table(rng, format, rows, columns)
        whole = tables.multiply_table(x, weight, format, rows, scale)
        for n in range(tokens):
            np.testing.assert_array_equal(tables.multiply_table(x[n : n + 1], weight, format, rows, scale)[0], whole[n])
        for first, last in [(0, 2), (2, 5), (5, 6), (1, 1)]:
            logits = np.full((tokens, rows + 5), 7, np.float32)
            tables.table_logits(
                weight.ctypes.data,
                0 if scale is None else scale.ctypes.data,
                number,
                rows,
                columns,
                x.ctypes.data,
                columns,
                records.ctypes.data,
                size,
                tokens,
                logits.ctypes.data,
                rows + 5,
                first,
                last,
                scratch.ctypes.data,
            )
            written = slice(16 * first, min(rows, 16 * last))
            np.testing.assert_array_equal(logits[:, written], whole[:, written])
            logits[:, written] = 7
            assert (logits == 7).all()
    assert (scratch[matmul.SCRATCH_BYTES :] == 99).all()


def test_accuracy_of_integer_tables():
    """Against float64 with the unrounded x: 16 bits of x are within 2**-16 of the largest, and fp32 adds little."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 512)).astype(np.float32)
    for format in ("2bit", "base3", "int8", "int4"):
        _, weight, scale, full = cpu_checks.make_table(rng, format, 100, 512)
        got = tables.multiply_table(x, weight, format, 100, scale)
        bound = 2.0**-16 * np.abs(x).max(1, keepdims=True) * np.abs(full).sum(1)
        assert (np.abs(got - x.astype(np.float64) @ full.T) <= bound).all()


def test_refuses_what_does_not_fit():
    x = np.zeros((1, 32), np.float32)
    rng = np.random.default_rng(2)
    _, weight, scale, _ = cpu_checks.make_table(rng, "int8", 20, 32)
    with pytest.raises(ValueError, match="x: expected float32"):
        tables.multiply_table(x.astype(np.float64), weight, "int8", 20, scale)
    with pytest.raises(ValueError, match="format: expected one of 2bit, base3, int8, int4, fp16; got 'int2'"):
        tables.multiply_table(x, weight, "int2", 20, scale)
    with pytest.raises(ValueError, match=r"weight: expected a contiguous array of int8 \(1536,\)"):
        tables.multiply_table(x, weight, "int8", 40, scale)
    with pytest.raises(ValueError, match=r"scale: expected a contiguous float32 \(20,\) for int8; got float32 \(19,\)"):
        tables.multiply_table(x, weight, "int8", 20, scale[:19])
    with pytest.raises(ValueError, match="got None"):
        tables.multiply_table(x, weight, "int8", 20)
    with pytest.raises(ValueError, match="multiple of 32 columns for int4; got 20"):
        tables.multiply_table(x[:, :20].copy(), weight, "int4", 20, scale)
    with pytest.raises(ValueError, match=r"weight: expected a contiguous float16 \(20, 32\)"):
        tables.multiply_table(x, np.zeros((32, 20), np.float16).T, "fp16", 20)
    assert tables.multiply_table(x[:0], weight, "int8", 20, scale).shape == (0, 20)


def test_int8_of_packing_is_read_as_it_lies():
    codes = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = 2.0
    got = tables.multiply_table(x, packing.pack_int8(codes), "int8", 2, np.ones(2, np.float32))
    np.testing.assert_allclose(got[0], [2.0 * -61, 2.0 * 3], rtol=1e-6)
