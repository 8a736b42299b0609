"""Ternary codes <-> bytes, numpy only: 2 bits a weight, or base 3 with five weights ("trits") a byte.

Both store ``u = code + 1`` in {0, 1, 2}. Padding stores code 0, and unpacking insists on it, so that equal codes have
equal bytes. Shapes: (O, I) is (out_features, in_features) of a linear layer, row-major.

2 bit: row-addressable, so that a matrix-vector product can read the bytes as they lie. A row has B = ceil(I / 4) bytes;
byte j holds the columns j, j + B, j + 2B and j + 3B, the four quarters of the row, so that neighbouring bytes meet
neighbouring activations in all four fields::

        bit      7   6 | 5   4 | 3   2 | 1   0
        column  j + 3B | j + 2B|  j + B|   j        field values 0, 1, 2; 3 is invalid

base 3: dense over the whole matrix, exactly 8/5 = 1.6 bits a weight. Byte n holds the weights 5n .. 5n + 4 of the
flattened matrix, the first as the lowest digit; only the last byte can be partly padding::

        byte n = u[5n] + 3 u[5n+1] + 9 u[5n+2] + 27 u[5n+3] + 81 u[5n+4]        0 .. 242; more is invalid

Example, codes [[-1, 0, 1, 1, 0]], so u = 0 1 2 2 1. 2 bit (B = 2, columns 5 to 7 are padding, u = 1):
byte 0 = u0 + 4 u2 + 16 u4 + 64 * 1 = 0 + 8 + 16 + 64 = 88, byte 1 = u1 + 4 u3 + 16 * 1 + 64 * 1 = 1 + 8 + 16 + 64 = 89.
base 3: 0 + 3 + 18 + 54 + 81 = 156.
"""

from collections.abc import Iterable

import numpy as np

PACKINGS = ("2bit", "base3")
SCALE_BYTES = 4  # one fp32 weight_scale a matrix
TRITS_PER_BYTE = 5
BASE3_BYTES = 3**TRITS_PER_BYTE  # byte values that mean something
_POWERS = 3 ** np.arange(TRITS_PER_BYTE, dtype=np.uint8)
# The five codes of each of the 243 bytes.
_CODES_OF_BYTE = (np.arange(BASE3_BYTES, dtype=np.uint8)[:, None] // _POWERS % 3).astype(np.int8) - np.int8(1)


def packed_shape(out_features: int, in_features: int, packing: str) -> tuple[int, ...]:
    """Shape of the uint8 array that holds an (O, I) matrix: (O, ceil(I/4)) for 2bit, (ceil(O*I/5),) for base3."""
    if packing == "2bit":
        return out_features, -(-in_features // 4)
    if packing == "base3":
        return (-(-out_features * in_features // TRITS_PER_BYTE),)
    raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}; got {packing!r}")


def bits_per_weight(shapes: Iterable[tuple[int, int]], packing: str) -> float:
    """``8 * stored bytes / weights`` of ternary matrices: codes with their padding, and one fp32 scale each.

    Args:
        shapes: (O, I) of every matrix.
        packing: "2bit" or "base3".

    Raises:
        ValueError: no weights at all, or an unknown packing.
    """
    shapes = list(shapes)
    weights = sum(rows * columns for rows, columns in shapes)
    if weights == 0:
        raise ValueError("shapes: expected at least one weight; got none")
    stored = sum(int(np.prod(packed_shape(*shape, packing))) + SCALE_BYTES for shape in shapes)
    return 8 * stored / weights


def pack(codes: np.ndarray, packing: str) -> np.ndarray:
    """`pack_2bit` or `pack_base3` by name."""
    packed_shape(0, 0, packing)
    return pack_2bit(codes) if packing == "2bit" else pack_base3(codes)


def unpack(packed: np.ndarray, out_features: int, in_features: int, packing: str) -> np.ndarray:
    """`unpack_2bit` or `unpack_base3` by name."""
    packed_shape(0, 0, packing)
    if packing == "2bit":
        return unpack_2bit(packed, in_features)
    return unpack_base3(packed, out_features, in_features)


def pack_2bit(codes: np.ndarray) -> np.ndarray:
    """Four codes a byte, each row padded to whole bytes (layout above).

    Args:
        codes: int8 (O, I) in {-1, 0, 1}.

    Returns: uint8 (O, ceil(I / 4)).

    Raises:
        ValueError: another dtype, dimension or value.
    """
    rows, columns = _checked(codes).shape
    width = packed_shape(rows, columns, "2bit")[1]
    fields = np.ones((rows, 4, width), np.uint8)
    fields.reshape(rows, 4 * width)[:, :columns] = codes + np.int8(1)
    return fields[:, 0] | fields[:, 1] << 2 | fields[:, 2] << 4 | fields[:, 3] << 6


def unpack_2bit(packed: np.ndarray, in_features: int) -> np.ndarray:
    """The inverse of `pack_2bit`.

    Args:
        packed: uint8 (O, ceil(I / 4)), also read-only.
        in_features: I.

    Returns: int8 (O, I).

    Raises:
        ValueError: the number of bytes does not fit, a field is 3, or the padding is not code 0.
    """
    _check_bytes(packed, (len(packed), packed_shape(0, in_features, "2bit")[1]))
    fields = (packed[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    codes = fields.reshape(len(packed), 4 * packed.shape[1]).view(np.int8) - np.int8(1)
    if (codes > 1).any():
        raise ValueError("packed: expected 2-bit fields of 0, 1 or 2; got 3. The bytes are damaged.")
    if codes[:, in_features:].any():
        raise ValueError("packed: expected padding of code 0; got another code. The bytes are damaged.")
    return codes[:, :in_features]


def pack_base3(codes: np.ndarray) -> np.ndarray:
    """Five codes a byte, dense over the flattened matrix (layout above).

    Args:
        codes: int8 (O, I) in {-1, 0, 1}.

    Returns: uint8 (ceil(O * I / 5),).

    Raises:
        ValueError: another dtype, dimension or value.
    """
    _checked(codes)
    trits = np.ones((packed_shape(*codes.shape, "base3")[0], TRITS_PER_BYTE), np.uint8)
    trits.reshape(-1)[: codes.size] = (codes + np.int8(1)).reshape(-1)
    return (trits * _POWERS).sum(axis=1, dtype=np.uint8)


def unpack_base3(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_base3`.

    Args:
        packed: uint8 (ceil(O * I / 5),), also read-only.
        out_features, in_features: O and I.

    Returns: int8 (O, I).

    Raises:
        ValueError: the number of bytes does not fit, a byte is above 242, or the padding is not code 0.
    """
    _check_bytes(packed, packed_shape(out_features, in_features, "base3"))
    if packed.size and packed.max() >= BASE3_BYTES:
        raise ValueError(f"packed: expected base-3 bytes up to 242; got {packed.max()}. The bytes are damaged.")
    codes = _CODES_OF_BYTE[packed].reshape(-1)
    if codes[out_features * in_features :].any():
        raise ValueError("packed: expected padding of code 0; got another code. The bytes are damaged.")
    return codes[: out_features * in_features].reshape(out_features, in_features)


def _checked(codes: np.ndarray) -> np.ndarray:
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"codes: expected int8 (O, I); got {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"codes: expected -1, 0 or 1; got {codes.min()} to {codes.max()}")
    return codes


def _check_bytes(packed: np.ndarray, shape: tuple[int, ...]) -> None:
    if packed.dtype != np.uint8 or packed.shape != shape:
        raise ValueError(f"packed: expected uint8 {shape}; got {packed.dtype} {packed.shape}")
