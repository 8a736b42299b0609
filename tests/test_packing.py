"""Packed bytes against a hand example, a slow independent packer, and round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdistill.kernels import packing

CODES = hnp.arrays(
    np.int8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=23), elements=st.integers(-1, 1)
)


def slow_2bit(codes):
    rows, columns = codes.shape
    width = (columns + 3) // 4
    out = [[0] * width for _ in range(rows)]
    for row in range(rows):
        for column in range(4 * width):
            code = int(codes[row, column]) if column < columns else 0
            out[row][column % width] += (code + 1) * 4 ** (column // width)
    return np.array(out, np.uint8).reshape(rows, width)


def slow_base3(codes):
    flat = [int(code) for row in codes for code in row]
    flat += [0] * (-len(flat) % 5)
    fives = [flat[start : start + 5] for start in range(0, len(flat), 5)]
    return np.array([int("".join(str(code + 1) for code in reversed(five)), 3) for five in fives], np.uint8)


def test_hand_example():
    codes = np.array([[-1, 0, 1, 1, 0]], np.int8)
    assert packing.pack_2bit(codes).tolist() == [[0b01_01_10_00, 0b01_01_10_01]]
    assert packing.pack_base3(codes).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 1 * 81]
    assert packing.pack_base3(np.array([[1], [-1]], np.int8)).tolist() == [2 + 0 * 3 + 9 + 27 + 81]


@given(CODES)
def test_against_a_slow_packer_and_back(codes):
    packed = packing.pack_2bit(codes)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, slow_2bit(codes))
    back = packing.unpack_2bit(packed, codes.shape[1])
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)

    packed = packing.pack_base3(codes)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, slow_base3(codes))
    back = packing.unpack_base3(packed, *codes.shape)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("name", packing.PACKINGS)
def test_every_value_in_every_place(name):
    """All 3**5 combinations of five neighbours, which hypothesis would not exhaust."""
    codes = (np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1).astype(np.int8)
    packed = packing.pack(codes, name)
    assert packed.shape == packing.packed_shape(243, 5, name)
    if name == "base3":
        assert packed.tolist() == list(range(243))
    np.testing.assert_array_equal(packing.unpack(packed, 243, 5, name), codes)


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0), (1, 1), (7, 13)])
def test_read_only_strided_and_empty_input(name, shape):
    codes = np.random.default_rng(0).integers(-1, 2, (2 * shape[0], 3 * shape[1])).astype(np.int8)[::2, ::3]
    codes.flags.writeable = False
    packed = packing.pack(codes, name)
    packed.flags.writeable = False
    assert packed.shape == packing.packed_shape(*shape, name)
    np.testing.assert_array_equal(packing.unpack(packed, *shape, name), codes)


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("bad", [-128, -2, 2, 127])
def test_refuses_other_codes(name, bad):
    codes = np.zeros((3, 9), np.int8)
    codes[2, 8] = bad
    with pytest.raises(ValueError, match="codes: expected -1, 0 or 1"):
        packing.pack(codes, name)


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("codes", [np.zeros((3, 9), np.int64), np.zeros((3, 9), np.float32), np.zeros(9, np.int8)])
def test_refuses_other_arrays(name, codes):
    with pytest.raises(ValueError, match="codes: expected int8"):
        packing.pack(codes, name)


def test_refuses_damaged_2bit():
    packed = packing.pack_2bit(np.zeros((3, 9), np.int8))
    for shape in ((3, 2), (3, 4), (9,)):
        with pytest.raises(ValueError, match="packed: expected uint8"):
            packing.unpack_2bit(np.zeros(shape, np.uint8), 9)
    for shift in (0, 2, 4, 6):
        bad = packed.copy()
        bad[1, 1] |= 3 << shift
        with pytest.raises(ValueError, match="got 3"):
            packing.unpack_2bit(bad, 9)
    bad = packed.copy()
    bad[2, 2] ^= 0b11_00_00_00  # column 11, padding: 1 -> 2
    with pytest.raises(ValueError, match="padding"):
        packing.unpack_2bit(bad, 9)


def test_refuses_damaged_base3():
    packed = packing.pack_base3(np.zeros((3, 9), np.int8))
    assert packed.shape == (6,)
    for length in (0, 5, 7):
        with pytest.raises(ValueError, match="packed: expected uint8"):
            packing.unpack_base3(np.full(length, 121, np.uint8), 3, 9)
    for value in (243, 255):
        bad = packed.copy()
        bad[3] = value
        with pytest.raises(ValueError, match="up to 242"):
            packing.unpack_base3(bad, 3, 9)
    bad = packed.copy()
    bad[5] += 81
    with pytest.raises(ValueError, match="padding"):
        packing.unpack_base3(bad, 3, 9)


def test_bits_per_weight_is_exact():
    assert packing.bits_per_weight([(5, 100)], "base3") == 8 * (100 + 4) / 500
    assert packing.bits_per_weight([(5, 101)], "base3") == 8 * (101 + 4) / 505
    assert packing.bits_per_weight([(2, 7)], "base3") == 8 * (3 + 4) / 14
    assert packing.bits_per_weight([(5, 101)], "2bit") == 8 * (5 * 26 + 4) / 505
    assert packing.bits_per_weight([(1, 4), (3, 5)], "2bit") == 8 * (1 + 4 + 6 + 4) / 19
    # Qwen3-0.6B: 28 layers; 1.6 bits, and the scales add nothing that shows
    layer = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
    assert packing.bits_per_weight(layer * 28, "base3") == pytest.approx(1.6, abs=2e-5)
    with pytest.raises(ValueError, match="at least one weight"):
        packing.bits_per_weight([], "2bit")


def test_unknown_packing():
    codes = np.zeros((1, 1), np.int8)
    for call in (
        lambda: packing.pack(codes, "3bit"),
        lambda: packing.unpack(codes.view(np.uint8), 1, 1, "3bit"),
        lambda: packing.packed_shape(1, 1, "3bit"),
        lambda: packing.bits_per_weight([(1, 1)], "3bit"),
    ):
        with pytest.raises(ValueError, match="packing: expected one of 2bit, base3"):
            call()
