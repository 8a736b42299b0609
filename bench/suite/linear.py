"""BitLinear on this machine's CPU, the plain PyTorch reference, beside `nn.Linear`."""


class BitLinear:
    """256 tokens through a square layer: forward, and forward with every gradient."""

    params = (512, 1024)
    param_names = ("width",)

    def setup(self, width):
        import torch

        from bitdistill.kernels import reference

        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.reference, self.torch = reference, torch
        self.x = torch.randn(256, width, requires_grad=True)
        self.linear = torch.nn.Linear(width, width)
        self.grad = torch.randn(256, width)

    def _ours(self):
        return self.reference.bit_linear(self.x, self.linear.weight, self.linear.bias)

    def _backward(self, forward):
        self.x.grad = self.linear.weight.grad = self.linear.bias.grad = None
        forward().backward(self.grad)

    def time_forward(self, width):
        self._ours()

    def time_forward_backward(self, width):
        self._backward(self._ours)

    def time_quantize_weight(self, width):
        self.reference.quantize_weight(self.linear.weight)

    def time_quantize_activation(self, width):
        self.reference.quantize_activation(self.x)

    def track_forward_backward_ratio_to_linear(self, width):
        from .side_by_side import ratio

        return ratio(lambda: self._backward(self._ours), lambda: self._backward(lambda: self.linear(self.x)))

    track_forward_backward_ratio_to_linear.unit = "x nn.Linear"
