"""Writing and opening a packed student."""

import tempfile
from pathlib import Path


class Export:
    """A Llama of 4 layers, 12 M parameters."""

    timeout = 300

    def setup(self):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from bitdistill.export.packed import read_packed, write_packed
        from bitdistill.refine import refine

        torch.set_num_threads(1)
        config = LlamaConfig(
            vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        refine(self.model)
        self.path = Path(tempfile.mkdtemp()) / "student.safetensors"
        self.write, self.read = write_packed, read_packed
        self.sizes = self.write(self.path, self.model, embedding="int8")

    def time_export(self):
        self.write(self.path, self.model, embedding="int8")

    def time_load(self):
        self.read(self.path)

    def track_bits_per_weight(self):
        return self.sizes["bits_per_weight"]

    def track_code_mismatches(self):
        from bitdistill.kernels.reference import quantize_weight
        from bitdistill.layers import bit_linears

        packed = self.read(self.path)
        return sum(
            int((packed.weight_codes(name) != quantize_weight(layer.weight)[0].numpy()).sum())
            for name, layer in bit_linears(self.model).items()
        )

    track_code_mismatches.unit = "codes"
