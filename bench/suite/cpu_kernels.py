"""The packed products of the CPU runtime, one thread: GEMV from memory and from cache, GEMM, beside torch and numpy."""

SHAPES = {"1024x1024": (1024, 1024), "3072x1024": (3072, 1024), "1024x3072": (1024, 3072)}


class Product:
    """One matrix of Qwen3-0.6B, in each packing, for 1, 8 and 64 tokens."""

    params = (("2bit", "base3"), tuple(SHAPES), (1, 8, 64))
    param_names = ("packing", "shape", "tokens")

    def setup(self, packing, shape, tokens):
        import numpy as np
        import torch

        try:
            from bitdistill.kernels.cpu import matmul
        except ImportError:
            raise NotImplementedError("no such kernels yet") from None
        from bitdistill.kernels import packing as layout

        torch.set_num_threads(1)
        rows, columns = SHAPES[shape]
        generator = np.random.default_rng(0)
        self.codes = generator.integers(-1, 2, (rows, columns)).astype(np.int8)
        self.packed = layout.pack(self.codes, packing)
        self.act = generator.integers(-127, 128, (tokens, columns)).astype(np.int8)
        self.product = lambda: matmul.ternary_accumulate(self.act, self.packed, packing, rows)
        self.weight = torch.from_numpy(self.codes).to(torch.bfloat16)
        self.x = torch.from_numpy(self.act).to(torch.bfloat16)
        self.torch = torch
        self.product()

    def time_product(self, packing, shape, tokens):
        self.product()

    def track_mismatches(self, packing, shape, tokens):
        import numpy as np

        return int((self.product() != self.act.astype(np.int32) @ self.codes.T.astype(np.int32)).sum())

    track_mismatches.unit = "accumulators"

    def track_ratio_to_bf16(self, packing, shape, tokens):
        from .side_by_side import ratio

        with self.torch.inference_mode():
            return ratio(self.product, lambda: self.torch.nn.functional.linear(self.x, self.weight))

    track_ratio_to_bf16.unit = "x torch bf16"
