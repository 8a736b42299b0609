"""Ternary codes as the blocks of llama.cpp's file types, written from the codes themselves.

A type is exact for a ternary weight when its block can hold {-1, 0, 1} times one fp16 scale, and all of these can. The
quantizers of the tools look at the weights again and are not exact (for Q4_0 the error is 12 % of the scale, for Q2_K 33
%).

    type    bits   block   layout of a block
    Q4_0    4.5     32     fp16 scale; 16 bytes, code + 8: column j in the low, column j + 16 in the high half of byte j
    Q2_0    2.25    64     fp16 scale; 16 bytes, code + 1: column 4 b + j in bits 2 j of byte b
    TQ2_0   2.06   256     64 bytes, code + 1 in 2 bits; fp16 scale
    TQ1_0   1.69   256     52 bytes, base 3; fp16 scale
    Q2_K    2.63   256     16 bytes, scale and offset of 16 columns, all 1; 64 bytes, code + 1 in 2 bits: column 128 h + 32 j + l
                           in bits 2 j of byte 32 h + l; fp16 scale d, and d again, which is subtracted: d * q - d
    F16    16        1     code * scale

Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockType:
    """A file type: its number in GGUF, weights and bytes of a block, and where it runs well."""

    name: str
    number: int
    columns: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.columns


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("f16", 1, 1, 2),
        BlockType("q4_0", 2, 32, 18),
        BlockType("q2_k", 10, 256, 84),
        BlockType("tq1_0", 34, 256, 54),
        BlockType("tq2_0", 35, 256, 66),
        BlockType("q2_0", 42, 64, 18),
    )
}


# What `auto` tries for each matrix, in this order, by what its row length allows: fast on x86 first. Q2_0 has no vector
# code on x86 and does not load in older tools, so it is chosen by hand only.
AUTO = ("tq2_0", "q4_0", "f16")


def encode_codes(codes_OI: np.ndarray, scale_OG: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of a ternary matrix in a file type.

    Args:
        codes_OI: int8 in {-1, 0, 1}; the type's block divides I.
        scale_OG: float32 (O, G): the scale of each group of I / G columns, or (1, 1) for one of the tensor; a block of the
            type lies in one group.
        kind: a name of TYPES.

    Returns: uint8 (O, bytes of a row); for f16 float16 (O, I).

    Numerics: codes are exact; the scale is rounded to fp16, half to even (exact when training snapped it to fp16).
    """
    rows, columns = codes_OI.shape
    block = TYPES[kind].columns
    assert columns % block == 0, f"{kind} needs rows of a multiple of {block}"
    per_block = columns // block
    group_columns = columns // scale_OG.shape[1]
    assert group_columns % block == 0 or kind == "f16", f"a block of {kind} must lie in one group"
    scale = np.broadcast_to(scale_OG, (rows, scale_OG.shape[1])).astype(np.float16)
    if kind == "f16":
        return codes_OI.astype(np.float16) * np.repeat(scale, group_columns, axis=1)
    scale_bytes = np.repeat(scale, group_columns // block, axis=1).reshape(-1, 1).view(np.uint8)
    codes = codes_OI.reshape(rows * per_block, block)
    if kind == "q4_0":
        unsigned = (codes + 8).astype(np.uint8)
        data = np.concatenate([scale_bytes, unsigned[:, :16] | (unsigned[:, 16:] << 4)], axis=1)
    elif kind == "q2_0":
        unsigned = (codes + 1).astype(np.uint8).reshape(-1, 16, 4)
        data = np.concatenate([scale_bytes, np.bitwise_or.reduce(unsigned << np.array([0, 2, 4, 6], np.uint8), 2)], 1)
    elif kind == "q2_k":
        unsigned = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
        ones = np.full((len(codes), 16), 0x11, np.uint8)
        data = np.concatenate(
            [ones, np.bitwise_or.reduce(unsigned, 2).reshape(-1, 64), scale_bytes, scale_bytes], axis=1
        )
    else:
        data = np.concatenate([_ternary_bytes(codes, kind), scale_bytes], axis=1)
    assert data.shape[1] == TYPES[kind].block_bytes
    return data.reshape(rows, -1)


def decode_bytes(data: np.ndarray, shape: tuple[int, int], kind: str) -> np.ndarray:
    """float32 (O, I): what llama.cpp multiplies by, from the bytes of `encode_codes`.

    Args:
        data: uint8 bytes (or float16 for f16) of the matrix.
        shape: (O, I).
        kind: a name of TYPES.
    """
    if kind == "f16":
        return data.view(np.float16).reshape(shape).astype(np.float32)
    if kind == "q2_0":
        blocks = data.reshape(-1, TYPES[kind].block_bytes)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        return ((codes.reshape(len(blocks), -1).astype(np.float32) - 1) * scale).reshape(shape)
    import gguf
    from gguf import quants

    return quants.dequantize(data, gguf.GGMLQuantizationType(TYPES[kind].number)).reshape(shape)


def _ternary_bytes(codes: np.ndarray, kind: str) -> np.ndarray:
    """The code bytes of TQ1_0 or TQ2_0 blocks, without the scale.

    The gguf package's quantizer keeps codes of {-1, 0, 1} exactly, because the largest magnitude of a block is then 1 or 0.
    """
    import gguf
    from gguf import quants

    data = quants.quantize(codes.astype(np.float32), gguf.GGMLQuantizationType(TYPES[kind].number))
    return data.reshape(len(codes), -1)[:, :-2]
