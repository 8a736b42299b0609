"""The packed products of the CPU runtime, one thread: GEMV and GEMM by shape and packing, LM heads by format."""

from . import newer_than_some_commits, shown
from .side_by_side import ratio

SHAPES = {"1024x1024": (1024, 1024), "3072x1024": (3072, 1024), "1024x3072": (1024, 3072)}
TOKENS = (1, 64)
STREAM_BYTES = 2**27  # of matrices that a cold product walks through: larger than any cache here
VOCABULARY = 32_000


class Product:
    """A matrix of Qwen3-0.6B for 1 token (GEMV) and 64 (GEMM), in cache."""

    params = (("2bit", "base3"), tuple(SHAPES), TOKENS)
    param_names = ("packing", "shape", "tokens")

    def setup(self, packing, shape, tokens):
        import numpy as np
        import torch

        with newer_than_some_commits():
            from bitdistill.kernels.cpu.matmul import ternary_accumulate
            from bitdistill.kernels.packing import pack
        torch.set_num_threads(1)
        rows, columns = SHAPES[shape]
        generator = np.random.default_rng(0)
        codes = generator.integers(-1, 2, (rows, columns)).astype(np.int8)
        packed = pack(codes, packing)
        act = generator.integers(-127, 128, (tokens, columns)).astype(np.int8)
        self.product = lambda: ternary_accumulate(act, packed, packing, rows)
        weight, x = (torch.from_numpy(array).to(torch.bfloat16) for array in (codes, act))
        self.torch_product = torch.inference_mode()(lambda: torch.nn.functional.linear(x, weight))
        self.product()

    @shown("ternary product")
    def time_product(self, packing, shape, tokens):
        self.product()

    @shown("ternary product, against torch in bf16", "x torch bf16")
    def track_ratio_to_bf16(self, packing, shape, tokens):
        return ratio(self.product, self.torch_product)


class Exact:
    """Every shape and number of tokens above, and 7 tokens, beside numpy."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def setup(self, packing):
        with newer_than_some_commits():
            from bitdistill.kernels.cpu.matmul import ternary_accumulate
            from bitdistill.kernels.packing import pack
        self.pack, self.product = pack, ternary_accumulate

    @shown("ternary product, accumulators that differ", "mismatches")
    def track_mismatches(self, packing):
        import numpy as np

        generator, differing = np.random.default_rng(0), 0
        for rows, columns in SHAPES.values():
            codes = generator.integers(-1, 2, (rows, columns)).astype(np.int8)
            packed = self.pack(codes, packing)
            for tokens in (*TOKENS, 7):
                act = generator.integers(-127, 128, (tokens, columns)).astype(np.int8)
                expected = act.astype(np.float64) @ codes.T.astype(np.float64)  # whole numbers: exact, and by BLAS
                differing += int((self.product(act, packed, packing, rows) != expected).sum())
        return differing


class Stream:
    """GEMV over 128 MB of different matrices, 3072 x 1024: from memory, as in decoding."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def setup(self, packing):
        import numpy as np

        with newer_than_some_commits():
            from bitdistill.kernels.cpu.matmul import ternary_accumulate
            from bitdistill.kernels.packing import pack
        from measure import Bandwidth

        generator = np.random.default_rng(0)
        first = pack(generator.integers(-1, 2, (3072, 1024)).astype(np.int8), packing)
        matrices = [first.copy() for _ in range(STREAM_BYTES // first.nbytes)]
        act = generator.integers(-127, 128, (1, 1024)).astype(np.int8)
        bandwidth = Bandwidth(1, sum(matrix.nbytes for matrix in matrices))

        def walk():
            for matrix in matrices:
                ternary_accumulate(act, matrix, packing, 3072)

        self.walk, self.read = walk, bandwidth.gigabytes_per_second

    @shown("GEMV from memory, share of the read bandwidth", "x reading the same bytes")
    def track_ratio_to_bandwidth(self, packing):
        return ratio(self.walk, self.read)


class Head:
    """The LM head of one token, 32,000 words of 1,024 channels, in each format of an embedding."""

    params = ("fp16", "int8", "int4", "base3")
    param_names = ("format",)

    def setup(self, format):
        import numpy as np
        import torch

        with newer_than_some_commits():
            from bitdistill.kernels import packing
            from bitdistill.kernels.cpu.tables import multiply_table
            from bitdistill.kernels.tables import quantize_table
        torch.set_num_threads(1)
        generator = np.random.default_rng(0)
        table = 0.02 * generator.standard_normal((VOCABULARY, 1024), np.float32)
        x = generator.standard_normal((1, 1024), np.float32)
        if format == "fp16":
            packed, scale = table.astype(np.float16), None
        else:
            kind = format if format in ("int8", "int4") else "ternary"
            codes, scale = (tensor.numpy() for tensor in quantize_table(torch.from_numpy(table), kind))
        if format == "int8":
            packed = packing.pack_int8(codes)
        elif format == "int4":
            packed, scale = packing.pack_int4(codes), packing.pack_scales(scale)
        elif format != "fp16":
            packed = packing.pack(codes, format)
        self.product = lambda: multiply_table(x, packed, format, VOCABULARY, scale)
        full, x_torch = torch.from_numpy(table).bfloat16(), torch.from_numpy(x).bfloat16()
        self.torch_product = torch.inference_mode()(lambda: torch.nn.functional.linear(x_torch, full))
        self.product()

    @shown("LM head")
    def time_head(self, format):
        self.product()

    @shown("LM head, against torch in bf16", "x torch bf16")
    def track_ratio_to_bf16(self, format):
        return ratio(self.product, self.torch_product)
