"""What a user waits for before anything happens: imports, and the first token of a packed file, in fresh processes."""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import newer_than_some_commits, shown
from .side_by_side import ratio

BARE = "pass"
OURS = """
from bitdistill.runtime.cpu import Runtime
print(next(Runtime({path!r}, threads=1).generate_ids([1, 2, 3], 1)))
"""
THEIRS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype=torch.bfloat16)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)[0, -1])
"""


def run(code):
    """A fresh interpreter for `code`."""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Import:
    """A fresh process."""

    params = ("bitdistill", "bitdistill.runtime.cpu")
    param_names = ("module",)
    number, repeat, warmup_time = 1, 5, 0

    def setup(self, module):
        import importlib.util

        with newer_than_some_commits():
            if importlib.util.find_spec(module) is None:
                raise ImportError(module)
        self.work = lambda: run(f"import {module}")
        self.work()

    @shown("import")
    def time_import(self, module):
        self.work()

    @shown("import, against a bare Python", "x python -c pass")
    def track_ratio_to_bare_python(self, module):
        return ratio(self.work, lambda: run(BARE), rounds=3, seconds=0)


class FirstToken:
    """The tiny shape: libraries, opening the file, three tokens of prompt and one of answer, machine code on disk."""

    number, repeat, warmup_time = 1, 5, 0

    def setup(self):
        with newer_than_some_commits():
            import random_models
            from bitdistill.runtime.cpu import Runtime  # noqa: F401
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "student.safetensors"
        shape = random_models.SHAPES["tiny"]
        random_models.write_packed_model(path, shape, "base3", "int4")
        config = Qwen3Config(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=True,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(self.folder.name)
        self.ours, self.theirs = OURS.format(path=str(path)), THEIRS.format(path=self.folder.name)
        run(self.ours)  # compiles

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @shown("first token of a fresh process")
    def time_first_token(self):
        run(self.ours)

    @shown("first token of a fresh process, against transformers", "x transformers")
    def track_ratio_to_transformers(self):
        return ratio(lambda: run(self.ours), lambda: run(self.theirs), rounds=3, seconds=0)
