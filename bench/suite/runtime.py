"""The CPU runtime as a whole, at a small real shape and one thread, beside transformers in bf16."""

import tempfile
from pathlib import Path

from . import newer_than_some_commits, shown
from .side_by_side import ratio

# 8 layers of Qwen3-0.6B's width with a vocabulary of 32,000: seconds to make, megabytes to read for every token.
LAYERS, VOCABULARY, CONTEXT = 8, 32_000, 32


def small_shape():
    """The shape above; "n/a" at a commit that has no packed file of this kind."""
    import dataclasses

    with newer_than_some_commits():
        import random_models
    return dataclasses.replace(random_models.SHAPES["0.6B"], layers=LAYERS, vocabulary=VOCABULARY)


class _Student:
    """A packed file with random weights, as long as the benchmark lives."""

    def open(self, packing, embedding):
        shape = small_shape()
        import random_models

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "student.safetensors"
        random_models.write_packed_model(self.path, shape, packing, embedding)

    def teardown(self, *_):
        if hasattr(self, "folder"):
            self.folder.cleanup()


def full_precision():
    """The same shape in transformers, bf16, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=3072, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.uniform_(-0.03, 0.03)
    return model


class Decode(_Student):
    """A token after 32, a prompt of 128, and a step of 8 sequences."""

    params = ("base3", "2bit")
    param_names = ("packing",)

    def setup(self, packing):
        with newer_than_some_commits():
            from bitdistill.runtime.cpu import Runtime
        self.open(packing, "int4")
        self.runtime = runtime = Runtime(self.path, threads=1)
        self.cache = runtime.new_cache(CONTEXT + 1)
        runtime.logits(range(1, CONTEXT + 1), last_only=True, cache=self.cache)
        self.ids = [(7 * i) % 1000 for i in range(128)]
        prompts = [[1 + (7 * i + b) % 1000 for i in range(16)] for b in range(8)]
        self.batch = lambda: list(runtime.generate_batch(prompts, 8, slots=8))
        self.decode()
        self.prefill()

    def decode(self):
        self.cache.length = CONTEXT
        self.runtime.logits([5], cache=self.cache)

    def prefill(self):
        self.runtime.logits(self.ids, last_only=True)

    @shown("decode one token")
    def time_decode(self, packing):
        self.decode()

    @shown("prefill of 128 tokens")
    def time_prefill_128(self, packing):
        self.prefill()

    @shown("8 sequences: prompts of 16, 8 tokens each")
    def time_batch_of_8(self, packing):
        self.batch()

    @shown("decode, against transformers in bf16", "x transformers bf16")
    def track_decode_ratio_to_bf16(self, packing):
        import torch

        model, token = full_precision(), torch.tensor([[5]])
        with torch.inference_mode():
            past = model(torch.arange(1, CONTEXT + 1)[None]).past_key_values

            def theirs():
                model(token, past_key_values=past)
                past.crop(-1)

            return ratio(self.decode, theirs, rounds=7, seconds=0.05)

    @shown("prefill of 128 tokens, against transformers in bf16", "x transformers bf16")
    def track_prefill_ratio_to_bf16(self, packing):
        import torch

        model, ids = full_precision(), torch.tensor([self.ids])
        with torch.inference_mode():
            return ratio(self.prefill, lambda: model(ids, logits_to_keep=1), rounds=3, seconds=0)

    @shown("decode, share of the read bandwidth", "x reading the same bytes")
    def track_decode_ratio_to_bandwidth(self, packing):
        from measure import Bandwidth

        cache = 2 * LAYERS * 8 * 128 * 2 * CONTEXT  # keys and values, bf16
        bandwidth = Bandwidth(1, self.runtime.weight_bytes + cache)
        return ratio(self.decode, bandwidth.gigabytes_per_second, seconds=0.05)


class File(_Student):
    """The packed file in each embedding format."""

    params = ("fp16", "int8", "int4", "ternary")
    param_names = ("embedding",)

    def setup(self, embedding):
        self.open("base3", embedding)
        self.fp16 = 2 * (small_shape().linear_weights() + VOCABULARY * 1024)

    @shown("file of 8 layers of Qwen3-0.6B, 32,000 words", "bytes")
    def track_file_bytes(self, embedding):
        return self.path.stat().st_size

    @shown("file, against fp16", "x fp16")
    def track_file_ratio_to_fp16(self, embedding):
        return self.fp16 / self.path.stat().st_size


class Resident(_Student):
    """What a process grows by that decodes 128 positions, int4 embedding: sampled, in a process of its own."""

    def setup(self):
        self.open("base3", "int4")
        import resident

        self.ours = resident.growth("ours", small_shape(), self.path)["growth"]
        self.theirs = lambda: resident.growth("transformers", small_shape())["growth"]

    @shown("resident memory of decoding", "bytes")
    def track_resident_bytes(self):
        return self.ours

    @shown("resident memory of decoding, against transformers in bf16", "x transformers bf16")
    def track_resident_ratio_to_bf16(self):
        return self.theirs() / self.ours
