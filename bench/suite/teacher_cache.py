"""The cached teacher logits of stage 2: what a training step waits for when it reads a batch of blocks."""

import tempfile
from pathlib import Path

from . import newer_than_some_commits, shown
from .side_by_side import ratio

BLOCKS, TOKENS, TOP_K, VOCABULARY, BATCH = 32, 256, 32, 2048, 8


def filled(folder, model, blocks=BLOCKS, block_size=TOKENS):
    """A finished cache of random tokens: (TeacherCache, blocks int64 (blocks, block_size))."""
    import torch

    with newer_than_some_commits():
        from bitdistill.training.teacher_cache import Layout, TeacherCache, finish_cache, write_shards
    layout = Layout(blocks, block_size, TOP_K, 1.0, model.config.vocab_size)
    tokens = torch.randint(0, model.config.vocab_size, (blocks, block_size), generator=torch.manual_seed(0))
    unfinished, finished = folder / "unfinished", folder / "cache"
    unfinished.mkdir(), finished.mkdir()
    stream = [{"input_ids": row, "block": number} for number, row in enumerate(tokens)]
    write_shards(unfinished, model, stream, layout, batch_size=BATCH)
    finish_cache(unfinished, finished, layout)
    return TeacherCache(finished, blocks=blocks, block_size=block_size, vocabulary=model.config.vocab_size), tokens


class Read:
    """8 blocks of 256 tokens, 32 words each, beside the teacher that would be run instead: 4 layers, 1 M parameters."""

    def setup(self):
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.set_num_threads(1)
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config).eval()
        self.folder = tempfile.TemporaryDirectory()
        cache, tokens = filled(Path(self.folder.name), model)
        numbers, batch = torch.arange(BATCH), tokens[:BATCH]
        self.read = lambda: cache.read(numbers, batch)
        self.teacher = torch.no_grad()(lambda: model(batch))
        self.bytes_per_token = cache.layout.bytes_per_token

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @shown("read 2,048 tokens of cached teacher logits")
    def time_read(self):
        self.read()

    @shown("read cached teacher logits, against running a teacher of 1 M", "x the teacher")
    def track_ratio_to_teacher(self):
        return ratio(self.read, self.teacher)

    @shown("cached teacher logits, bytes a token", "bytes")
    def track_bytes_per_token(self):
        return self.bytes_per_token
