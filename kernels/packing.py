"""From ternary codes and quantized tables to bytes and back, in numpy: the layout of the files, which the kernels use
without repacking.

**Row-lane blocks.** A block is 16 rows x 4 columns = 64 values, with value (r, c) at index 4r + c. So a 64-byte vector
holds one row in each of its 32-bit lanes, and four neighboring columns in each lane: what the four-way int8 dot products of
CPUs take (AVX512 and AVX-VNNI, AVX2, NEON), with no sum across lanes, for one token and for many. Rows are padded to a
multiple of 16 and columns to a multiple of 4, with code 0. Blocks are numbered by groups of 16 rows, and along the columns
inside each group::

    b = (o // 16) * ceil(I / 4) + i // 4          value index 4 * (o % 16) + i % 4

Ternary matrices store ``u = code + 1`` in {0, 1, 2}; vector v has 64 bytes, each holding the values of several blocks:

    2bit    byte j = u_j of block 4v | block 4v+1 << 2 | block 4v+2 << 4 | block 4v+3 << 6        3 is invalid in a field
    base3   byte j = u_j of block 5v + 3 * block 5v+1 + 9 * ... + 81 * block 5v+4                 0 .. 242

So base3 takes exactly 8/5 = 1.6 bits per weight where 16 divides O and 4 divides I, apart from a last vector that is not
full (padding is code 0, u = 1). A vector may hold blocks of two row groups. Tables (embedding, LM head) use the same
blocks:

    int8    byte j = code_j of block v, -127 .. 127; fp32 scale per row, (V,)
    int4    byte j = (code_j + 8) of block 2v | block 2v+1 << 4; fp16 scale for 32 columns of a row, as
            (ceil(V/16), I/32, 16): the scales that a row group needs together lie together; 32 divides I
    ternary 2bit or base3, with an fp32 scale per row, (V,)

A ternary linear has one fp32 scale, or fp16 scales for each row and each of its G groups of columns, (ceil(O/16), G, 16),
as int4 has.

Equal codes have equal bytes: unpacking refuses padding of another code. Shapes: (O, I) is (out_features, in_features).

Example, base3 and 2bit, codes [[-1, 0, 1, 1, 0]]: O = 1, I = 5, so two blocks in one vector; lane 0 is row 0.
Block 0 has u = 0 1 2 2 in bytes 0..3, block 1 has u = 1 1 1 1 (column 4, then padding); all other values are padding, 1.
base3: byte 0 = 0 + 3*1 + 9 + 27 + 81 = 120, byte 1 = 121, byte 2 = 122, byte 3 = 122, the rest 121.
2bit: byte 0 = 0 | 1<<2 | 1<<4 | 1<<6 = 84, byte 1 = 85, bytes 2 and 3 = 86, the rest 85.
"""

from collections.abc import Iterable

import numpy as np

PACKINGS = ("2bit", "base3")
BLOCK_ROWS, BLOCK_COLUMNS = 16, 4
BLOCK = BLOCK_ROWS * BLOCK_COLUMNS  # bytes of a vector, and values of a block
TABLE_FORMATS = ("fp16", "int8", "int4", "ternary")  # of an embedding or LM head; fp16 has no codes
BLOCKS_PER_VECTOR = {"2bit": 4, "base3": 5, "int4": 2, "int8": 1}
SCALE_BYTES = 4  # one fp32 weight_scale a matrix
INT4_GROUP = 32  # columns that share one fp16 scale: 4.5 bits per weight
BASE3_BYTES = 3**5  # byte values that mean something


def row_groups(rows: int) -> int:
    """Groups of 16 rows that hold `rows`."""
    return -(-rows // BLOCK_ROWS)


def column_quads(columns: int) -> int:
    """Groups of 4 columns that hold `columns`."""
    return -(-columns // BLOCK_COLUMNS)


def packed_bytes(out_features: int, in_features: int, packing: str) -> int:
    """Bytes of the 1-D array that holds an (O, I) matrix: 64 for 4 (2bit), 5 (base3), 2 (int4) or 1 (int8) blocks.

    Raises:
        ValueError: an unknown packing.
    """
    if packing not in BLOCKS_PER_VECTOR:
        raise ValueError(f"packing: expected one of {', '.join(BLOCKS_PER_VECTOR)}; got {packing!r}")
    blocks = row_groups(out_features) * column_quads(in_features)
    return BLOCK * -(-blocks // BLOCKS_PER_VECTOR[packing])


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
    return 8 * sum(packed_bytes(*shape, packing) + SCALE_BYTES for shape in shapes) / weights


# --- ternary matrices -------------------------------------------------------------------------------------------------


def pack(codes: np.ndarray, packing: str) -> np.ndarray:
    """Ternary codes to bytes (layout above).

    Args:
        codes: int8 (O, I) in {-1, 0, 1}.
        packing: "2bit" or "base3".

    Returns: uint8 (packed_bytes(O, I, packing),).

    Raises:
        ValueError: another dtype, dimension or value, or an unknown packing.
    """
    _ternary_packing(packing)
    _check_codes(codes, -1, 1)
    fields = _vectors(_to_blocks((codes + np.int8(1)).view(np.uint8), 1), BLOCKS_PER_VECTOR[packing], 1)
    base = 4 if packing == "2bit" else 3
    packed = np.zeros((len(fields), BLOCK), np.uint8)
    for field in range(fields.shape[1]):
        packed += fields[:, field] * np.uint8(base**field)
    return packed.reshape(-1)


def unpack(packed: np.ndarray, out_features: int, in_features: int, packing: str) -> np.ndarray:
    """The inverse of `pack`.

    Args:
        packed: uint8 (packed_bytes(O, I, packing),), also read-only.
        out_features, in_features: O and I.
        packing: one of PACKINGS.

    Returns: int8 (O, I).

    Raises:
        ValueError: the number of bytes does not fit, a value is invalid, or the padding is not code 0.
    """
    _ternary_packing(packing)
    _check_bytes(packed, packed_bytes(out_features, in_features, packing))
    if packing == "base3" and packed.size and packed.max() >= BASE3_BYTES:
        raise ValueError(f"packed: expected base-3 bytes up to 242; got {packed.max()}. The bytes are damaged.")
    vectors = packed.reshape(-1, BLOCK)
    fields = np.stack([_field(vectors, packing, field) for field in range(BLOCKS_PER_VECTOR[packing])], axis=1)
    if fields.size and fields.max() > 2:
        raise ValueError("packed: expected 2-bit fields of 0, 1 or 2; got 3. The bytes are damaged.")
    return _from_blocks(fields.reshape(-1, BLOCK).view(np.int8) - np.int8(1), out_features, in_features)


def unpack_rows(packed: np.ndarray, rows: np.ndarray, columns: int, packing: str) -> np.ndarray:
    """Some rows of a packed matrix or table, without unpacking the rest.

    Args:
        packed: 1-D bytes of any packing above (int8 for "int8"), trusted to be valid.
        rows: int (n,), row numbers.
        columns: I.
        packing: the name of that packing.

    Returns: int8 (n, I): ternary codes, int8 codes, or int4 codes -8 .. 7.
    """
    per_vector = BLOCKS_PER_VECTOR[packing]
    quads = column_quads(columns)
    rows = np.asarray(rows, np.int64)[:, None, None]
    block = rows // BLOCK_ROWS * quads + np.arange(quads)[:, None]
    byte = packed[block // per_vector * BLOCK + BLOCK_COLUMNS * (rows % BLOCK_ROWS) + np.arange(BLOCK_COLUMNS)]
    if packing == "int8":
        codes = byte
    elif packing == "int4":
        codes = (byte >> (4 * (block % 2)).astype(np.uint8) & np.uint8(15)).view(np.int8) - np.int8(8)
    else:
        power = (3 if packing == "base3" else 4) ** (block % per_vector)
        codes = (byte // power % (3 if packing == "base3" else 4)).astype(np.int8) - np.int8(1)
    return codes.reshape(len(codes), quads * BLOCK_COLUMNS)[:, :columns]


# --- tables -----------------------------------------------------------------------------------------------------------


def pack_int8(codes: np.ndarray) -> np.ndarray:
    """int8 (V, I) codes to int8 blocks (layout above): int8 (packed_bytes(V, I, "int8"),).

    Raises:
        ValueError: another dtype, dimension, or a code of -128.
    """
    _check_codes(codes, -127, 127)
    return _to_blocks(codes, 0).reshape(-1)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 (V, I) codes in -8 .. 7, 32 dividing I, to bytes of two (layout above): uint8 (packed_bytes(V, I, "int4"),).

    Raises:
        ValueError: another dtype, dimension, width or value.
    """
    _check_codes(codes, -8, 7)
    if codes.shape[1] % INT4_GROUP:
        raise ValueError(f"codes: expected a multiple of {INT4_GROUP} columns for int4; got {codes.shape[1]}")
    fields = _vectors(_to_blocks((codes + np.int8(8)).view(np.uint8), 8), 2, 8)
    return (fields[:, 0] | fields[:, 1] << 4).reshape(-1)


def pack_scales(scale: np.ndarray) -> np.ndarray:
    """float16 (O, G) scales to the order in which kernels read them: float16 (ceil(O/16), G, 16), padded with 0."""
    padded = np.zeros((row_groups(len(scale)) * BLOCK_ROWS, scale.shape[1]), np.float16)
    padded[: len(scale)] = scale
    return np.ascontiguousarray(padded.reshape(-1, BLOCK_ROWS, scale.shape[1]).transpose(0, 2, 1))


def unpack_scales(packed: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """The inverse of `pack_scales` for some rows: float16 (n, G)."""
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[rows]


# --- blocks -----------------------------------------------------------------------------------------------------------


def _to_blocks(values: np.ndarray, padding: int) -> np.ndarray:
    """(O, I) -> (blocks, 64), padded."""
    rows, columns = values.shape
    groups, quads = row_groups(rows), column_quads(columns)
    padded = np.full((groups * BLOCK_ROWS, quads * BLOCK_COLUMNS), padding, values.dtype)
    padded[:rows, :columns] = values
    lanes = padded.reshape(groups, BLOCK_ROWS, quads, BLOCK_COLUMNS).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(lanes).reshape(-1, BLOCK)


def _from_blocks(blocks: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The codes of padded blocks, (blocks or more, 64) -> (O, I); refuses padding that is not 0."""
    groups, quads = row_groups(rows), column_quads(columns)
    used = blocks[: groups * quads].reshape(groups, quads, BLOCK_ROWS, BLOCK_COLUMNS).transpose(0, 2, 1, 3)
    padded = used.reshape(groups * BLOCK_ROWS, quads * BLOCK_COLUMNS)
    if blocks[groups * quads :].any() or padded[rows:].any() or padded[:, columns:].any():
        raise ValueError("packed: expected padding of code 0; got another code. The bytes are damaged.")
    return np.ascontiguousarray(padded[:rows, :columns])


def _vectors(blocks: np.ndarray, per_vector: int, padding: int) -> np.ndarray:
    """(blocks, 64) -> (vectors, per_vector, 64), padded."""
    count = -(-len(blocks) // per_vector) * per_vector
    padded = np.full((count, BLOCK), padding, blocks.dtype)
    padded[: len(blocks)] = blocks
    return padded.reshape(-1, per_vector, BLOCK)


def _field(vectors: np.ndarray, packing: str, field: int) -> np.ndarray:
    if packing == "2bit":
        return vectors >> (2 * field) & np.uint8(3)
    return vectors // np.uint8(3**field) % np.uint8(3)


def _ternary_packing(packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}; got {packing!r}")


def _check_codes(codes: np.ndarray, low: int, high: int) -> None:
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"codes: expected int8 (O, I); got {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes: expected {low} to {high}; got {codes.min()} to {codes.max()}")


def _check_bytes(packed: np.ndarray, size: int) -> None:
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(f"packed: expected uint8 ({size},); got {packed.dtype} {packed.shape}")
