"""The ternary product and the quantizers on the CPU against the reference: codes, scales and accumulators bit for bit."""

import cpu_checks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.kernels import packing, reference
from bitdistill.kernels.cpu import activations, matmul


def codes(rng, rows, columns):
    return rng.integers(-1, 2, (rows, columns), dtype=np.int8)


def acts(rng, tokens, columns):
    return rng.integers(-127, 128, (tokens, columns), dtype=np.int8)


# --- products ---------------------------------------------------------------------------------------------------------


def test_hand_example():
    weight = np.array([[-1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], np.int8)
    act = np.array([[1, 2, 3, 4, 5], [-5, 0, 0, 127, 127]], np.int8)
    for name in packing.PACKINGS:
        product = matmul.ternary_accumulate(act, packing.pack(weight, name), name, 2)
        np.testing.assert_array_equal(product, [[6, 15], [132, 249]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_shape(rows, columns, tokens, seed):
    rng = np.random.default_rng(seed)
    cpu_checks.check_product(codes(rng, rows, columns), acts(rng, tokens, columns))


@pytest.mark.parametrize("tokens", range(1, 20))
def test_any_number_of_tokens(tokens):
    rng = np.random.default_rng(tokens)
    cpu_checks.check_product(codes(rng, 100, 530), acts(rng, tokens, 530))


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(31, 150, 530), (33, 340, 1100), (64, 130, 513), (81, 16, 2048)]
)
def test_many_tokens_in_several_chunks_and_groups(tokens, rows, columns):
    rng = np.random.default_rng(tokens)
    cpu_checks.check_product(codes(rng, rows, columns), acts(rng, tokens, columns))


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 12, 16, 20, 21, 4096])
def test_vectors_that_hold_blocks_of_several_row_groups(columns):
    rng = np.random.default_rng(columns)
    cpu_checks.check_product(codes(rng, 16 * 12 + 3, columns), acts(rng, 3, columns))


@pytest.mark.parametrize(("columns", "tokens"), [(5000, 1), (1100, 5), (260, 9), (64, 2), (1100, 33)])
def test_largest_sums(columns, tokens):
    cpu_checks.check_extremes(columns, tokens)


def test_agrees_with_the_reference():
    rng = np.random.default_rng(3)
    weight, act = codes(rng, 90, 333), acts(rng, 7, 333)
    expected = reference.ternary_accumulate(torch.from_numpy(act), torch.from_numpy(weight))
    for name in packing.PACKINGS:
        product = matmul.ternary_accumulate(act, packing.pack(weight, name), name, 90)
        np.testing.assert_array_equal(product, expected.numpy())


def test_zeros_no_tokens_and_strided_activations():
    rng = np.random.default_rng(4)
    cpu_checks.check_product(np.zeros((20, 50), np.int8), acts(rng, 2, 50))
    cpu_checks.check_product(codes(rng, 20, 50), np.zeros((2, 50), np.int8))
    weight, act = codes(rng, 20, 50), acts(rng, 6, 100)[::2, ::2]
    for name in packing.PACKINGS:
        packed = packing.pack(weight, name)
        np.testing.assert_array_equal(
            matmul.ternary_accumulate(act, packed, name, 20), act.astype(int) @ weight.T.astype(int)
        )
        assert matmul.ternary_accumulate(act[:0], packed, name, 20).shape == (0, 20)


@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_ranges_of_row_groups_write_their_rows_and_nothing_else(tokens):
    rng = np.random.default_rng(5)
    weight, act = codes(rng, 16 * 9, 77), acts(rng, tokens, 77)
    expected = act.astype(np.int32) @ weight.T.astype(np.int32)
    stride = activations.record_bytes(77) + 64
    records = np.full((tokens, stride), 55, np.uint8)  # what a record does not own is not read
    records[:, 48 : activations.group_sums_offset(77)] = 0
    records[:, 64 : 64 + 77] = act.view(np.uint8)
    records[:, 4:8] = act.sum(1, dtype=np.int32)[:, None].view(np.uint8)
    scratch = np.full(matmul.SCRATCH_BYTES + 64, 99, np.uint8)
    for number, name in enumerate(packing.PACKINGS):
        packed = packing.pack(weight, name)
        for first, last in [(0, 9), (3, 4), (2, 8), (8, 9), (5, 5)]:
            acc = np.full((tokens, 16 * 9 + 7), 12345, np.int32)
            matmul.gemm(
                packed.ctypes.data,
                number,
                77,
                records.ctypes.data,
                stride,
                tokens,
                acc.ctypes.data,
                acc.shape[1],
                first,
                last,
                scratch.ctypes.data,
            )
            rows = slice(16 * first, 16 * last)
            np.testing.assert_array_equal(acc[:, rows], expected[:, rows])
            acc[:, rows] = 12345
            assert (acc == 12345).all()
    assert (scratch[matmul.SCRATCH_BYTES :] == 99).all()


def test_reads_nothing_beyond_the_weight(tmp_path):
    """The last vector ends with the last page of a mapped file: one byte further is a bus error."""
    import mmap

    rng = np.random.default_rng(6)
    weight, act = codes(rng, 16 * 8, 4 * 128), acts(rng, 5, 4 * 128)
    packed = packing.pack(weight, "2bit")
    assert packed.size % mmap.PAGESIZE == 0
    path = tmp_path / "weight"
    packed.tofile(path)
    mapped = np.memmap(path, np.uint8, "r")
    for tokens in (1, 5):
        product = matmul.ternary_accumulate(act[:tokens], mapped, "2bit", 128)
        np.testing.assert_array_equal(product, act[:tokens].astype(int) @ weight.T.astype(int))


def test_refuses_what_does_not_fit():
    act, packed = np.zeros((1, 8), np.int8), packing.pack(np.zeros((16, 8), np.int8), "2bit")
    with pytest.raises(ValueError, match=r"act_codes: expected int8 \(N, I\)"):
        matmul.ternary_accumulate(act.astype(np.int16), packed, "2bit", 16)
    with pytest.raises(ValueError, match="at least one column"):
        matmul.ternary_accumulate(act[:, :0], packed, "2bit", 16)
    with pytest.raises(ValueError, match="packing: expected one of 2bit, base3; got 'int8'"):
        matmul.ternary_accumulate(act, packed, "int8", 16)
    with pytest.raises(ValueError, match=r"weight: expected a contiguous array of uint8 \(128,\); got uint8 \(64,\)"):
        matmul.ternary_accumulate(act, packed, "2bit", 40)
    with pytest.raises(ValueError, match="got int8"):
        matmul.ternary_accumulate(act, packed.view(np.int8), "2bit", 16)
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        matmul.ternary_accumulate(act, np.repeat(packed, 2)[::2], "2bit", 16)


# --- quantizers -------------------------------------------------------------------------------------------------------


def check_quantizer(x):
    expected, scale = reference.quantize_activation(torch.from_numpy(x))
    got, got_scale = activations.quantize_activations(cpu_checks.odd(x))
    np.testing.assert_array_equal(got, expected.numpy())
    np.testing.assert_array_equal(got_scale, scale.numpy())


@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 31, 32, 33, 64, 100, 1000])
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-30, 1e-7, 1e-5, 3.0, 1e20, 1e37])
def test_quantizer(columns, size):
    rng = np.random.default_rng(columns)
    check_quantizer((rng.standard_normal((3, columns)) * size).astype(np.float32))


def test_quantizer_rounds_ties_to_even():
    x = np.arange(-127, 128, dtype=np.float32)[None] / 2
    x = np.concatenate([x, np.full((1, 2), 127, np.float32)], axis=1)
    check_quantizer(x)
    got, scale = activations.quantize_activations(x)
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(got[0], np.rint(x[0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=50))
def test_quantizer_of_anything_finite(values):
    check_quantizer(np.array([values], np.float32))


@pytest.mark.parametrize("columns", [1, 5, 16, 31, 32, 33, 65, 300])
def test_planes(columns):
    rng = np.random.default_rng(columns)
    for size in (1.0, 0.0, 1e-6, 1e30):
        cpu_checks.check_planes((rng.standard_normal((2, columns)) * size).astype(np.float32))
    cpu_checks.check_planes(np.full((1, columns), -2.5, np.float32))


def test_planes_keep_sixteen_bits():
    x = np.random.default_rng(7).uniform(-1, 1, (1, 4096)).astype(np.float32)
    hi, lo, scale = cpu_checks.planes(x)
    # half a step, and two roundings of up to 32512 in fp32
    assert np.abs((255 * hi + lo) * scale.astype(np.float64) - x).max() <= 0.504 * scale.max()


def test_record_has_its_scale_its_sum_and_zeros_around_the_codes():
    x = np.random.default_rng(8).standard_normal(37).astype(np.float32)
    record = np.full(activations.record_bytes(37), 77, np.uint8)
    activations.quantize_activation(x.ctypes.data, 37, record.ctypes.data)
    expected, scale = reference.quantize_activation(torch.from_numpy(x)[None])
    assert record[:4].view(np.float32)[0] == scale.item()
    assert record[4:8].view(np.int32)[0] == expected.sum().item()
    np.testing.assert_array_equal(record[64 : 64 + 37].view(np.int8), expected[0].numpy())
    assert not record[48:64].any()
    assert not record[64 + 37 : activations.group_sums_offset(37)].any()


def test_quantizer_refuses_what_is_not_float32_rows():
    with pytest.raises(ValueError, match=r"x: expected float32 \(N, I\).*got float64"):
        activations.quantize_activations(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least one column"):
        activations.quantize_activations(np.zeros((1, 0), np.float32))
