"""Tile products against numpy, compiled; tests/test_cpu_features.py runs them in numpy on every machine."""

import multiprocessing

import cpu_checks
import pytest

from bitdistill.kernels.cpu.tiles import TILES

pytestmark = pytest.mark.skipif(not TILES, reason="a processor with AMX, which the system lets a process use")


@pytest.mark.parametrize("signed", [False, True])
def test_any_number_of_tokens(signed):
    for tokens in range(1, 33):
        cpu_checks.check_tiles(tokens, 3, signed)


@pytest.mark.parametrize("tokens", range(17, 33))
def test_bf16_of_two_tiles_by_two(tokens):
    cpu_checks.check_bf16_pairs(tokens, 3)


@pytest.mark.parametrize("tokens", range(1, 17))
def test_products_of_half_a_tile(tokens):
    for count in (1, 2, 3, 4):
        cpu_checks.check_halves(tokens, count)
    for extreme in (-127, 127):
        cpu_checks.check_halves(tokens, 4, extreme)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tokens", [16, 32])
def test_largest_sums_of_many_columns(tokens, signed):
    for extreme in (-127, 127):
        cpu_checks.check_tiles(tokens, 200, signed, extreme)
    cpu_checks.check_tiles(tokens, 200, signed)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 7, 15, 16])
def test_products_of_attention(queries, whole):
    for steps in (1, 4):
        cpu_checks.check_bf16_tiles(queries, steps, whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_have_tiles(method):
    """The system's permission is inherited by a fork and asked for again in a new program."""
    child = multiprocessing.get_context(method).Process(target=cpu_checks.check_tiles, args=(17, 2, False))
    child.start()
    child.join(120)
    assert child.exitcode == 0
