"""What the compiled step is told, and in which numbers: records of models, layers, calls and working memory. Plain numpy:
decoder.py, which writes them, needs no Numba where the step is compiled already.
"""

import numpy as np

from bitdistill.kernels.packing import PACKINGS

# Numbers of formats and functions.
MATRIX_FORMATS = (*PACKINGS, "int8", "int4", "fp16")  # of a ternary linear, an embedding or an LM head
SILU, GELU_TANH = range(2)
FP32, BF16, INT8 = range(3)  # of a cache
GROUP_COLUMNS = (64, 128, 256)  # that may share a scale
FAILED = -1  # what an exported function returns in place of an exception

GROUP = 16  # rows of a weight that lie together in a packed block
ACC_WORDS = 16384  # int32 accumulators of a thread before they are scaled: 64 KB, inside the second-level cache
SPREAD = 4  # with fewer units of attention per thread, they are divided into spans
PARTS = ("embedding", "norms", "qkv", "attention", "o", "gate_up", "down", "head", "waiting")
EMBEDDING, NORMS, QKV, ATTENTION, O, GATE_UP, DOWN, HEAD, WAITING = range(0, 72, 8)  # bytes from a thread's first

_INT, _FLOAT = np.int64, np.float32
# Names without a comment are addresses; 0 stands for "none" where a thing is optional.
PROJECTION = np.dtype(
    [
        ("weight", _INT),
        ("packing", _INT),  # of matmul.py
        ("out_features", _INT),
        ("in_features", _INT),
        ("bias", _INT),
        ("subln", _INT),
        ("input_scale", _INT),
        ("codes", _INT),  # which of the layer's quantized inputs it reads: 0, 1 or 2
        ("own_codes", _INT),  # 1: it is the first to read them, so they are made for it
        ("scales", _INT),  # of rows or groups; 0 where weight_scale is the only one
        ("group_size", _INT),  # columns that share one of these; 0 for a whole row
        ("act_blocks", _INT),  # 1: its activations have a scale for each 32 columns, not one for the token
        ("weight_scale", _FLOAT),
        ("subln_eps", _FLOAT),
    ],
    align=True,
)
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
NORM_NAMES = ("input_norm", "q_norm", "k_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
LAYER = np.dtype(
    [(name, PROJECTION) for name in PROJECTIONS]
    + [(name, _INT) for name in NORM_NAMES]
    + [("rope", _INT), ("window", _INT)],  # an index; positions, 0 for all
    align=True,
)
TABLE = np.dtype([("format", _INT), ("weight", _INT), ("scale", _INT)], align=True)
MODEL = np.dtype(
    [(name, TABLE) for name in ("embedding", "head")]
    + [(name, _INT) for name in ("final_norm", "inv_freq")]  # float32 (ropes, head_dim / 2)
    + [
        (name, _INT)
        for name in (
            "layers",
            "vocabulary",
            "hidden",
            "intermediate",
            "heads",
            "kv_heads",
            "head_dim",
            "ropes",
            "activation",
        )
    ]
    + [(name, _FLOAT) for name in ("eps", "attention_scale", "embedding_scale")],
    align=True,
)
# One call: what changes. The cache's part is what attention.py reads.
CALL = np.dtype(
    [(name, _INT) for name in ("ids", "slots", "positions", "rows", "wanted", "wanted_rows", "logits", "profile")]
    + [(name, _INT) for name in ("keys", "values", "key_scales", "value_scales", "dtype", "cache_slots", "capacity")]
)
# Working memory. Shared: x, qkv, attended, gate, up, out: float32 (rows, padded width); records: 3 x rows of them;
# cos, sin: (ropes, rows, head_dim / 2); arrived: an int64 for each unit of attention; parts: float32, those of its spans.
# Private: `private` bytes for each thread, divided up in `_Private`'s order.
SCRATCH = np.dtype(
    [
        (name, _INT)
        for name in (
            "rows", "x", "qkv", "attended", "gate", "up", "out", "records", "record_bytes", "cos", "sin", "arrived", "parts",
            "private", "private_bytes", "p_x", "p_row", "p_row2", "p_records", "p_cos", "p_sin", "p_acc", "p_product",
            "p_attention", "p_tiles",
        )
    ]
)  # fmt: skip
