"""Writing and opening a packed student."""

import tempfile
from pathlib import Path

from . import newer_than_some_commits, shown
from .side_by_side import ratio


class Export:
    """A Llama of 4 layers, 9 M parameters, int8 embedding, beside the same model as fp16 safetensors."""

    def setup(self):
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import LlamaConfig, LlamaForCausalLM

        with newer_than_some_commits():
            from bitdistill.export.write import write_packed
            from bitdistill.runtime.packed_file import read_packed
            from bitdistill.student.refine import refine
        torch.manual_seed(0)
        torch.set_num_threads(1)
        config = LlamaConfig(
            vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        refine(self.model)
        self.folder = tempfile.TemporaryDirectory()
        path, plain = Path(self.folder.name) / "student.safetensors", Path(self.folder.name) / "fp16.safetensors"
        halves = {name: tensor.half() for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"}
        self.write = lambda: write_packed(path, self.model, embedding="int8")
        self.read = lambda: read_packed(path)
        self.write_fp16, self.read_fp16 = lambda: save_file(halves, plain), lambda: load_file(plain)
        self.write(), self.write_fp16()
        self.bytes, self.bytes_fp16 = path.stat().st_size, plain.stat().st_size

    def teardown(self):
        self.folder.cleanup()

    @shown("export")
    def time_export(self):
        self.write()

    @shown("open and check a packed file")
    def time_load(self):
        self.read()

    @shown("open and check a packed file, against fp16 safetensors", "x safetensors fp16")
    def track_load_ratio_to_safetensors(self):
        return ratio(self.read, self.read_fp16)

    @shown("file of a student of 9 M parameters, int8 embedding", "bytes")
    def track_file_bytes(self):
        return self.bytes

    @shown("file, against fp16 safetensors", "x safetensors fp16")
    def track_file_ratio_to_fp16(self):
        return self.bytes_fp16 / self.bytes

    @shown("codes in the file that differ from the trained ones", "mismatches")
    def track_code_mismatches(self):
        from bitdistill.kernels.reference import quantize_weight
        from bitdistill.student.layers import bit_linears

        packed = self.read()
        return sum(
            int((packed.weight_codes(name) != quantize_weight(layer.weight)[0].numpy()).sum())
            for name, layer in bit_linears(self.model).items()
        )
