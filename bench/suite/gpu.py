"""The GPU kernels beside torch; "n/a" without an NVIDIA GPU. The full table is bench/gpu_proof.py's."""


class BitLinear:
    """4,096 tokens through a square layer in bf16: forward with every gradient, beside `nn.Linear`."""

    params = (1024, 2048, 4096)
    param_names = ("width",)
    timeout = 300

    def setup(self, width):
        import torch

        if not torch.cuda.is_available():
            raise NotImplementedError("no GPU")
        from bitdistill.layers import BitLinear

        torch.manual_seed(0)
        self.torch = torch
        self.x = torch.randn(4096, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.layer = BitLinear(torch.nn.Linear(width, width, bias=False, device="cuda"))  # fp32 master
        self.linear = torch.nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16)
        self.grad = torch.randn(4096, width, device="cuda", dtype=torch.bfloat16)

    def _ours(self):
        self.layer(self.x).backward(self.grad)
        self.torch.cuda.synchronize()

    def _theirs(self):
        self.linear(self.x).backward(self.grad)
        self.torch.cuda.synchronize()

    def time_forward_backward(self, width):
        self._ours()

    def track_ratio_to_linear(self, width):
        from .side_by_side import ratio

        return ratio(self._ours, self._theirs)

    track_ratio_to_linear.unit = "x nn.Linear in bf16"
