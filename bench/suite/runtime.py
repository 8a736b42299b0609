"""The CPU runtime as a whole, at a small real shape, beside transformers in bf16 in the same process."""

import tempfile
from pathlib import Path

# 8 layers of Qwen3-0.6B's width with a vocabulary of 32,000: seconds to make, megabytes to read for every token.
LAYERS, VOCABULARY = 8, 32_000


def student(packing, embedding):
    """A packed file with random weights, as long as the process lives, and its runtime with one thread."""
    import dataclasses
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import random_models
    from bitdistill.runtime import Runtime

    shape = dataclasses.replace(random_models.SHAPES["0.6B"], layers=LAYERS, vocabulary=VOCABULARY)
    folder = Path(tempfile.mkdtemp())
    path = folder / "student.safetensors"
    try:
        random_models.write_packed_model(path, shape, packing, embedding)
    except (ImportError, AttributeError, TypeError, AssertionError):
        raise NotImplementedError("another file format") from None
    return path, Runtime(path, threads=1)


def full_precision():
    """The same shape in transformers, bf16, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=3072, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_num_threads(1)
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


class Decode:
    """One token after 32, and a prompt of 128."""

    params = ("base3", "2bit")
    param_names = ("packing",)
    timeout = 300

    def setup(self, packing):
        self.path, self.runtime = student(packing, "int4")
        self.cache = self.runtime.new_cache(4096)
        self.runtime.logits(range(1, 33), last_only=True, cache=self.cache)
        self.ids = [(7 * i) % 1000 for i in range(128)]
        self.decode = lambda: self.runtime.logits([5], cache=self.cache)
        self.prefill = lambda: self.runtime.logits(self.ids, last_only=True)
        self.decode()

    def time_decode(self, packing):
        if self.cache.length > 64:
            self.cache.length = 32
        self.decode()

    def time_prefill_128(self, packing):
        self.prefill()

    def track_decode_ratio_to_bf16(self, packing):
        import torch

        from .side_by_side import ratio

        model = full_precision()
        with torch.inference_mode():
            past = model(torch.arange(1, 33)[None]).past_key_values
            token = torch.tensor([[5]])

            def theirs():
                past.crop(32)
                model(token, past_key_values=past)

            def ours():
                self.cache.length = 32
                self.decode()

            return ratio(ours, theirs, rounds=7, seconds=0.1)

    track_decode_ratio_to_bf16.unit = "x transformers bf16"

    def track_prefill_ratio_to_bf16(self, packing):
        import torch

        from .side_by_side import ratio

        model, ids = full_precision(), torch.tensor([self.ids])
        with torch.inference_mode():
            return ratio(self.prefill, lambda: model(ids, logits_to_keep=1), rounds=5, seconds=0.1)

    track_prefill_ratio_to_bf16.unit = "x transformers bf16"


class Memory:
    """Bytes of the file and of the process."""

    params = ("fp16", "int8", "int4", "ternary")
    param_names = ("embedding",)
    timeout = 300

    def setup(self, embedding):
        self.path, self.runtime = student("base3", embedding)

    def track_file_bytes(self, embedding):
        return self.path.stat().st_size

    track_file_bytes.unit = "bytes"

    def track_times_smaller_than_fp16(self, embedding):
        linears = LAYERS * (2048 * 1024 * 2 + 1024 * 1024 * 2 + 3 * 3072 * 1024)
        return 2 * (linears + VOCABULARY * 1024) / self.path.stat().st_size

    def track_resident_beside_the_file(self, embedding):
        return self.runtime.resident_bytes

    track_resident_beside_the_file.unit = "bytes"
