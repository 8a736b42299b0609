"""Codes to bytes and back, and how many bits a weight takes."""

from . import newer_than_some_commits, shown
from .side_by_side import ratio

QWEN3_06B = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]


class Pack:
    """One matrix of Qwen3-0.6B's MLP, 3072 x 1024."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def setup(self, packing):
        import numpy as np

        with newer_than_some_commits():
            from bitdistill.kernels.packing import pack, unpack
        self.codes = np.random.default_rng(0).integers(-1, 2, (3072, 1024)).astype(np.int8)
        self.pack = lambda: pack(self.codes, packing)
        self.packed = self.pack()
        self.unpack = lambda: unpack(self.packed, 3072, 1024, packing)
        try:
            self.unpack()
        except TypeError:
            raise NotImplementedError("another layout") from None

    @shown("pack")
    def time_pack(self, packing):
        self.pack()

    @shown("unpack")
    def time_unpack(self, packing):
        self.unpack()

    @shown("pack, against ten copies of the codes", "x ten copies")
    def track_pack_ratio_to_copies(self, packing):
        return ratio(self.pack, self._ten_copies)

    @shown("unpack, against ten copies of the codes", "x ten copies")
    def track_unpack_ratio_to_copies(self, packing):
        return ratio(self.unpack, self._ten_copies)

    def _ten_copies(self):
        for _ in range(10):
            self.codes.copy()

    @shown("codes that differ after packing and unpacking", "mismatches")
    def track_mismatches(self, packing):
        return int((self.unpack() != self.codes).sum())


class Size:
    """Exact arithmetic: the ternary linears of Qwen3-0.6B."""

    params = ("2bit", "base3")
    param_names = ("packing",)

    def setup(self, packing):
        with newer_than_some_commits():
            from bitdistill.kernels.packing import bits_per_weight
        self.bits = bits_per_weight(QWEN3_06B * 28, packing)

    @shown("bits per weight, linears of Qwen3-0.6B", "bits")
    def track_bits_per_weight(self, packing):
        return self.bits
