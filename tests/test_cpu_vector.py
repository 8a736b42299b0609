"""Operations on vectors, compiled for this processor; tests/test_cpu_features.py has the other instruction sets."""

import cpu_checks
import numpy as np

from bitdistill.kernels.cpu import vector
from bitdistill.kernels.cpu.matmul import STEPS_2BIT, STEPS_BASE3


def test_every_operation():
    cpu_checks.check_operations()


def test_every_base3_byte():
    cpu_checks.check_digits()


def test_every_float16():
    bits = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    _convert(bits.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))  # NaN equals NaN here


@cpu_checks.jit
def _convert(source, out):
    for i in range(0, 65536, 16):
        cpu_checks.floats.store(out + 4 * i, vector.load_halves(source + 2 * i))


def test_bounds_of_the_sums():
    """The worst case of each loop in matmul.py and tables.py is inside int16."""
    worst = 2 * 128  # two columns per lane, |act| <= 128
    assert 2 * worst * 4 * STEPS_2BIT <= 32768  # fields four times too large, one dot a vector each
    assert 2 * worst * 5 * STEPS_BASE3 <= 32768
    assert 2 * worst * 64 <= 32768  # CHUNK
    assert 15 * 2 * 127 * 8 <= 32767  # a group of int4
