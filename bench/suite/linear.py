"""BitLinear and its quantizers in plain PyTorch on a CPU, beside `nn.Linear` in fp32."""

from . import newer_than_some_commits, shown
from .side_by_side import memory_ratio, ratio

TOKENS = 256


class BitLinear:
    """256 tokens through a square layer: forward, and forward with every gradient."""

    params = (512, 1024)
    param_names = ("width",)

    def setup(self, width):
        import torch

        with newer_than_some_commits():
            from bitdistill.student.layers import BitLinear
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.x, self.grad = torch.randn(TOKENS, width, requires_grad=True), torch.randn(TOKENS, width)
        self.linear, master = (torch.nn.Linear(width, width) for _ in range(2))
        self.ours = BitLinear(master)

    def _backward(self, layer):
        self.x.grad = layer.weight.grad = layer.bias.grad = None
        layer(self.x).backward(self.grad)

    @shown("BitLinear forward")
    def time_forward(self, width):
        self.ours(self.x)

    @shown("BitLinear forward and backward")
    def time_forward_backward(self, width):
        self._backward(self.ours)

    @shown("BitLinear forward, against nn.Linear", "x nn.Linear")
    def track_forward_ratio_to_linear(self, width):
        return ratio(lambda: self.ours(self.x), lambda: self.linear(self.x))

    @shown("BitLinear forward and backward, against nn.Linear", "x nn.Linear")
    def track_forward_backward_ratio_to_linear(self, width):
        return ratio(lambda: self._backward(self.ours), lambda: self._backward(self.linear))

    @shown("BitLinear forward and backward, memory against nn.Linear", "x nn.Linear")
    def track_peak_memory_ratio_to_linear(self, width):
        return memory_ratio(lambda: self._backward(self.ours), lambda: self._backward(self.linear))


class TrainedBitLinear:
    """1,024 tokens through a projection of SmolLM2-135M's MLP, forward with every gradient, codes of the weights included."""

    params = ("exact", "fast")
    param_names = ("backward",)

    def setup(self, backward):
        import torch

        with newer_than_some_commits():
            from bitdistill.student.layers import BitLinear, use_backward
            from bitdistill.student.sharing import WeightCodes
        torch.manual_seed(0)
        torch.set_num_threads(1)
        linears = {torch.float32: torch.nn.Linear(576, 1536, bias=False)}
        linears[torch.bfloat16] = torch.nn.Linear(576, 1536, bias=False).bfloat16()
        ours = torch.nn.ModuleList([BitLinear(torch.nn.Linear(576, 1536, bias=False))])
        use_backward(ours, backward)
        codes = WeightCodes(ours)
        x, grad = torch.randn(1024, 576), torch.randn(1024, 1536)

        def run(layer, dtype):
            inputs = x.to(dtype).detach().requires_grad_()
            layer.weight.grad = None
            layer(inputs).backward(grad.to(dtype))

        def step():
            with codes.hold():
                run(ours[0], torch.float32)

        self.step = step
        self.of = {dtype: (lambda dtype=dtype, layer=layer: run(layer, dtype)) for dtype, layer in linears.items()}
        step()

    @shown("BitLinear in training")
    def time_step(self, backward):
        self.step()

    @shown("BitLinear in training, against nn.Linear in fp32", "x nn.Linear")
    def track_ratio_to_fp32(self, backward):
        import torch

        return ratio(self.step, self.of[torch.float32])

    @shown("BitLinear in training, against nn.Linear in bf16", "x nn.Linear")
    def track_ratio_to_bf16(self, backward):
        import torch

        return ratio(self.step, self.of[torch.bfloat16])


class Quantizer:
    """A weight of 1024 x 1024 and the activations of 256 tokens, beside one pass over the same tensor, `x.abs()`."""

    params = ("weight", "activation")
    param_names = ("of",)

    def setup(self, of):
        import torch

        with newer_than_some_commits():
            from bitdistill.kernels import reference
        torch.manual_seed(0)
        torch.set_num_threads(1)
        x = torch.randn(1024 if of == "weight" else TOKENS, 1024)
        quantize = reference.quantize_weight if of == "weight" else reference.quantize_activation
        self.quantize, self.one_pass = lambda: quantize(x), lambda: x.abs()
        self.codes, self.x, self.of = quantize(x)[0], x, of

    @shown("quantizer")
    def time_quantize(self, of):
        self.quantize()

    @shown("quantizer, against one pass over the tensor", "x one pass")
    def track_ratio_to_one_pass(self, of):
        return ratio(self.quantize, self.one_pass)

    @shown("quantizer, codes that differ from numpy's in float64", "mismatches")
    def track_mismatches(self, of):
        """Away from ties, which no two number formats see alike."""
        import numpy as np

        x = self.x.double().numpy()
        units = x / np.abs(x).mean() if of == "weight" else x * (127 / np.abs(x).max(axis=1, keepdims=True))
        largest = 1 if of == "weight" else 127
        clear = np.abs(np.abs(units) % 1 - 0.5) > 1e-3
        return int((np.clip(np.rint(units), -largest, largest) != self.codes.numpy())[clear].sum())
