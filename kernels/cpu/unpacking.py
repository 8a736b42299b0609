"""From packed ternary bytes to codes u = weight_codes + 1, in registers: the digits of a base-3 byte, and blocks of 64 bytes.

Addresses are int64.
"""

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.vector import (
    SHUFFLES,
    VBMI,
    add_bytes,
    and_bytes,
    load_bytes,
    lookup16,
    lookup128,
    min_bytes,
    prefetch,
    repeat_byte,
    shift_words,
    store_bytes,
    sub_bytes,
    table,
    third,
)

TWO_BIT, BASE3, INT8 = range(3)  # numbers of MATRIX_FORMATS, of which the first two are PACKINGS
AHEAD = 4096  # bytes that unpacking int8 codes asks for in advance: the group's next blocks
MARGIN = (
    4 * 64
)  # bytes that `unpack_blocks` may write before and after its blocks, because a vector may hold foreign ones

# --- five base-3 digits of a byte -------------------------------------------------------------------------------------
#
# q = 81 u4 + r. Taking 81 off, modulo 256, as long as that makes it smaller leaves r; 81 u4 ends in the four bits of u4.
# With byte permutations of 128 entries, one look-up gives the other four digits, as the 2-bit fields of a byte.
# With 16 entries: write r = 16 h + l = 9 a + b. Tables of h and of l, with residues of 9 chosen so that their sum is below 16,
# give b; r - b = 9 a has a different lower half for each of its nine values. (Below 81, h = 5 only comes with l = 0.)
# With neither, divisions by 3.

_FIELDS = [[r // 3**d % 3 for d in range(4)] for r in range(81)] + [[0] * 4] * 47
_FIELDS = [a | b << 2 | c << 4 | d << 6 for a, b, c, d in _FIELDS]
_FIELDS_LOW, _FIELDS_HIGH = table(*_FIELDS[:64]), table(*_FIELDS[64:])
_RESIDUE_H = table(2, 0, 7, 5, 3, 1)  # 16 h modulo 9, as -2 .. 5, plus 2
_RESIDUE_L = table(*(l % 9 for l in range(16)))
_B = [(i - 2) % 9 for i in range(16)]
_B_OF, _U0_OF, _U1_OF = table(*_B), table(*(b % 3 for b in _B)), table(*(b // 3 for b in _B))
_A = [9 * low % 16 for low in range(16)]  # 9 * 9 = 81 = 1 modulo 16: the lower half of 9 a, times 9, is a
_U2_OF, _U3_OF = table(*(min(a, 8) % 3 for a in _A)), table(*(min(a, 8) // 3 for a in _A))


@jit
def top_digit(q):
    """q = 81 u4 + rest: rest, u4."""
    n81 = repeat_byte(81)
    once = min_bytes(q, sub_bytes(q, n81))
    rest = min_bytes(once, sub_bytes(once, n81))
    return rest, and_bytes(sub_bytes(q, rest), repeat_byte(15))


@jit
def low_digits(rest):
    """rest = u0 + 3 u1 + 9 u2 + 27 u3: four vectors of bytes 0, 1 or 2."""
    if VBMI:
        three = repeat_byte(3)
        fields = lookup128(_FIELDS_LOW(), _FIELDS_HIGH(), rest)
        u0 = and_bytes(fields, three)
        u1 = and_bytes(shift_words(fields, 2), three)
        u2 = and_bytes(shift_words(fields, 4), three)
        u3 = and_bytes(shift_words(fields, 6), three)
    elif SHUFFLES:
        high = lookup16(_RESIDUE_H(), and_bytes(shift_words(rest, 4), repeat_byte(15)))
        index = add_bytes(high, lookup16(_RESIDUE_L(), rest))
        nines = sub_bytes(rest, lookup16(_B_OF(), index))
        u0, u1 = lookup16(_U0_OF(), index), lookup16(_U1_OF(), index)
        u2, u3 = lookup16(_U2_OF(), nines), lookup16(_U3_OF(), nines)
    else:
        n1 = third(rest)
        n2 = third(n1)
        u3 = third(n2)
        u0 = sub_bytes(rest, add_bytes(n1, add_bytes(n1, n1)))
        u1 = sub_bytes(n1, add_bytes(n2, add_bytes(n2, n2)))
        u2 = sub_bytes(n2, add_bytes(u3, add_bytes(u3, u3)))
    return u0, u1, u2, u3


# --- blocks -----------------------------------------------------------------------------------------------------------


@jit
def code_offset(packing):
    """u - code of unpacked bytes u."""
    return 128 if packing == INT8 else 1


@jit
def unpack_blocks(weight, packing, first, count, out):
    """Blocks first .. first + count - 1 as bytes u at `out`; up to four more before and after are written as well."""
    three = repeat_byte(3)
    if packing == INT8:
        source, half = weight + 64 * first, repeat_byte(128)
        for block in range(count):
            prefetch(source + 64 * block + AHEAD)
            store_bytes(out + 64 * block, add_bytes(load_bytes(source + 64 * block), half))
    elif packing == TWO_BIT:
        for vector in range(first // 4, (first + count + 3) // 4):
            at = out + 64 * (4 * vector - first)
            prefetch(weight + 64 * vector + AHEAD)
            q = load_bytes(weight + 64 * vector)
            store_bytes(at, and_bytes(q, three))
            store_bytes(at + 64, and_bytes(shift_words(q, 2), three))
            store_bytes(at + 128, and_bytes(shift_words(q, 4), three))
            store_bytes(at + 192, and_bytes(shift_words(q, 6), three))
    else:
        for vector in range(first // 5, (first + count + 4) // 5):
            at = out + 64 * (5 * vector - first)
            prefetch(weight + 64 * vector + AHEAD)
            rest, u4 = top_digit(load_bytes(weight + 64 * vector))
            u0, u1, u2, u3 = low_digits(rest)
            store_bytes(at, u0)
            store_bytes(at + 64, u1)
            store_bytes(at + 128, u2)
            store_bytes(at + 192, u3)
            store_bytes(at + 256, u4)
