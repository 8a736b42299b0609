"""Each loss term beside its shortest eager form: time, and the largest tensor that is alive."""


def eager_relation(teacher, student):
    """KL over softmax(A A^T / sqrt(d)) for one of Q, K, V, as one would write it down."""
    import torch.nn.functional as F

    rows = [x @ x.mT / x.shape[-1] ** 0.5 for x in (teacher, student)]
    return F.kl_div(rows[1].log_softmax(-1), rows[0].log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()


class Relation:
    """8 heads of 64 over 256 tokens, batch 4, each convention."""

    params = ("eq12", "alg1", "pr382", "attention_maps")
    param_names = ("convention",)

    def setup(self, convention):
        import torch

        from bitdistill.losses import relation_loss

        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.loss = relation_loss
        self.teacher = [torch.randn(4, 8, 256, 64) for _ in range(3)]
        self.student = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in self.teacher]

    def _ours(self, convention):
        self.loss(self.teacher, self.student, None, convention=convention).backward()

    def time_forward_backward(self, convention):
        self._ours(convention)

    def track_ratio_to_eager(self, convention):
        if convention != "eq12":
            raise NotImplementedError("the eager form above is eq12's")
        from .side_by_side import ratio

        def eager():
            sum(eager_relation(t, s) for t, s in zip(self.teacher, self.student, strict=True)).backward()

        return ratio(lambda: self._ours(convention), eager, rounds=5)

    track_ratio_to_eager.unit = "x eager"


class Logits:
    """512 rows over 32,000 words."""

    def setup(self):
        import torch

        from bitdistill.losses import cross_entropy, logits_distillation

        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.torch, self.ce, self.kd = torch, cross_entropy, logits_distillation
        self.teacher = torch.randn(1, 512, 32_000)
        self.student = torch.randn(1, 512, 32_000, requires_grad=True)
        self.targets = torch.randint(0, 32_000, (1, 512))
        self.rows = torch.ones(1, 512, dtype=torch.bool)

    def time_cross_entropy(self):
        self.ce(self.student, self.targets).backward()

    def time_distillation(self):
        self.kd(self.student, self.teacher, self.rows).backward()

    def track_distillation_ratio_to_eager(self):
        from torch.nn import functional as F

        from .side_by_side import ratio

        def eager():
            p, q = (x[0].div(5).log_softmax(-1) for x in (self.teacher, self.student))
            F.kl_div(q, p, log_target=True, reduction="batchmean").backward()

        return ratio(self.time_distillation, eager, rounds=5)

    track_distillation_ratio_to_eager.unit = "x eager"
