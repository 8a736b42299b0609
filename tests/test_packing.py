"""Packed bytes against a hand example, a slow independent packer, and round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdistill.kernels import packing

KINDS = ("2bit", "base3", "int4", "int8")
LOW_HIGH = {"2bit": (-1, 1), "base3": (-1, 1), "int4": (-8, 7), "int8": (-127, 127)}


def codes_of(kind, rows, columns, seed=0):
    low, high = LOW_HIGH[kind]
    return np.random.default_rng(seed).integers(low, high + 1, (rows, columns)).astype(np.int8)


def pack(codes, kind):
    if kind == "int8":
        return packing.pack_int8(codes)
    return packing.pack_int4(codes) if kind == "int4" else packing.pack(codes, kind)


def unpack(packed, rows, columns, kind):
    if kind in packing.PACKINGS:
        return packing.unpack(packed, rows, columns, kind)
    return packing.unpack_rows(packed, np.arange(rows), columns, kind)


def slow(codes, kind):
    """Block by block and value by value, from the words of the docstring alone."""
    rows, columns = codes.shape
    blocks = []
    for first_row in range(0, rows, 16):
        for first_column in range(0, columns, 4):
            block = []
            for row in range(first_row, first_row + 16):
                for column in range(first_column, first_column + 4):
                    block.append(int(codes[row, column]) if row < rows and column < columns else 0)
            blocks.append(block)
    if kind == "int8":
        return np.array(blocks, np.int8).reshape(-1)
    count, base, bias = {"2bit": (4, 4, 1), "base3": (5, 3, 1), "int4": (2, 16, 8)}[kind]
    blocks += [[0] * 64] * (-len(blocks) % count)
    packed = []
    for v in range(len(blocks) // count):
        for j in range(64):
            packed.append(sum((blocks[count * v + d][j] + bias) * base**d for d in range(count)))
    return np.array(packed, np.uint8)


def test_hand_example():
    codes = np.array([[-1, 0, 1, 1, 0]], np.int8)
    two, three = packing.pack(codes, "2bit"), packing.pack(codes, "base3")
    assert two.shape == three.shape == (64,)
    # block 0 is u = 0 1 2 2 in lane 0, block 1 is u = 1 1 1 1, and the missing blocks are padding, u = 1
    assert two[:5].tolist() == [0b01_01_01_00, 0b01_01_01_01, 0b01_01_01_10, 0b01_01_01_10, 0b01_01_01_01]
    assert three[:5].tolist() == [0 + 120, 1 + 120, 2 + 120, 2 + 120, 121]
    assert set(two[4:].tolist()) == {0b01_01_01_01}
    assert set(three[4:].tolist()) == {121}

    # the second row is the second lane; the seventeenth is a block of its own, after both blocks of the first sixteen
    codes = np.zeros((17, 5), np.int8)
    codes[1, 2], codes[16, 4] = 1, -1
    assert packing.pack(codes, "2bit")[[4 + 2]].tolist() == [0b01_01_01_10]
    assert packing.pack(codes, "2bit")[[0]].tolist() == [0b00_01_01_01]  # block 3 = row group 1, columns 4 .. 7
    table = packing.pack_int8(np.array([[1, 2, 3, 4, -5]] * 2, np.int8))
    assert table[[0, 1, 2, 3, 4, 64, 68]].tolist() == [1, 2, 3, 4, 1, -5, -5]
    assert packing.pack_int4(np.full((1, 32), -8, np.int8))[:5].tolist() == [0, 0, 0, 0, 0x88]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_against_a_slow_packer_and_back(kind, data):
    low, high = LOW_HIGH[kind]
    columns = st.sampled_from([0, 32, 64]) if kind == "int4" else st.integers(0, 23)
    shape = st.tuples(st.integers(0, 35), columns)
    codes = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(low, high)))
    packed = pack(codes, kind)
    np.testing.assert_array_equal(packed, slow(codes, kind), strict=True)
    back = unpack(packed, *codes.shape, kind)
    np.testing.assert_array_equal(back, codes, strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (90, 96), (37, 160)])
def test_rows_without_the_rest(kind, shape):
    codes = codes_of(kind, *shape)
    rows = np.array([0, shape[0] - 1, shape[0] // 2, 0])
    packed = pack(codes, kind)
    packed.flags.writeable = False
    np.testing.assert_array_equal(packing.unpack_rows(packed, rows, shape[1], kind), codes[rows], strict=True)
    assert packing.unpack_rows(packed, np.array([], np.int64), shape[1], kind).shape == (0, shape[1])


def test_every_value_in_every_place():
    """All 3**5 combinations of five blocks, which hypothesis would not exhaust: the base-3 bytes 0 .. 242."""
    codes = (np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1).astype(np.int8)  # (243, 5)
    blocks = codes.reshape(-1, 3, 5)  # three combinations a matrix of one row, five quads of columns
    for three in blocks:
        row = np.zeros((1, 20), np.int8)
        for place, combination in enumerate(three):
            row[0, place::4] = combination
        packed = packing.pack(row, "base3")
        assert packed.shape == (64,)
        assert packed[:3].tolist() == [int(((c + 1) * 3 ** np.arange(5)).sum()) for c in three]
        np.testing.assert_array_equal(packing.unpack(packed, 1, 20, "base3"), row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 32), (3, 0), (1, 32), (17, 64)])
def test_read_only_strided_and_empty_input(kind, shape):
    codes = codes_of(kind, 2 * shape[0], 3 * shape[1])[::2, ::3]
    codes.flags.writeable = False
    packed = pack(codes, kind)
    packed.flags.writeable = False
    assert packed.shape == (packing.packed_bytes(*shape, kind),)
    np.testing.assert_array_equal(unpack(packed, *shape, kind), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_other_codes(kind):
    low, high = LOW_HIGH[kind]
    for bad in {-128, low - 1, min(high + 1, 127), 127} - set(range(low, high + 1)):
        codes = np.zeros((3, 32), np.int8)
        codes[2, 8] = bad
        with pytest.raises(ValueError, match=f"codes: expected {low} to {high}"):
            pack(codes, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", [np.zeros((3, 32), np.int64), np.zeros((3, 32), np.float32), np.zeros(32, np.int8)])
def test_refuses_other_arrays(kind, codes):
    with pytest.raises(ValueError, match="codes: expected int8"):
        pack(codes, kind)


@pytest.mark.parametrize("kind", packing.PACKINGS)
def test_refuses_another_size(kind):
    packed = pack(np.zeros((3, 32), np.int8), kind)
    for wrong in (packed[:-1], np.concatenate([packed, packed[:1]]), packed[None], packed.astype(np.int16)):
        with pytest.raises(ValueError, match=r"packed: expected uint8"):
            unpack(wrong, 3, 32, kind)
    with pytest.raises(ValueError, match="multiple of 32 columns"):
        packing.pack_int4(np.zeros((3, 33), np.int8))


@pytest.mark.parametrize("kind", packing.PACKINGS)
def test_refuses_damaged_padding(kind):
    """Every byte outside the matrix: another row, another column, another block."""
    codes = np.zeros((3, 32), np.int8)
    packed = pack(codes, kind)
    for byte in (4 * 3, 63):  # row 3 and row 15 of the first block
        bad = packed.copy()
        bad[byte] += 1
        with pytest.raises(ValueError, match="padding"):
            unpack(bad, 3, 32, kind)
    columns = 30
    bad = packing.pack(np.zeros((3, columns), np.int8), kind)
    last = 7  # block 7 has columns 28 .. 31; 2bit: vector 1, field 3, base3: vector 1, digit 2
    bad[64 + 2] += 4**3 if kind == "2bit" else 3 ** (last % 5)  # row 0, column 30
    with pytest.raises(ValueError, match="padding"):
        packing.unpack(bad, 3, columns, kind)


def test_refuses_damaged_fields():
    packed = packing.pack(np.zeros((3, 9), np.int8), "2bit")
    for shift in (0, 2, 4):
        bad = packed.copy()
        bad[1] |= 3 << shift
        with pytest.raises(ValueError, match="got 3"):
            packing.unpack(bad, 3, 9, "2bit")
    for value in (243, 255):
        bad = packing.pack(np.zeros((3, 9), np.int8), "base3")
        bad[3] = value
        with pytest.raises(ValueError, match="up to 242"):
            packing.unpack(bad, 3, 9, "base3")


@given(rows=st.integers(1, 40), groups=st.integers(1, 4))
def test_int4_scales(rows, groups):
    scale = np.random.default_rng(rows).random((rows, groups)).astype(np.float16)
    packed = packing.pack_scales(scale)
    assert packed.shape == (-(-rows // 16), groups, 16)
    for row in range(rows):
        for group in range(groups):
            assert packed[row // 16, group, row % 16] == scale[row, group]
    np.testing.assert_array_equal(packing.unpack_scales(packed, slice(0, rows)), scale, strict=True)
    assert not packed.transpose(0, 2, 1).reshape(-1, groups)[rows:].any()


def test_bits_per_weight_is_exact():
    assert packing.bits_per_weight([(16, 20)], "base3") == 8 * (64 + 4) / 320
    assert packing.bits_per_weight([(16, 16)], "2bit") == 8 * (64 + 4) / 256
    assert packing.bits_per_weight([(17, 21)], "base3") == 8 * (64 * 3 + 4) / 357  # 2 x 6 blocks in 3 vectors
    assert packing.bits_per_weight([(1, 4), (16, 20)], "2bit") == 8 * (64 + 4 + 128 + 4) / 324
    # Qwen3-0.6B: 28 layers; 1.6 bits, and neither scales nor padding add anything that shows
    layer = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
    assert packing.bits_per_weight(layer * 28, "base3") == pytest.approx(1.6, abs=2e-4)
    assert packing.bits_per_weight(layer * 28, "2bit") == pytest.approx(2.0, abs=2e-5)
    with pytest.raises(ValueError, match="at least one weight"):
        packing.bits_per_weight([], "2bit")


def test_unknown_packing():
    codes = np.zeros((1, 1), np.int8)
    for call in (
        lambda: packing.pack(codes, "3bit"),
        lambda: packing.pack(codes, "int8"),
        lambda: packing.unpack(codes.view(np.uint8), 1, 1, "3bit"),
        lambda: packing.packed_bytes(1, 1, "3bit"),
        lambda: packing.bits_per_weight([(1, 1)], "3bit"),
    ):
        with pytest.raises(ValueError, match="packing: expected one of 2bit, base3"):
            call()
