"""Each loss term beside its shortest eager form: time, and the most memory that is alive."""

from . import newer_than_some_commits, shown
from .side_by_side import memory_ratio, ratio


def eager_relation(teacher, student, convention):
    """One relation as one would write it down. teacher, student: (B, H, T, D), or two of them for attention maps."""
    import torch
    from torch.nn import functional as F

    def logits(a, b):
        if convention in ("alg1", "pr382"):
            return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
        scores = a @ b.mT / a.shape[-1] ** 0.5
        if convention == "attention_maps":
            size = a.shape[-2]
            scores = scores.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -1e9)
        return scores

    p, q = logits(*teacher).log_softmax(-1), logits(*student).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


class Relation:
    """8 heads of 64 over 256 tokens, in each convention; forward and backward."""

    params = ("eq12", "alg1", "pr382", "attention_maps")
    param_names = ("convention",)

    def setup(self, convention):
        import torch

        with newer_than_some_commits():
            from bitdistill.training.relations import relation_loss
        torch.manual_seed(0)
        torch.set_num_threads(1)
        teacher = [torch.randn(1, 8, 256, 64) for _ in range(3)]
        student = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in teacher]

        def ours():
            relation_loss(teacher, student, None, convention=convention).backward()

        def eager():
            if convention == "attention_maps":
                pairs = [(teacher[:2], student[:2])]
            else:
                heads = 32 if convention == "pr382" else 8  # as many as the authors' code regroups to
                split = [[x.transpose(1, 2).reshape(1, 256, heads, -1).transpose(1, 2) for x in side]
                         for side in (teacher, student)]  # fmt: skip
                pairs = [((t, t), (s, s)) for t, s in zip(*split, strict=True)]
            sum(eager_relation(t, s, convention) for t, s in pairs).backward()

        self.ours, self.eager = ours, eager
        ours()

    @shown("relation loss, forward and backward")
    def time_forward_backward(self, convention):
        self.ours()

    @shown("relation loss, against its eager form", "x eager")
    def track_ratio_to_eager(self, convention):
        return ratio(self.ours, self.eager, rounds=5)

    @shown("relation loss, memory against its eager form", "x eager")
    def track_peak_memory_ratio_to_eager(self, convention):
        return memory_ratio(self.ours, self.eager)


class Head:
    """The LM head with cross-entropy, or with cross-entropy and distillation: 512 hidden states of 64, 32,000 words.

    "default" takes chunks as training does (128 MiB on a CPU); with 16 MiB the logits of 16 rows are the most there is.
    """

    params = (("cross-entropy", "distillation"), ("default", "16 MiB"))
    param_names = ("term", "chunks")

    def setup(self, term, chunks):
        import torch
        from torch.nn import functional as F

        with newer_than_some_commits():
            from bitdistill.kernels.vocabulary import linear_cross_entropy, linear_distillation
        torch.manual_seed(0)
        torch.set_num_threads(1)
        rows, width, vocabulary = 512, 64, 32_000
        hidden, weight = torch.randn(rows, width), 0.02 * torch.randn(vocabulary, width)
        teacher_hidden, teacher_weight = hidden + 0.1 * torch.randn_like(hidden), weight.clone()
        hidden.requires_grad_(), weight.requires_grad_()
        targets = torch.randint(0, vocabulary, (rows,))
        options = {} if chunks == "default" else {"chunk_bytes": 2**24}

        def ours():
            if term == "cross-entropy":
                (linear_cross_entropy(hidden, weight, targets, **options) / rows).backward()
                return
            ce, kl = linear_distillation(
                hidden, weight, targets, teacher_hidden, teacher_weight,
                temperature=5.0, ce_weight=1.0, kl_weight=10.0, **options,
            )  # fmt: skip
            ((ce + 10.0 * kl) / rows).backward()

        def eager():
            logits = hidden @ weight.T
            loss = F.cross_entropy(logits, targets)
            if term == "distillation":
                with torch.no_grad():
                    p = (teacher_hidden @ teacher_weight.T / 5).log_softmax(-1)
                q = (logits / 5).log_softmax(-1)
                loss = loss + 10.0 * F.kl_div(q, p, log_target=True, reduction="batchmean")
            loss.backward()

        self.ours, self.eager = ours, eager

    @shown("LM head and its loss, forward and backward")
    def time_forward_backward(self, term, chunks):
        self.ours()

    @shown("LM head and its loss, against eager logits", "x eager")
    def track_ratio_to_eager(self, term, chunks):
        return ratio(self.ours, self.eager, rounds=3, seconds=0)

    @shown("LM head and its loss, memory against eager logits", "x eager")
    def track_peak_memory_ratio_to_eager(self, term, chunks):
        return memory_ratio(self.ours, self.eager)


class HeadOfBf16Products:
    """The LM head with cross-entropy of a step of SmolLM2-135M: 1,016 hidden states of 576, 49,152 words.

    All products are in bf16. Beside it the same with PyTorch's own products. "n/a" where such products are slow: without
    instructions for them a step takes minutes.
    """

    def setup(self):
        import torch

        with newer_than_some_commits():
            from bitdistill.distributed import allocator
            from bitdistill.kernels.cpu import vocabulary_tiles
            from bitdistill.kernels.cpu.bf16 import has_bf16_products
            from bitdistill.kernels.vocabulary import linear_cross_entropy
        if not has_bf16_products():
            raise NotImplementedError("bf16 products are slow here")
        allocator.keep_freed_memory()  # as in training: else the pages of the weight's gradient are made anew
        torch.manual_seed(0)
        torch.set_num_threads(1)
        rows, width, vocabulary = 1016, 576, 49_152
        hidden, weight = torch.randn(rows, width), 0.05 * torch.randn(vocabulary, width)
        hidden.requires_grad_(), weight.requires_grad_()
        targets, serves = torch.randint(0, vocabulary, (rows,)), vocabulary_tiles.serves

        def ours():
            hidden.grad = weight.grad = None
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = linear_cross_entropy(hidden, weight, targets, ce_weight=1 / rows) / rows
            loss.backward()

        def plain():
            vocabulary_tiles.serves = lambda dtype: False
            ours()
            vocabulary_tiles.serves = serves

        self.ours, self.plain = ours, plain
        ours()

    @shown("LM head of SmolLM2-135M in bf16, forward and backward")
    def time_forward_backward(self):
        self.ours()

    @shown("LM head of SmolLM2-135M in bf16, against PyTorch's own products", "x PyTorch")
    def track_ratio_to_pytorch(self):
        return ratio(self.ours, self.plain, rounds=5)
