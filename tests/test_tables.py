"""kernels/tables.py against hand examples, the numpy of the packed file bit for bit, and autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.packing import INT4_GROUP
from bitdistill.kernels.tables import QUANTIZED_FORMATS, dequantize_table, fake_quantize_table, quantize_table
from bitdistill.runtime.packed_file import decode_int4, decode_rows


def encode_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scale = max|row| / 127``, ``codes = round(table / scale)``, half to even; a zero row has scale 0.

    Args:
        table: float32 (V, hidden).

    Returns: (codes int8 (V, hidden), scale float32 (V,)).
    """
    scale = np.abs(table).max(axis=1) / np.float32(127)
    codes = np.rint(table / np.where(scale == 0, np.float32(1), scale)[:, None])
    return np.clip(codes, -127, 127).astype(np.int8), scale


def encode_ternary(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scale = max(mean|row|, EPSILON)``, ``codes = clip(round(table / scale), -1, 1)``: absmean, a scale per row.

    Args:
        table: float32 (V, hidden).

    Returns: (codes int8 (V, hidden), scale float32 (V,)).
    """
    mean = np.abs(table).mean(axis=1, dtype=np.float64).astype(np.float32)
    scale = np.maximum(mean, np.float32(EPSILON))
    return np.clip(np.rint(table / scale[:, None]), -1, 1).astype(np.int8), scale


def encode_int4(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``codes = clip(round(table / scale), -8, 7)``, half to even, a scale for 32 neighboring columns.

    ``scale = fp16(v / -8)`` with v the entry of largest magnitude: the sign puts it on -8, the one code without a
    counterpart, for 11 % less error than seven codes to each side.

    Args:
        table: float32 (V, hidden), hidden a multiple of 32.

    Returns: (codes int8 (V, hidden), scale float16 (V, hidden / 32)). A zero group has scale 0.
    """
    rows, columns = table.shape
    groups = table.reshape(rows, columns // INT4_GROUP, INT4_GROUP)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
    scale = (extreme / np.float32(-8)).astype(np.float16)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    codes = np.clip(np.rint(groups / divisor), -8, 7).astype(np.int8)
    return codes.reshape(rows, columns), scale[:, :, 0]


ENCODE = {"int8": encode_int8, "int4": encode_int4, "ternary": encode_ternary}
DECODE = {"int8": decode_rows, "int4": decode_int4, "ternary": decode_rows}


def test_hand_examples():
    # a step of 127 / 127 = 1; 0.5 and 1.5 are ties and go to the even neighbor
    codes, scale = quantize_table(torch.tensor([[127.0, -127.0, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]), "int8")
    assert codes.tolist() == [[127, -127, 0, 2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]
    # mean |row| = 4 / 4 = 1: 0.5 is a tie and goes to 0, 2 is clipped; a zero row has the smallest scale
    codes, scale = quantize_table(torch.tensor([[0.5, -0.75, 2.0, -0.75], [0.0, 0.0, 0.0, 0.0]]), "ternary")
    assert codes.tolist() == [[0, -1, 1, -1], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, np.float32(EPSILON)]
    # 8 is the largest in magnitude: scale 8 / -8 = -1 puts it on -8, and -8 on 8, which is clipped to 7
    row = torch.zeros(2, 64)
    row[0, :5] = torch.tensor([3.0, 8.0, -8.0, 0.5, -2.5])
    row[0, 32:34] = torch.tensor([-4.0, 4.0])  # another group: the first of equals decides, scale 0.5
    codes, scale = quantize_table(row, "int4")
    assert codes[0, :6].tolist() == [-3, -8, 7, 0, 2, 0]
    assert codes[0, 32:35].tolist() == [-8, 7, 0]
    assert scale.tolist() == [[-1.0, 0.5], [0.0, 0.0]]
    assert dequantize_table(codes, scale)[0, :5].tolist() == [3.0, 8.0, -7.0, 0.0, -2.0]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)


# A few values, so that ties of rounding and of the largest entry are frequent; and everything up to denormals.
GRID = st.integers(-16, 16).map(lambda n: n / 4)
ANY = st.floats(-(2.0**12), 2.0**12, width=32)
SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96]))


@given(st.one_of(hnp.arrays(np.float32, SHAPES, elements=GRID), hnp.arrays(np.float32, SHAPES, elements=ANY)))
@settings(max_examples=80, deadline=None)
def test_equal_to_the_packed_file_bit_for_bit(table):
    for name in QUANTIZED_FORMATS:
        same_as_numpy(table, name)


@pytest.mark.parametrize("columns", [1, 7, 33, 500, 1024])
@pytest.mark.parametrize("name", ["int8", "ternary"])
def test_odd_widths_equal_numpy(name, columns):
    rng = np.random.default_rng(columns)
    for magnitude in (1e-44, 1e-30, 1e-6, 1.0, 1e30):
        table = (rng.standard_normal((37, columns)) * magnitude).astype(np.float32)
        table[3] = 0
        same_as_numpy(table, name)


def test_int4_of_half_precision_extremes():
    """Scales that are denormal in fp16, or vanish: the codes are then 0."""
    rng = np.random.default_rng(0)
    for magnitude in (1e-30, 1e-8, 1e-6, 1e-4, 6e4):
        same_as_numpy((rng.uniform(-1, 1, (9, 64)) * magnitude).astype(np.float32), "int4")


def same_as_numpy(table, name):
    codes, scale = quantize_table(torch.from_numpy(table), name)
    want_codes, want_scale = ENCODE[name](table)
    assert codes.numpy().tobytes() == want_codes.tobytes()
    assert scale.numpy().tobytes() == want_scale.tobytes()
    assert scale.numpy().dtype == want_scale.dtype
    back = dequantize_table(codes, scale).numpy()
    assert back.tobytes() == DECODE[name](want_codes, want_scale).tobytes()


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_rows_do_not_depend_on_what_is_beside_them(name, monkeypatch):
    table = torch.randn(97, 64, generator=torch.Generator().manual_seed(0))
    whole = fake_quantize_table(table, name)
    assert torch.equal(whole, dequantize_table(*quantize_table(table, name)))
    ids = torch.tensor([[5, 5, 96], [0, 17, 5]])
    assert torch.equal(fake_quantize_table(table[ids], name), whole[ids])
    assert torch.equal(fake_quantize_table(table[7], name), whole[7])
    assert fake_quantize_table(table[:0], name).shape == (0, 64)
    monkeypatch.setattr("bitdistill.kernels.tables.CHUNK_ELEMENTS", 640)  # ten rows at a time, seven at the end
    assert torch.equal(fake_quantize_table(table, name), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quantize_table(table, name), whole)
    half = fake_quantize_table(table.bfloat16(), name)
    assert torch.equal(half, fake_quantize_table(table.bfloat16().float(), name).bfloat16())


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_the_gradient_is_straight_through(name):
    table = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3  # some entries are clipped
    table[2] = 0
    table.requires_grad_()
    gradient = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    y = fake_quantize_table(table, name)
    assert not torch.equal(y, table)
    y.backward(gradient)
    assert torch.equal(table.grad, gradient)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="format: expected one of int8, int4, ternary; got 'fp16'"):
        quantize_table(torch.zeros(2, 32), "fp16")
    with pytest.raises(ValueError, match="expected a multiple of 32 columns for int4; got \\(2, 33\\)"):
        fake_quantize_table(torch.zeros(2, 33), "int4")
    with pytest.raises(ValueError, match="gather it first"):
        fake_quantize_table(torch.empty(0), "int8")
