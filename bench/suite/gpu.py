"""The GPU kernels beside torch in bf16; "n/a" without an NVIDIA GPU. The full table is bench/gpu_proof.py's."""

from . import newer_than_some_commits, shown
from .losses import eager_relation
from .runtime import _Student
from .side_by_side import ratio

TOKENS = 4096


def gpu():
    """torch, seeded, where it has a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("no GPU")
    torch.manual_seed(0)
    return torch


class _Pair:
    """`ours` and `theirs`, set by `setup`; each call ends when the GPU is done."""

    def waiting(self, work):
        """`work`, and then the GPU's end of it."""
        import torch

        def call():
            work()
            torch.cuda.synchronize()

        return call

    def peak(self, work):
        """The most bytes that a call has allocated on the GPU beyond those before it."""
        import torch

        work()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before


class BitLinear(_Pair):
    """4,096 tokens through a square layer: forward with every gradient, beside `nn.Linear`."""

    params = (1024, 2048, 4096)
    param_names = ("width",)

    def setup(self, width):
        torch = gpu()
        with newer_than_some_commits():
            from bitdistill.student.layers import BitLinear
        x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        layer = BitLinear(torch.nn.Linear(width, width, bias=False, device="cuda"))  # fp32 master
        linear = torch.nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16)
        self.ours, self.theirs = (self.waiting(lambda one=one: one(x).backward(grad)) for one in (layer, linear))

    @shown("GPU: BitLinear forward and backward")
    def time_forward_backward(self, width):
        self.ours()

    @shown("GPU: BitLinear forward and backward, against nn.Linear", "x nn.Linear bf16")
    def track_ratio_to_linear(self, width):
        return ratio(self.ours, self.theirs)


class Quantizer(_Pair):
    """A weight of 4096 x 4096 in fp32, or 4,096 activations of that width in bf16, beside `x.abs()`."""

    params = ("weight", "activation")
    param_names = ("of",)

    def setup(self, of):
        torch = gpu()
        with newer_than_some_commits():
            from bitdistill.kernels.gpu.quantize import quantize_activation, quantize_weights
        x = torch.randn(TOKENS, 4096, device="cuda", dtype=torch.float32 if of == "weight" else torch.bfloat16)
        quantize = (lambda: quantize_weights([x])) if of == "weight" else (lambda: quantize_activation(x))
        self.ours, self.theirs = self.waiting(quantize), self.waiting(x.abs)

    @shown("GPU: quantizer")
    def time_quantize(self, of):
        self.ours()

    @shown("GPU: quantizer, against one pass over the tensor", "x one pass")
    def track_ratio_to_one_pass(self, of):
        return ratio(self.ours, self.theirs)


class Relation(_Pair):
    """16 heads of 128 over 512 tokens, batch 8, equation 12; forward and backward."""

    def setup(self):
        torch = gpu()
        with newer_than_some_commits():
            from bitdistill.training.relations import relation_loss
        shape, options = (8, 16, 512, 128), {"device": "cuda", "dtype": torch.bfloat16}
        teacher = [torch.randn(shape, **options) for _ in range(3)]
        student = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in teacher]

        def eager():
            pairs = zip(teacher, student, strict=True)
            sum(eager_relation((t.float(),) * 2, (s.float(),) * 2, "eq12") for t, s in pairs).backward()

        self.ours = self.waiting(lambda: relation_loss(teacher, student, None, convention="eq12").backward())
        self.theirs = self.waiting(eager)

    @shown("GPU: relation loss, forward and backward")
    def time_forward_backward(self):
        self.ours()

    @shown("GPU: relation loss, against its eager form", "x eager")
    def track_ratio_to_eager(self):
        return ratio(self.ours, self.theirs)

    @shown("GPU: relation loss, memory against its eager form", "x eager")
    def track_peak_memory_ratio_to_eager(self):
        return self.peak(self.theirs) / self.peak(self.ours)


class Head(_Pair):
    """The LM head with cross-entropy and distillation: 4,096 hidden states of 1,024, 151,936 words, bf16."""

    def setup(self):
        torch = gpu()
        from torch.nn import functional as F

        with newer_than_some_commits():
            from bitdistill.kernels.vocabulary import linear_distillation
        options = {"device": "cuda", "dtype": torch.bfloat16}
        hidden, weight = torch.randn(TOKENS, 1024, **options), 0.02 * torch.randn(151_936, 1024, **options)
        teacher_hidden, teacher_weight = hidden.clone(), weight.clone()
        hidden.requires_grad_(), weight.requires_grad_()
        targets = torch.randint(0, 151_936, (TOKENS,), device="cuda")

        def ours():
            terms = linear_distillation(
                hidden, weight, targets, teacher_hidden, teacher_weight, temperature=5.0, ce_weight=1.0, kl_weight=10.0
            )
            (terms[0] + 10.0 * terms[1]).backward()

        def eager():
            logits = hidden @ weight.T
            with torch.no_grad():
                p = (teacher_hidden @ teacher_weight.T).float().div(5).log_softmax(-1)
            kl = F.kl_div(logits.float().div(5).log_softmax(-1), p, log_target=True, reduction="sum")
            (F.cross_entropy(logits.float(), targets, reduction="sum") + 10.0 * kl).backward()

        self.ours, self.theirs = self.waiting(ours), self.waiting(eager)

    @shown("GPU: LM head and its loss, forward and backward")
    def time_forward_backward(self):
        self.ours()

    @shown("GPU: LM head and its loss, against eager logits", "x eager")
    def track_ratio_to_eager(self):
        return ratio(self.ours, self.theirs, rounds=5)

    @shown("GPU: LM head and its loss, memory against eager logits", "x eager")
    def track_peak_memory_ratio_to_eager(self):
        return self.peak(self.theirs) / self.peak(self.ours)


class Decode(_Student):
    """64 tokens after a prompt of 16, greedy, at the shape of runtime.py, beside `generate` of transformers in bf16."""

    def setup(self):
        torch = gpu()
        with newer_than_some_commits():
            from bitdistill.runtime.cuda import CudaRuntime
        from .runtime import full_precision

        self.open("2bit", "int8")
        runtime, model, ids = CudaRuntime(self.path), full_precision().cuda(), list(range(1, 17))
        prompt = torch.tensor([ids], device="cuda")
        self.ours = lambda: list(runtime.generate_ids(ids, 64))
        self.theirs = lambda: model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        self.ours()

    @shown("GPU: decode 64 tokens")
    def time_decode(self):
        self.ours()

    @shown("GPU: decode 64 tokens, against transformers in bf16", "x transformers bf16")
    def track_ratio_to_bf16(self):
        return ratio(self.ours, self.theirs, rounds=5)
