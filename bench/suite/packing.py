"""Codes to bytes and back, and how many bits a weight takes."""

QWEN3_06B = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]


class Pack:
    """One matrix of Qwen3-0.6B's MLP."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def setup(self, packing):
        import numpy as np

        from bitdistill.kernels import packing as layout

        if not hasattr(layout, "packed_bytes"):
            raise NotImplementedError("another layout")
        self.layout = layout
        self.codes = np.random.default_rng(0).integers(-1, 2, (3072, 1024)).astype(np.int8)
        self.packed = layout.pack(self.codes, packing)

    def time_pack(self, packing):
        self.layout.pack(self.codes, packing)

    def time_unpack(self, packing):
        self.layout.unpack(self.packed, 3072, 1024, packing)

    def track_mismatches(self, packing):
        return int((self.layout.unpack(self.packed, 3072, 1024, packing) != self.codes).sum())

    track_mismatches.unit = "codes"


class Size:
    """Exact arithmetic: the ternary linears of Qwen3-0.6B."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def track_bits_per_weight(self, packing):
        from bitdistill.kernels.packing import bits_per_weight

        return bits_per_weight(QWEN3_06B * 28, packing)

    track_bits_per_weight.unit = "bits"

    def track_times_smaller_than_fp16(self, packing):
        return 16 / self.track_bits_per_weight(packing)
